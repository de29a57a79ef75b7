"""Live progress: the bar's numbers, and TensorBoard, wandb or trackio through Accelerate."""

from __future__ import annotations

import dataclasses
import logging
import sys
from collections.abc import Mapping, Sequence
from typing import Any

from tqdm.auto import tqdm

from ..config import RunConfig
from .records import StepRecord

LOG = logging.getLogger(__name__)


class Tracker:
    """Sends every record to a tracker; does nothing with "none"."""

    def __init__(self, name: str, config: RunConfig, device: str) -> None:
        self._accelerator = None
        if name == "none":
            return
        from accelerate import Accelerator

        self._accelerator = Accelerator(log_with=name, project_dir=config.run_dir, cpu=device == "cpu")
        settings = {k: v for k, v in config.to_dict().items() if v is not None}
        self._accelerator.init_trackers("covrl_lab", config=settings)

    def log(self, record: StepRecord) -> None:
        if self._accelerator is not None:
            values = {k: v for k, v in dataclasses.asdict(record).items() if v is not None}
            self._accelerator.log(values, step=record.step)

    def end(self) -> None:
        if self._accelerator is not None:
            for tracker in self._accelerator.trackers:  # end_training would end the process group, too
                tracker.finish()


def bar_values(record: StepRecord, evaluations: Sequence[Mapping[str, Any]]) -> dict[str, str]:
    """What the progress bar shows: the record's numbers, and the latest of ``evaluations``."""
    last = evaluations[-1] if evaluations else {}
    shown = {"prior": record.reward_prior, "posterior": record.reward_posterior, "kl": record.kl}
    shown |= {"finished": record.finished_share, "accuracy": last.get("accuracy")}
    # In nats; where answers have no scorer, the first says more than the accuracy does.
    shown |= {"answer": last.get("bound_k", last.get("answer_logprob")), "trace use": last.get("trace_dependence")}
    return {name: f"{value:.2f}" for name, value in shown.items() if value is not None}


def announce(alarms: Mapping[str, str], said: set[str], step: int, bar: tqdm) -> None:
    """Say each kind of alarm once, in the log and above the progress bar; ``said`` holds those that were."""
    for kind, alarm in alarms.items():
        if kind not in said:
            said.add(kind)
            LOG.warning("step %d: %s", step, alarm)
            if not bar.disable:
                bar.write(f"step {step}: {alarm}", file=sys.stderr)
