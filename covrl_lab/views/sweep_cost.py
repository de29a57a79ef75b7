"""What a sweep still costs: the time of what is left, from steps that like runs have taken."""

from __future__ import annotations

from typing import Any

import numpy as np

from ..config import RunConfig
from ..files import read_object
from ..runs.folder import read_lines
from ..runs.sweep import Sweep
from ..runs.worker import ENDS

# Runs that agree in these take about the same time for a step.
STEP_TIME_SETTINGS = """
model quantization dtype device task questions_per_step rollouts_per_question max_trace_tokens
""".split()


def step_time_settings(config: RunConfig) -> tuple[Any, ...]:
    """The settings that decide how long a step takes."""
    return tuple(getattr(config, name) for name in STEP_TIME_SETTINGS)


def measured(sweep: Sweep) -> tuple[float, float, int] | None:
    """(seconds of a step, seconds of a run around its steps, steps seen) of like runs in the sweep's folder.

    Medians; start-up and evaluations are around the steps, 0 until a run has finished. None: no step yet.
    """
    wanted = {step_time_settings(config) for config in sweep.runs.values()}
    seconds, around = [], []
    for path in sweep.folder.glob("*/config.json"):
        if step_time_settings(RunConfig.load(path)) in wanted:
            own = [record["seconds"] for record in read_lines(path.parent / "metrics.jsonl").records]
            seconds += own
            done = path.parent / "done.json"
            if done.exists() and not (ended := read_object(done)).get("first_step"):
                around.append(max(0.0, ended.get("seconds", 0.0) - sum(own)))
    return (float(np.median(seconds)), float(np.median(around or [0.0])), len(seconds)) if seconds else None


def describe_cost(sweep: Sweep, workers: int, step_seconds: float | None = None) -> str:
    """What is left to do and how long it takes, in one sentence that says where the time comes from.

    ``step_seconds`` is an estimate for where no step of such a run has been measured.
    """
    frame = sweep.table()
    left = frame[~frame["status"].isin(ENDS)]
    steps, at_once = int((left["steps"] - left["step"]).sum()), min(workers, len(left))
    text = f"{len(frame)} run{'s' * (len(frame) != 1)}, {len(left)} to do with {steps} steps in all"
    if left.empty:
        return text
    if seen := measured(sweep):
        step, around, count = seen
        source = f"{count} measured steps of {step:.2g} s (median), and {around:.0f} s around them a run"
    elif step_seconds is not None:
        step, around = step_seconds, 0.0
        source = f"an estimated step of {step:.2g} s, start-up and evaluations not counted"
    else:
        return f"{text}; no step of such a run has been measured here yet"
    minutes = (steps * step + len(left) * around) / at_once / 60
    return f"{text}; about {minutes:.1f} minutes with {at_once} at once, from {source}"
