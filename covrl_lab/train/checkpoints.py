"""The files of a run: checks of its folder, checkpoints, and lines of metrics and evaluations.

A checkpoint is the adapter, the optimiser and the method's state, with their checksums. It is written under another
name and then renamed, so that a checkpoint folder is always whole. One damaged since is found by its checksums.
"""

import errno
import json
import logging
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from ..config import RunConfig
from ..files import CHECKSUMS, Owner, check_checksums, checksums, read_object, readable, refuse_links, write_whole
from ..runs.folder import Run, read_lines, read_table, step_file, steps_in
from ..types import ConfigError
from .evaluation import summarise_sets
from .policy import Policy, load_adapter, save_adapter

ALLOWED_SUFFIXES = {".ipynb", ".ipynb_checkpoints", ".html", ".log", ".tmp", ".yaml", ".lock"}
MIN_FREE_BYTES = 200 * 2**20  # a run folder of the embedded model with its checkpoints stays below this
METHOD_STATE, OPTIMIZER = "memory.json", "optimizer.safetensors"
KEPT_CHECKPOINTS = 2
RESTORE = "; restore it"  # how the sentences about damaged files end
LOG = logging.getLogger(__name__)


def check_run_dir(config: RunConfig) -> None:
    """Raise ConfigError where this configuration cannot write its run folder; writes nothing."""
    run_dir = Path(config.run_dir)
    try:
        run_dir.exists()
    except OSError as error:
        raise ConfigError(f"{config.run_dir[:80]!r} cannot be a run_dir ({error.strerror}); choose another") from error
    parent = next(p for p in (run_dir, *run_dir.absolute().parents) if p.exists())
    if not parent.is_dir() or not os.access(parent, os.W_OK):
        problem = "cannot be written" if parent.is_dir() else "is a file"
        raise ConfigError(f"{str(parent)!r} {problem}, so it cannot hold a run; choose another run_dir")
    refuse_links(Path(os.path.realpath(run_dir)))  # itself it may be one
    if (run_dir / "config.json").exists():
        if different := config.differences(RunConfig.load(run_dir / "config.json")):
            name, (mine, theirs) = next(iter(different.items()))
            problem = f"holds a run with another configuration ({name} is {theirs!r} there, {mine!r} here)"
            raise ConfigError(f"{str(run_dir)!r} {problem}; choose another run_dir")
        find_checkpoint(run_dir)
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
    save_file(state, temporary / OPTIMIZER)
    (temporary / METHOD_STATE).write_text(json.dumps(method_state), encoding="utf-8")
    (temporary / CHECKSUMS).write_text(json.dumps(checksums(temporary), indent=2), encoding="utf-8")
    shutil.rmtree(final, ignore_errors=True)
    os.replace(temporary, final)
    for old in steps_in(folder)[:-KEPT_CHECKPOINTS]:
        shutil.rmtree(step_file(folder, old, ""))
    return final


def stored_step(run: Run, step: int | None, untrained: bool = False) -> int:
    """The ``step`` of a stored checkpoint, None for the last; 0 where an ``untrained`` model will do. ConfigError."""
    if run.foreign:
        raise ConfigError(run.foreign)
    refuse_links(run.path.resolve())  # it would write, or share, files elsewhere
    steps = [0] * untrained + steps_in(run.path / "checkpoints")
    if not steps:
        raise ConfigError(f"{str(run.path)!r} holds no checkpoint yet; a run writes one every few steps")
    step = steps[-1] if step is None else step
    if step not in steps:
        raise ConfigError(f"{str(run.path)!r} has no checkpoint of step {step}; it has {steps[untrained:]}")
    return step


def find_checkpoint(run_dir: Path) -> tuple[int, list[str]]:
    """The step of the newest checkpoint that a run can resume from, 0 without any, and why newer ones will not do.

    A checkpoint will do if its files are whole and metrics and evaluations are, up to its step. ConfigError where
    there are checkpoints and none will.
    """
    saved = steps_in(run_dir / "checkpoints")
    lines = [read_lines(run_dir / name) for name in ("metrics.jsonl", "evaluations.jsonl")]
    skipped: list[str] = []
    for step in reversed(saved):
        folder = step_file(run_dir / "checkpoints", step, "")
        try:
            if faults := [one.fault for one in lines if one.fault and one.reach < step]:
                raise ConfigError(faults[0] + RESTORE)
            check_checksums(folder)
            for name in ("adapter_model.safetensors", OPTIMIZER):
                with readable(repr(str(folder / name))):
                    load_file(folder / name)
            for name in ("adapter_config.json", METHOD_STATE):
                read_object(folder / name)
            return step, list(dict.fromkeys(skipped))
        except ConfigError as error:
            skipped.append(str(error).removesuffix(RESTORE))
    if saved:
        folder = str(run_dir / "checkpoints")
        mend = ", mend it with covrl-lab train --repair" if lines[0].fault or lines[1].fault else ""
        raise ConfigError(
            f"{skipped[0]}{RESTORE}, as no older checkpoint will do{mend}, or remove {folder!r} to begin again"
        )
    return 0, []


