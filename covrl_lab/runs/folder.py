"""Run folders read into data frames; no torch, no model. CONTRIBUTING.md lists the files of a run folder."""

import json
import os
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple, Self

import pandas as pd
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from ..files import read_object, readable, write_whole
from ..types import ConfigError
from .alarms import alarms

# Of ``Run.traces``; the last are of later versions.
TRACE_COLUMNS = {
    "step": "training step, from 1",
    "rollout": "number of the trace within its step, from 0",
    "example_id": "of the question",
    "question": "question x",
    "answer": "reference answer y",
    "source": "prompt that drew the trace: prior (shows x) or posterior (shows x and y)",
    "finished": "whether the trace ended within the limit",
    "trace": "reasoning trace z",
    "tokens": "text of each token of the trace",
    "token_ids": "id of each token of the trace",
    "logp": "log-probability of each token after the prior prompt, nats",
    "logq": "log-probability of each token after the posterior prompt, nats; null where it was not needed",
    "answer_logp": "log-probability of each token of y after x and z, nats",
    "log_ratio": "log p'/h of each token, trained composite over sampling mixture, before the update, nats",
    "reward": "the method's reward, in nats or a probability",
    "advantage": "factor of the trace's policy-gradient term",
    "answer_weight": "factor of the answer's log-likelihood term",
    "posterior_advantage": "factor of the trace's log q term; NaN where the method has none",
    "no_trace_logp": "log-probability of y without a trace, nats; NaN where the method has none",
    "prediction": "the model's own greedy answer after the trace; null without a verifier",
    "right": "whether that answer earned full marks; null without a verifier",
    "answer_tokens": "text of each token of y, as in answer_logp",
}
CACHE = "traces_cache.parquet"  # beside traces/, whose time says when the run last wrote; safe to delete
SHARED = "covrl_lab.json"  # of an adapter that ``covrl-lab share`` wrote: its step, settings and versions
# Where runs are looked for: here, from a notebook's folder, and where notebooks of earlier versions wrote theirs.
FOLDERS = ("runs", "../runs", "notebooks/runs")
CACHE_FROM = 500  # files; a run of fewer is read soon enough without
# What a list of all traces shows of each.
INDEX_COLUMNS = """
step rollout example_id question answer source trace finished reward advantage right prediction length answer_logp
""".split()
# What no line may lack, and no table that a view draws: older versions lack other columns.
_IN_LINES = {"metrics": ["step", "seconds"], "evaluations": "step accuracy accuracy_low accuracy_high".split()}
_IN_TABLES = {"traces": list(TRACE_COLUMNS)[:17]}
_IN_TABLES["evaluations"] = "example_id sample question answer prediction score finished trace trace_tokens".split()


def step_file(folder: Path, step: int, suffix: str = ".parquet") -> Path:
    """``folder/step_00012.parquet``."""
    return folder / f"step_{step:05d}{suffix}"


def steps_in(folder: Path) -> list[int]:
    """The steps that ``folder`` holds whole files or folders of, in order."""
    names = (p.name.split(".")[0].removeprefix("step_") for p in folder.glob("step_*") if ".tmp" not in p.name)
    return sorted(int(n) for n in names if n.isascii() and n.isdigit())


def write_parquet(frame: pd.DataFrame, path: Path) -> None:
    """Write a Parquet file, which nobody ever sees half-written, and its folder, but not the run's."""
    path.parent.mkdir(exist_ok=True)
    write_whole(path, frame.to_parquet(index=False, write_page_checksum=True))


def read_table(path: Path, columns: Sequence[str] | None = None) -> pa.Table:
    """A Parquet file, or those of its columns that it has. ConfigError where it is damaged.

    A column "length" is how many ``token_ids`` each row has.
    """
    counted = "length" in (columns or ())
    remedy = "restore it, or delete it to do without that step"
    # Most are small: ``pd.read_parquet`` takes five times as long.
    with readable(repr(str(path)), remedy), pq.ParquetFile(path, page_checksum_verification=True) as file:
        wanted = [*columns, "token_ids"] if counted else columns
        table = file.read(wanted, use_threads=False).replace_schema_metadata()  # pandas' own may be damaged
        table.validate(full=True)
        if counted and (place := table.schema.get_field_index("token_ids")) >= 0:
            table = table.set_column(place, "length", pc.list_value_length(table["token_ids"]))
        return table


