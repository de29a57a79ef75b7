"""Run folders read into data frames; no torch, no model. CONTRIBUTING.md lists the files of a run folder."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd

from ..files import write_whole
from ..types import ConfigError
from .alarms import alarms

TRACE_COLUMNS = """
step rollout example_id question answer source finished trace tokens token_ids logp logq answer_logp log_ratio
reward advantage answer_weight posterior_advantage no_trace_logp prediction right
""".split()


def step_file(folder: Path, step: int, suffix: str = ".parquet") -> Path:
    """``folder/step_00012.parquet``."""
    return folder / f"step_{step:05d}{suffix}"


def steps_in(folder: Path) -> list[int]:
    """The steps that ``folder`` holds whole files or folders of, in order."""
    names = (p.name.split(".")[0].removeprefix("step_") for p in folder.glob("step_*") if ".tmp" not in p.name)
    return sorted(int(n) for n in names if n.isdigit())


def write_parquet(frame: pd.DataFrame, path: Path) -> None:
    """Write a Parquet file, which nobody ever sees half-written, and its folder."""
    path.parent.mkdir(parents=True, exist_ok=True)
    write_whole(path, frame.to_parquet(index=False))


def read_jsonl(path: Path) -> list[dict[str, Any]]:
    """The whole lines of a JSON-lines file; a last line that is still being written is left out."""
    if not path.exists():
        return []
    text = path.read_text(encoding="utf-8")
    return [json.loads(line) for line in text[: text.rfind("\n") + 1].splitlines()]


@dataclass(frozen=True)
class Run:
    """A run folder: running, finished, or somebody else's."""

    path: Path

    @property
    def config(self) -> dict[str, Any]:
        """Settings by name."""
        return json.loads((self.path / "config.json").read_text(encoding="utf-8"))

    @property
    def metrics(self) -> pd.DataFrame:
        """One row a finished step; see ``trainer.StepRecord`` for the columns."""
        return pd.DataFrame(read_jsonl(self.path / "metrics.jsonl"))

    @property
    def evaluations(self) -> pd.DataFrame:
        """One row an evaluation: step, accuracy with its interval, ...; see ``evaluation.summarise``."""
        return pd.DataFrame(read_jsonl(self.path / "evaluations.jsonl"))

    @property
    def alarms(self) -> dict[str, str]:
        """Signs that the run goes wrong, a sentence each by kind; see ``runs.alarms``."""
        lines = (read_jsonl(self.path / name) for name in ("metrics.jsonl", "evaluations.jsonl"))
        return alarms(*lines)

    @property
    def steps(self) -> list[int]:
        """Steps with stored traces."""
        return steps_in(self.path / "traces")

    def traces(self, *steps: int) -> pd.DataFrame:
        """One row a rollout of the given steps (all without arguments), with per-token lists.

        Columns: step, rollout, example_id, question, answer, source, finished, trace, tokens (text),
        token_ids, logp, logq (nats a token), log_ratio (log p'/h a token), answer_logp (nats a token),
        reward, advantage, answer_weight, and, NaN where the method has none, posterior_advantage and
        no_trace_logp (log p(y|x) without a trace, nats), and, None without a verifier, prediction (the model's own
        greedy answer after the trace) and right (whether it earned full marks).
        """
        chosen = steps or self.steps
        files = [step_file(self.path / "traces", step) for step in chosen]
        missing = [step for step, file in zip(chosen, files, strict=True) if not file.exists()]
        if missing:
            raise ConfigError(f"{self.path} has no traces of step {missing[0]}; it has {self.steps}")
        if not files:
            return pd.DataFrame(columns=TRACE_COLUMNS)
        return pd.concat([pd.read_parquet(f) for f in files], ignore_index=True)

    def predictions(self, step: int) -> pd.DataFrame:
        """One row a held-out generation of the evaluation after ``step``; see ``evaluation.evaluate``."""
        return pd.read_parquet(step_file(self.path / "evaluations", step))


def load_run(path: str | Path) -> Run:
    """Open a run folder. ConfigError where there is none."""
    path = Path(path)
    if not (path / "config.json").is_file():
        raise ConfigError(f"{str(path)!r} is not a run folder (it has no config.json); check the path")
    return Run(path)