def load_checkpoint(run_dir: Path, policy: Policy, optimizer: torch.optim.Optimizer) -> tuple[int, dict[str, float]]:
    """Restore the newest checkpoint that will do; its step and the method's state, or 0 and nothing without any.

    What was skipped is set aside under another name. Files that an interrupted run left half-written are removed.
    """
    for half in (*run_dir.glob("*/*.tmp"), *run_dir.glob("*.[0-9]*.tmp")):  # NAME.PID.tmp; others there are not ours
        shutil.rmtree(half) if half.is_dir() else half.unlink()
    step, skipped = find_checkpoint(run_dir)
    if not step:
        if (run_dir / "metrics.jsonl").exists():
            LOG.warning("%r holds no checkpoint, so the run begins again", str(run_dir))
        return 0, {}
    folder = step_file(run_dir / "checkpoints", step, "")
    load_adapter(policy, folder)
    stored = load_file(folder / OPTIMIZER)
    with readable(repr(str(folder / OPTIMIZER))):
        for name, parameter in policy.trainable() if stored else ():  # nothing, where every step was left out
            moments = {key: stored[f"{name}/{key}"].to(parameter.device) for key in ("exp_avg", "exp_avg_sq")}
            optimizer.state[parameter] = {"step": stored[f"{name}/step"]} | moments
    if skipped:
        LOG.warning("the run resumes from step %d, as %s", step, "; ".join(skipped))
        for newer in [other for other in steps_in(folder.parent) if other > step]:
            aside = folder.with_name(f"skipped_{newer:05d}")
            shutil.rmtree(aside, ignore_errors=True)
            os.replace(step_file(folder.parent, newer, ""), aside)
    return step, read_object(folder / METHOD_STATE)


def resume(
    config: RunConfig, policy: Policy, optimizer: torch.optim.Optimizer
) -> tuple[int, dict[str, float], list[dict[str, Any]], list[dict[str, Any]]]:
    """Step, method's state, metrics and evaluations that a run goes on from, in its folder.

    What was written after the last whole checkpoint is dropped, to be written again. ConfigError as ``check_run_dir``.
    """
    run_dir = Path(config.run_dir)
    check_run_dir(config)  # again: loading took a while
    if not (run_dir / "config.json").exists():
        config.save(run_dir / "config.json")
    path, about = run_dir / "policy.json", json.dumps(policy.abilities(), indent=2) + "\n"
    if not path.exists() or path.read_bytes() != about.encode():  # ranks and resumed runs leave it
        write_whole(path, about)
    step, state = load_checkpoint(run_dir, policy, optimizer)
    return step, state, *(keep_lines(run_dir / name, step) for name in ("metrics.jsonl", "evaluations.jsonl"))


def keep_lines(path: Path, last_step: int) -> list[dict[str, Any]]:
    """Drop what steps after ``last_step`` left in a JSON-lines file and its folder; return the lines that stay."""
    for step in steps_in(path.parent / path.stem):
        if step > last_step:
            step_file(path.parent / path.stem, step).unlink(missing_ok=True)
    if not path.exists():
        return []
    lines = list({r["step"]: r for r in read_lines(path).records if r["step"] <= last_step}.values())
    content = "".join(json.dumps(r) + "\n" for r in lines)
    if path.read_bytes() != content.encode():
        write_whole(path, content)
    return lines


def repair(run_dir: str | Path) -> list[str]:
    """Mend damaged metrics and evaluations, so that a run resumes from its newest checkpoint; what was done.

    A lost line of metrics becomes one that says ``lost``; one of evaluations is made anew from its generations.
    """
    run_dir, done = Path(run_dir), []
    saved = max(steps_in(run_dir / "checkpoints"), default=0)
    with Owner(run_dir):
        for path in (run_dir / "metrics.jsonl", run_dir / "evaluations.jsonl"):
            if not (lines := read_lines(path)).fault:
                continue
            found = {record["step"]: record for record in lines.records}
            if path.stem == "metrics":
                lost = {step: {"step": step, "seconds": 0.0, "lost": 1} for step in range(1, saved + 1)}
            else:
                stored = {s: read_table(step_file(run_dir / path.stem, s)) for s in steps_in(run_dir / path.stem)}
                lost = {step: {"step": step, **summarise_sets(rows.to_pandas())} for step, rows in stored.items()}
            lost = {step: record for step, record in lost.items() if step not in found}
            write_whole(path, "".join(json.dumps(r) + "\n" for _, r in sorted((found | lost).items())))
            done.append(f"{lines.fault}; mended, lines made anew: {sorted(lost) or 'none'}")
    return done


def write_problem(run_dir: Path, error: Exception) -> str:
    """Why a run folder could not be written, and what to do: the beginning of a sentence."""
    full = [errno.ENOSPC, getattr(errno, "EDQUOT", errno.ENOSPC)]  # Windows has no EDQUOT
    # safetensors passes the system's error on as text only.
    if getattr(error, "errno", None) in full or f"os error {errno.ENOSPC}" in str(error):
        return f"no space left for {str(run_dir)!r}; free some"
    if not (run_dir / "config.json").exists():
        return f"{str(run_dir)!r} has vanished ({error}); bring it back"
    return f"{str(run_dir)!r} cannot be written ({error}); mend that"