class Lines(NamedTuple):
    """What ``metrics.jsonl`` or ``evaluations.jsonl`` holds."""

    records: list[dict[str, Any]]  # of every line that can be read
    reach: int  # the last step before the first fault
    fault: str  # a sentence about it; empty where there is none


def _record(line: bytes, needed: Sequence[str]) -> dict[str, Any] | None:
    """What a line holds; None where it is no object of numbers with these names."""
    with suppress(LookupError, TypeError, AttributeError, ValueError, RecursionError):
        record = json.loads(line)
        values = [record[name] for name in needed] + [v for v in record.values() if v is not None]
        return record if all(isinstance(value, int | float) for value in values) else None


def read_lines(path: Path) -> Lines:
    """Read and check ``metrics.jsonl`` or ``evaluations.jsonl``; what is not there has no lines.

    A last line that is still being written is left out. Faults are a line that cannot be read or is out of order,
    and a missing one: of a step before the newest checkpoint, or of an evaluation whose generations are stored.
    """
    saved = max(steps_in(path.parent / "checkpoints"), default=0)  # read first: a run writes its lines before
    stored, metrics, content = steps_in(path.parent / path.stem), path.stem == "metrics", b""
    with readable(repr(str(path))), suppress(FileNotFoundError):
        content = path.read_bytes()
    records = [_record(line, _IN_LINES[path.stem]) for line in content.split(b"\n")[:-1]]
    reach, fault = 0, ""
    for number, record in enumerate(records, start=1):
        step = record and record["step"]
        if record is None or (step != reach + 1 if metrics else step < reach):
            fault = f"line {number} " + ("cannot be read" if not record else f"is of step {step}, after step {reach}")
            break
        reach = step
    else:
        expected = range(1, saved + 1) if metrics else [step for step in stored if step <= max(saved, reach)]
        if missing := sorted(set(expected) - {record["step"] for record in records}):
            fault, reach = f"there is no line of step {missing[0]}", missing[0] - 1
    return Lines([r for r in records if r], reach, fault and f"{str(path)!r} is damaged: {fault}")


def _cached(path: Path, about: dict[str, Any]) -> tuple[list[pa.Table], int]:
    """([rows], of how many files they are) that ``trace_columns`` kept; nothing where one has changed since."""
    with suppress(OSError, ValueError, KeyError, TypeError):  # none, damaged, or not ours
        known = json.loads(pq.read_schema(path).metadata[b"covrl_lab"])
        count = len(known["files"])
        if known == about | {"files": about["files"][:count]}:
            return [read_table(path)], count
    return [], 0


def by_set(evaluations: pd.DataFrame) -> dict[str, pd.DataFrame]:
    """``Run.evaluations`` by evaluation set, with the columns of a lone one; first "", the averages over sets.

    Only those where there are fewer than two sets.
    """
    names = dict.fromkeys(["", *(column.rpartition("/")[0] for column in evaluations)])
    if len(names) < 3:
        return {"": evaluations}
    columns = {name: [c for c in evaluations if c.rpartition("/")[0] == name] for name in names}
    found = {name: evaluations[own].rename(columns=lambda c: c.rpartition("/")[2]) for name, own in columns.items()}
    return {name: frame.assign(step=evaluations["step"]) for name, frame in found.items()}


def steps_done(folder: Path) -> int:
    """How many steps a run folder has metrics of."""
    return len(read_lines(folder / "metrics.jsonl").records)


