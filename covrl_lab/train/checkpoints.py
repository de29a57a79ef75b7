"""The files of a run: checks of its folder, checkpoints, and lines of metrics and evaluations.

A checkpoint is the adapter, the optimiser and the method's state. It is written under another name and then
renamed, so that a checkpoint folder is always whole.
"""

from __future__ import annotations

import errno
import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from ..config import RunConfig
from ..files import write_whole
from ..runs.folder import read_jsonl, step_file, steps_in
from ..types import ConfigError
from .policy import Policy, load_adapter, save_adapter

ALLOWED_SUFFIXES = {".ipynb", ".ipynb_checkpoints", ".html", ".log", ".tmp", ".yaml", ".lock"}
MIN_FREE_BYTES = 200 * 2**20  # a run folder of the embedded model with its checkpoints stays below this
METHOD_STATE = "memory.json"
KEPT_CHECKPOINTS = 2


def check_run_dir(config: RunConfig) -> None:
    """Raise ConfigError where this configuration cannot write its run folder; writes nothing."""
    run_dir = Path(config.run_dir)
    parent = next(p for p in (run_dir, *run_dir.absolute().parents) if p.exists())
    if not parent.is_dir() or not os.access(parent, os.W_OK):
        problem = "cannot be written" if parent.is_dir() else "is a file"
        raise ConfigError(f"{str(parent)!r} {problem}, so it cannot hold a run; choose another run_dir")
    if (run_dir / "config.json").exists():
        if different := config.differences(RunConfig.load(run_dir / "config.json")):
            name, (mine, theirs) = next(iter(different.items()))
            raise ConfigError(
                f"{str(run_dir)!r} holds a run with another configuration ({name} is {theirs!r} "
                f"there, {mine!r} here); choose another run_dir"
            )
    elif run_dir.exists() and any((p.suffix or p.name) not in ALLOWED_SUFFIXES for p in run_dir.iterdir()):
        raise ConfigError(f"{str(run_dir)!r} is not empty and not a run folder; choose another run_dir")
    if shutil.disk_usage(parent).free < MIN_FREE_BYTES:
        raise ConfigError(f"less than {MIN_FREE_BYTES // 2**20} MiB are free for {str(run_dir)!r}; free some space")


def save_checkpoint(
    run_dir: Path, step: int, policy: Policy, optimizer: torch.optim.Optimizer, method_state: Mapping[str, float]
) -> Path:
    """Write the checkpoint after ``step`` steps, and keep only the last two."""
    folder = run_dir / "checkpoints"
    final = step_file(folder, step, "")
    temporary = final.with_name(final.name + ".tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    save_adapter(policy, temporary)
    state = {
        f"{name}/{key}": value.contiguous()
        for name, parameter in policy.trainable()
        for key, value in optimizer.state[parameter].items()
    }
    save_file(state, temporary / "optimizer.safetensors")
    (temporary / METHOD_STATE).write_text(json.dumps(method_state), encoding="utf-8")
    shutil.rmtree(final, ignore_errors=True)
    os.replace(temporary, final)
    for old in steps_in(folder)[:-KEPT_CHECKPOINTS]:
        shutil.rmtree(step_file(folder, old, ""))
    return final


def load_checkpoint(run_dir: Path, policy: Policy, optimizer: torch.optim.Optimizer) -> tuple[int, dict[str, float]]:
    """Restore the last checkpoint; its step and the method's state, or 0 and nothing where there is none.

    Files that an interrupted run left half-written are removed.
    """
    for half in run_dir.glob("*/*.tmp"):  # checkpoints, and files of traces and evaluations
        shutil.rmtree(half) if half.is_dir() else half.unlink()
    saved = steps_in(run_dir / "checkpoints")
    if not saved:
        return 0, {}
    folder = step_file(run_dir / "checkpoints", saved[-1], "")
    load_adapter(policy, folder)
    stored = load_file(folder / "optimizer.safetensors")
    for name, parameter in policy.trainable():
        moments = {key: stored[f"{name}/{key}"].to(parameter.device) for key in ("exp_avg", "exp_avg_sq")}
        optimizer.state[parameter] = {"step": stored[f"{name}/step"]} | moments
    return saved[-1], json.loads((folder / METHOD_STATE).read_text(encoding="utf-8"))


def keep_lines(path: Path, last_step: int) -> list[dict[str, Any]]:
    """Drop the lines of steps after ``last_step`` from a JSON-lines file; return the lines that stay."""
    if not path.exists():
        return []
    lines = [record for record in read_jsonl(path) if record["step"] <= last_step]
    write_whole(path, "".join(json.dumps(r) + "\n" for r in lines))
    return lines


def append_line(path: Path, record: Mapping[str, Any]) -> None:
    """Add a line to a JSON-lines file."""
    with path.open("a", encoding="utf-8") as file:
        file.write(json.dumps(record) + "\n")


def is_disk_full(error: Exception) -> bool:
    """Whether writing failed for want of space."""
    full = [errno.ENOSPC, getattr(errno, "EDQUOT", errno.ENOSPC)]  # Windows has no EDQUOT
    # safetensors passes the system's error on as text only.
    return getattr(error, "errno", None) in full or f"os error {errno.ENOSPC}" in str(error)
