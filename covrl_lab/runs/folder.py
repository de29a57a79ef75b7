"""Run folders read into data frames; no torch, no model. CONTRIBUTING.md lists the files of a run folder."""

from __future__ import annotations

import json
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq

from ..files import write_whole
from ..types import ConfigError
from .alarms import alarms

TRACE_COLUMNS = """
step rollout example_id question answer source finished trace tokens token_ids logp logq answer_logp log_ratio
reward advantage answer_weight posterior_advantage no_trace_logp prediction right
""".split()
CACHE = "traces_cache.parquet"  # beside traces/, whose time says when the run last wrote; safe to delete
CACHE_FROM = 500  # files; a run of fewer is read soon enough without


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


def _read(file: Path, columns: Sequence[str] | None = None) -> pa.Table:
    """A small Parquet file, or those of its columns that it has; ``pd.read_parquet`` takes five times as long."""
    return pq.ParquetFile(file, pre_buffer=False).read(columns, use_threads=False).replace_schema_metadata()


def _cached(path: Path, about: dict[str, Any]) -> tuple[list[pa.Table], int]:
    """([rows], of how many files they are) that ``trace_columns`` kept; nothing where one has changed since."""
    try:
        table = pq.ParquetFile(path).read()
        known = json.loads(table.schema.metadata[b"covrl_lab"])
        count = len(known["files"])
    except (OSError, ValueError, KeyError, TypeError):  # none, or not ours
        return [], 0
    same = known == about | {"files": about["files"][:count]}
    return ([table.replace_schema_metadata()], count) if same else ([], 0)


@dataclass(frozen=True)
class Run:
    """A run folder: running, finished, or somebody else's."""

    path: Path

    @property
    def config(self) -> dict[str, Any]:
        """Settings by name."""
        return json.loads((self.path / "config.json").read_text(encoding="utf-8"))

    @property
    def foreign(self) -> str:
        """Why ``config.json`` is not one of ours, in a sentence; empty where it is."""
        config, where = self.config, str(self.path.absolute())
        known = isinstance(config, dict) and {"method", "steps"} <= set(config)
        return "" if known else f"{where!r} is not a run of covrl_lab: its config.json has no method or no steps"

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
        return pa.concat_tables(map(_read, files), promote_options="permissive").to_pandas()

    def trace_columns(self, columns: Sequence[str]) -> pd.DataFrame:
        """Some columns of ``traces()``, all steps; empty where a step's file lacks one.

        A run of many files keeps what was read in one more, ``CACHE``, and reads only later files again.
        """
        files = [step_file(self.path / "traces", step) for step in self.steps]
        about = {"columns": list(columns), "files": [[file.name, file.stat().st_mtime_ns] for file in files]}
        many, cache = len(files) >= CACHE_FROM, self.path / CACHE
        tables, count = _cached(cache, about) if many else ([], 0)
        tables += [_read(file, columns) for file in files[count:]]
        if not tables:
            return pd.DataFrame(columns=columns)
        table = pa.concat_tables(tables, promote_options="permissive")
        if many and count < 0.98 * len(files):  # a growing run does not write it anew each time
            sink = pa.BufferOutputStream()
            pq.write_table(table.replace_schema_metadata({"covrl_lab": json.dumps(about)}), sink)
            with suppress(OSError):  # somebody else's folder
                write_whole(cache, sink.getvalue().to_pybytes())
        return table.to_pandas().reindex(columns=columns)

    def predictions(self, step: int) -> pd.DataFrame:
        """One row a held-out generation of the evaluation after ``step``; see ``evaluation.evaluate``."""
        return pd.read_parquet(step_file(self.path / "evaluations", step))


def load_run(path: str | Path) -> Run:
    """Open a run folder. ConfigError where there is none."""
    path = Path(path)
    if not (path / "config.json").is_file():
        raise ConfigError(f"{str(path)!r} is not a run folder (it has no config.json); check the path")
    return Run(path)
