"""Evaluate a stored checkpoint afterwards, without touching the run's own evaluations."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from ..config import RunConfig
from ..files import check_checksums, lock, refuse_links
from ..runs.folder import load_run, step_file, steps_in, write_parquet
from ..types import ConfigError
from .evaluation import evaluate_sets
from .models import context_length
from .opening import open_examples, open_policy, open_task
from .plan import fit
from .policy import load_adapter
from .sharing import fetch


def evaluate_checkpoint(
    run_dir: str | Path, settings: Mapping[str, Any], step: int | None = None, progress: bool = True
) -> tuple[dict[str, Any], Path]:
    """The new line of the run's ``benchmarks.jsonl``, and that file; ``Run.benchmarks`` reads it.

    ``run_dir`` is a run folder or "hub:OWNER/NAME", see ``fetch``; ``settings`` change those of the run; step is that
    of a stored checkpoint, None for the last, 0 for the model before training. The generations go to ``benchmarks/``.
    Raises ConfigError, before a model loads where it can.
    """
    run = load_run(fetch(run_dir))
    if run.foreign:
        raise ConfigError(run.foreign)
    refuse_links(run.path.resolve())
    stored, checkpoints = RunConfig.load(run.path / "config.json"), run.path / "checkpoints"
    config = RunConfig.from_dict(stored.to_dict() | dict(settings))
    steps = [0, *steps_in(checkpoints)]
    step = steps[-1] if step is None else step
    if step not in steps:
        raise ConfigError(f"{str(run.path)!r} has no checkpoint of step {step}; it has {steps[1:]}")
    task, prompter = open_task(config)
    _, sets = open_examples(replace(config, bad_rows="skip"), task, prompter, False, context_length(config.model))
    made = fit(config, [prompter(example) for one in sets for example in one.examples], trains=False)
    policy = open_policy(made.config, made=made)
    if step:
        check_checksums(step_file(checkpoints, step, ""))
        load_adapter(policy, step_file(checkpoints, step, ""))
    results, summary = evaluate_sets(policy, prompter, sets, config, progress)
    changed = {name: new for name, (_, new) in stored.differences(config).items()}
    name = hashlib.sha256(json.dumps(changed, sort_keys=True).encode()).hexdigest()[:8]
    write_parquet(results, step_file(run.path / "benchmarks", step, f"-{name}.parquet"))
    record, path = {"step": step, "settings": changed, **summary}, run.path / "benchmarks.jsonl"
    with path.open("a+b") as file:
        if lock(file) is False:  # two evaluations may end together
            raise ConfigError(f"{str(path)!r} is held by another process; end that, and evaluate again")
        file.seek(0)
        file.truncate(file.read().rfind(b"\n") + 1)  # without a last line that a killed process left unfinished
        file.write(json.dumps(record).encode() + b"\n")
    return record, path