@dataclass(frozen=True)
class Run:
    """A run folder: running, finished, or somebody else's."""

    path: Path
    # What is wrong with files that were read, a sentence by file, of ``forgiving``; None: it raises a ConfigError.
    damage: dict[str, str] | None = field(default=None, compare=False)
    _lines: dict[str, Lines] = field(default_factory=dict, compare=False, repr=False)  # that ``forgiving`` has read

    def forgiving(self) -> Self:
        """The same run for a view: what is damaged is left out, and stands in ``damage`` and ``alarms``."""
        return replace(self, damage={}, _lines={})

    def note(self, name: str, sentence: str) -> None:
        """Take note that a file is damaged."""
        if self.damage is None:
            raise ConfigError(sentence)
        self.damage[name] = sentence

    def lines(self, name: str) -> list[dict[str, Any]]:
        """What ``metrics.jsonl`` or ``evaluations.jsonl`` holds; of ``forgiving``, what it held at the first look."""
        lines = self._lines.get(name) or read_lines(self.path / name)
        if self.damage is not None:
            self._lines[name] = lines
        if lines.fault:
            self.note(name, f"{lines.fault}; restore it, or resume the run, which goes back to a checkpoint before")
        return lines.records

    @property
    def config(self) -> dict[str, Any]:
        """Settings by name. ConfigError where a number that views need is none."""
        settings = read_object(self.path / "config.json")
        for name in "steps eval_every alpha composite_weight clip_range clip_range_high".split():
            if isinstance(settings.get(name), str | list | dict):
                raise ConfigError(f"{str(self.path / 'config.json')!r} has no number for {name!r}; restore it")
        return settings

    @property
    def abilities(self) -> str:
        """How the policy computed, in a line, or why that cannot be read; empty for runs of older versions."""
        path = self.path / "policy.json"
        try:
            found = read_object(path, "restore or delete it") if path.exists() else {}
        except ConfigError as error:
            return str(error)
        return "; ".join(f"{name}: {what}" for name, what in found.items())

    @property
    def foreign(self) -> str:
        """Why ``config.json`` is not one of ours, in a sentence; empty where it is."""
        config, where = self.config, str(self.path.absolute())
        known = None not in (config.get("method"), config.get("steps"))
        return "" if known else f"{where!r} is not a run of covrl_lab: its config.json has no method or no steps"

    @property
    def metrics(self) -> pd.DataFrame:
        """One row a finished step; see ``trainer.StepRecord`` for the columns."""
        return pd.DataFrame(self.lines("metrics.jsonl"))

    @property
    def evaluations(self) -> pd.DataFrame:
        """One row an evaluation: step, accuracy with its interval, ...; see ``evaluation.summarise``."""
        return pd.DataFrame(self.lines("evaluations.jsonl"))

    @property
    def benchmarks(self) -> pd.DataFrame:
        """One row a later evaluation of a checkpoint (``covrl-lab evaluate``): step, settings changed, the summary.

        A last line that is still being written, or was cut short, is left out.
        """
        path, records, content = self.path / "benchmarks.jsonl", [], b""
        with readable(repr(str(path))), suppress(FileNotFoundError):
            content = path.read_bytes()
        for number, line in enumerate(content.split(b"\n")[:-1], start=1):
            try:
                with readable(f"line {number} of {str(path)!r}", "restore it, or delete that line"):
                    records.append({**json.loads(line)})
            except ConfigError as error:
                self.note(path.name, str(error))
        return pd.DataFrame(records)

    @property
    def alarms(self) -> dict[str, str]:
        """Signs that the run goes wrong, a sentence each by kind or file; see ``runs.alarms``."""
        lines = [self.lines(name) for name in ("metrics.jsonl", "evaluations.jsonl")]
        _ = self.steps  # whose files may be missing
        return (self.damage or {}) | alarms(*lines, self.config.get("method", ""))

    @property
    def steps(self) -> list[int]:
        """Steps with stored traces; ``damage`` names missing ones that a checkpoint has passed."""
        # Only where it is noted; and read first, as a run writes its traces before.
        saved = 0 if self.damage is None else max(steps_in(self.path / "checkpoints"), default=0)
        found = steps_in(self.path / "traces")
        if missing := sorted(set(range(1, saved + 1)).difference(found)):
            first, more = repr(str(step_file(self.path / "traces", missing[0]))), len(missing) - 1
            said = f"and {more} more are missing; restore them" if more else "is missing; restore it"
            self.damage["traces"] = f"{first} {said}"
        return found

    @property
    def long(self) -> bool:
        """Whether reading all traces takes a while, so that a view first reads those of the step it shows."""
        return len(self.steps) >= CACHE_FROM

    def _tables(self, kind: str, steps: Sequence[int], columns: Sequence[str] | None = None) -> list[pa.Table]:
        """The traces or evaluations of some steps, a table each as it is stored, or some of their columns."""
        found, needed = [], set(_IN_TABLES[kind]).intersection(columns or _IN_TABLES[kind])
        for file in (step_file(self.path / kind, step) for step in steps):
            try:
                table = read_table(file, columns)
            except ConfigError as error:
                self.note(f"{kind}/{file.name}", str(error))
                continue
            if self.damage is not None and (lacking := needed.difference(table.column_names)):
                problem = f"{str(file)!r} has no column {min(lacking)!r}, which views draw; restore it"
                self.note(f"{kind}/{file.name}", problem)
            else:
                found.append(table)
        return found

    def _joined(self, tables: Sequence[pa.Table]) -> pa.Table:
        with readable(f"the files in {str(self.path / 'traces')!r} together"):  # columns of other kinds
            return pa.concat_tables(tables, promote_options="permissive")

    def traces(self, *steps: int) -> pd.DataFrame:
        """One row a rollout of the given steps (all without arguments); ``TRACE_COLUMNS`` says what is in it."""
        chosen = steps or self.steps
        if missing := [step for step in chosen if not step_file(self.path / "traces", step).exists()]:
            raise ConfigError(f"{self.path} has no traces of step {missing[0]}; it has {self.steps}")
        tables = self._tables("traces", chosen)
        return self._joined(tables).to_pandas() if tables else pd.DataFrame(columns=list(TRACE_COLUMNS))

    def trace_columns(self, columns: Sequence[str] = INDEX_COLUMNS, only: Sequence[int] = ()) -> pd.DataFrame:
        """Some columns of ``traces()``, of all steps or ``only`` these; empty where a step's file lacks one.

        A run of many files keeps what was read in one more, ``CACHE``, and reads only later files again. A trainer does
        so every ``CACHE_FROM`` steps.
        """
        steps = only or self.steps
        files = [step_file(self.path / "traces", step) for step in steps]
        about = {"columns": list(columns), "files": [[file.name, file.stat().st_mtime_ns] for file in files]}
        many, cache = len(files) >= CACHE_FROM and not only, self.path / CACHE
        tables, count = _cached(cache, about) if many else ([], 0)
        tables += self._tables("traces", steps[count:], columns)
        if not tables:
            return pd.DataFrame(columns=columns)
        table = self._joined(tables)
        # Not where a file is damaged; and a growing run does not write it anew each time.
        if many and not self.damage and count < 0.98 * len(files):
            sink = pa.BufferOutputStream()
            kept = table.replace_schema_metadata({"covrl_lab": json.dumps(about)})
            pq.write_table(kept, sink, write_page_checksum=True)
            with suppress(OSError):  # somebody else's folder
                write_whole(cache, sink.getvalue().to_pybytes())
        return table.to_pandas().reindex(columns=columns)

    def predictions(self, step: int) -> pd.DataFrame:
        """One row a held-out generation of the evaluation after ``step``; see ``evaluation.evaluate``."""
        tables = self._tables("evaluations", [step])
        return tables[0].to_pandas() if tables else pd.DataFrame(columns=_IN_TABLES["evaluations"])


def run_folders(folders: Sequence[str | Path] = FOLDERS, depth: int = 3) -> dict[Path, str]:
    """The run folders in ``folders`` and up to ``depth`` folders below them, once each -> their name there."""
    found: dict[Path, tuple[Path, str]] = {}  # by where it really is
    for folder in map(Path, folders):
        for d in range(1, depth + 1):
            for path in (file.parent for file in folder.glob("*/" * d + "config.json")):
                found.setdefault(path.resolve(), (path, path.relative_to(folder).as_posix()))
    return dict(found.values())


def load_run(path: str | Path) -> Run:
    """Open a run folder. ConfigError where there is none."""
    path = Path(path)
    if not os.path.isfile(path / "config.json"):
        raise ConfigError(f"{str(path)!r} is not a run folder (it has no config.json); check the path")
    return Run(path)
