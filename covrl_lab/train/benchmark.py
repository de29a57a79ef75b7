"""Evaluate a stored checkpoint afterwards, without touching the run's own evaluations."""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from ..config import RunConfig
from ..files import append_line
from ..runs.folder import load_run, step_file, write_parquet
from .checkpoints import stored_step
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
    step, stored = stored_step(run, step, untrained=True), RunConfig.load(run.path / "config.json")
    config = RunConfig.from_dict(stored.to_dict() | dict(settings))
    task, prompter = open_task(config)
    _, sets = open_examples(replace(config, bad_rows="skip"), task, prompter, False, context_length(config.model))
    made = fit(config, [prompter(example) for one in sets for example in one.examples], trains=False)
    policy = open_policy(made.config, made=made)
    if step:
        load_adapter(policy, step_file(run.path / "checkpoints", step, ""))
    results, summary = evaluate_sets(policy, prompter, sets, config, progress)
    changed = {name: new for name, (_, new) in stored.differences(config).items()}
    if config.dtype != stored.dtype:  # "auto" names no other run, but what was asked for here is another number
        changed["dtype"] = config.dtype
    name = hashlib.sha256(json.dumps(changed, sort_keys=True).encode()).hexdigest()[:8]
    write_parquet(results, step_file(run.path / "benchmarks", step, f"-{name}.parquet"))
    record, path = {"step": step, "settings": changed, **summary}, run.path / "benchmarks.jsonl"
    append_line(path, record)
    return record, path
