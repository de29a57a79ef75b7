"""Runs side by side: settings, curves, final accuracy with intervals, differences. No model, no torch.

A *method* is what runs have in common but for seed, task and evaluation: a label and its run folders. The score of a
run is its greedy held-out accuracy after its last evaluation. Conventions are those of Agarwal et al. 2021
(arXiv 2108.13264): interquartile means over runs and tasks, bootstrap intervals stratified by task, and the average
probability of improvement.

A bootstrap over n runs cannot know of scores beyond the lowest and the highest: over three seeds a 95%
interval goes from the one to the other, and holds the median of further runs in 75% of cases only.
"""

import glob
import itertools
import os
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from ..config import RunConfig
from ..types import ConfigError, did_you_mean
from .folder import Run, load_run, steps_in
from .stats import TAILS, interquartile_mean, share_interval

OVER = ("seeds", "questions", "both")
TASK_SETTINGS = "task difficulty question_column answer_column trace_column dataset_config dataset_split".split()
# What runs of one method may differ in: the numbers change, the method does not.
WITHIN = ("seed", "device", "eval_every", "eval_questions", "eval_samples", *TASK_SETTINGS)

Methods = Mapping[str, list[Run]]
# task, in alphabetical order -> (seeds, questions) scores; NaN where a run was not asked a question.
Tables = Mapping[str, pd.DataFrame]


# --- which runs, and what tells them apart


def find_runs(patterns: str) -> dict[str, list[Run]]:
    """Run folders by the label of their method.

    patterns are folders separated by commas, with the wildcards of a shell, relative to the working folder or to
    ``notebooks/`` in it. ``NAME: PATTERN`` names a method; without a name, the label is the settings that differ
    between methods. ConfigError where that finds no run, or is ambiguous.
    """
    named: dict[str, dict[Path, Run]] = {}
    for entry in filter(None, map(str.strip, patterns.split(","))):
        *name, pattern = map(str.strip, entry.split(": ", 1))
        named.setdefault("".join(name), {}).update((run.path.resolve(), run) for run in _matches(pattern))
    runs = [run for found in named.values() for run in found.values()]
    if not runs:
        raise ConfigError(f"{patterns!r} names no run folder; separate patterns with commas")
    labels = dict(zip([run.path for run in runs], _labels(runs), strict=True))
    methods: dict[str, list[Run]] = {}
    for name, found in named.items():
        own = list(dict.fromkeys(labels[run.path] for run in found.values()))
        if name and len(own) > 1:
            raise ConfigError(f"the runs named {name!r} are {len(own)} methods ({'; '.join(own)}); name each")
        for run in found.values():
            methods.setdefault(name or labels[run.path], []).append(run)
    seen: dict[tuple[str, str, int], Run] = {}
    for label, run, config in _each(methods):
        task, seed = _task(config), config.seed
        if (other := seen.setdefault((label, task, seed), run)) is not run:
            raise ConfigError(f"{other.path} and {run.path} are both {label!r}, {task}, seed {seed}; leave one out")
    return methods


def _matches(pattern: str) -> list[Run]:
    """The run folders that a pattern names, in the order of their names."""
    for base in (Path(), Path("notebooks")):
        found = sorted(glob.glob(str(base / pattern), recursive=True), key=_natural)
        runs = [load_run(path) for path in found if os.path.isfile(os.path.join(path, "config.json"))]
        if runs:
            return runs
    raise ConfigError(f"no run folder matches {pattern!r}; a run folder is one with a config.json")


def _natural(path: str) -> list[Any]:
    """Sorts seed 10 after seed 9."""
    return [int(part) if part.isdecimal() else part for part in re.split(r"(\d+)", path)]


def _each(methods: Methods) -> Iterator[tuple[str, Run, RunConfig]]:
    """Every run with the label of its method and its settings."""
    return ((label, run, RunConfig.load(run.path / "config.json")) for label, runs in methods.items() for run in runs)


def _task(config: RunConfig) -> str:
    """A task's name: where its questions come from, without the settings that are not set."""
    parts = {name: value for name in TASK_SETTINGS if (value := getattr(config, name)) is not None}
    return ", ".join(str(v) if name == "task" else f"{name} {v}" for name, v in parts.items())


def _varying(configs: list[RunConfig]) -> list[str]:
    """Settings that change the numbers and differ between runs, in the order of ``RunConfig``."""
    different = set().union(*(configs[0].differences(other) for other in configs[1:]))
    return [name for name in configs[0].to_dict() if name in different]


def _distinct(settings: list[dict[str, Any]], names: list[str]) -> int:
    return len({tuple(s[name] for name in names) for s in settings})


def _labels(runs: list[Run]) -> list[str]:
    """One label a run: its method and the fewest settings that tell that method's runs apart.

    "…" stands for others that differ between the runs and are not the method's own default. "all runs" where
    nothing differs.
    """
    configs = [config for *_, config in _each({"": runs})]
    varying = [name for name in _varying(configs) if name not in WITHIN]
    settings = [config.to_dict() for config in configs]
    shown: dict[str, list[str]] = {}  # method -> settings that tell its runs apart
    for method in {s["method"] for s in settings}:
        own = [s for s in settings if s["method"] == method]
        shown[method] = names = []
        for name in varying:
            if _distinct(own, [*names, name]) > _distinct(own, names):
                names.append(name)
    labels = []
    for s in settings:
        names, usual = shown[s["method"]], RunConfig(method=s["method"]).to_dict()
        hidden = set(varying) - {"method", *names}
        parts = [s["method"]] if "method" in varying else []
        parts += [f"{name} {s[name]}" for name in names]
        parts += ["…"] if any(s[name] != usual[name] for name in hidden) else []
        labels.append(", ".join(parts) or "all runs")
    return labels


def listed(methods: Methods) -> str:
    """A line a method: its run folders, and behind each the names of its alarms."""

    def named(run: Run) -> str:
        kinds = ", ".join(run.forgiving().alarms)
        return run.path.name + (f" (⚠ {kinds})" if kinds else "")

    return "\n".join(f"{label}: {', '.join(map(named, runs))}" for label, runs in methods.items())


def differences(methods: Methods) -> pd.DataFrame:
    """Settings that differ, one row each; a column a run, under (method, run folder)."""
    found = list(_each(methods))
    names = _varying([config for *_, config in found])
    columns = pd.MultiIndex.from_tuples([(label, run.path.name) for label, run, _ in found], names=["method", "run"])
    rows = [[getattr(config, name) for *_, config in found] for name in names]
    return pd.DataFrame(rows, pd.Index(names, name="setting"), columns, dtype=object)


# --- scores


def curves(methods: Methods) -> dict[str, dict[str, pd.DataFrame]]:
    """task -> label -> evaluations with a column ``seed``: what a plot of learning curves needs."""
    found: dict[str, dict[str, list[pd.DataFrame]]] = {}
    for label, run, config in _each(methods):
        own = run.evaluations.assign(seed=config.seed)
        found.setdefault(_task(config), {}).setdefault(label, []).append(own)
    return {task: {k: pd.concat(v) for k, v in own.items()} for task, own in found.items()}


def scores(methods: Methods, step: int | None = None) -> pd.DataFrame:
    """One row a run and held-out question: method, task, seed, step, example_id, score (0 to 1, greedy), trace_use.

    From the evaluation after ``step``, or each run's last. ConfigError where a run has none. trace_use is the run's:
    nats by which log p(y|x,z) moves when the trace is exchanged for another question's, NaN where not measured.
    """
    frames = []
    for label, run, config in _each(methods):
        steps = steps_in(run.path / "evaluations")
        told = {line["step"]: line for line in run.lines("evaluations.jsonl")}
        last = max(told, default=steps[-1]) if step is None and steps else step
        if last not in steps:
            wanted = "any step" if last is None else f"step {last} (step_{last:05d}.parquet)"
            raise ConfigError(f"{run.path} has no evaluation of {wanted}; leave it out or resume it")
        found = run.predictions(last).query("sample < 0")
        task = found.get("set", _task(config))  # each of several sets counts as a task
        line = told.get(last, {})
        names = [f"{name}/trace_dependence" for name in found.get("set", [""] * len(found))]
        used = np.array([line.get(name, line.get("trace_dependence")) for name in names], float)
        frames.append(found.assign(method=label, task=task, seed=config.seed, step=last, trace_use=used))
    columns = ["method", "task", "seed", "step", "example_id", "score", "trace_use"]
    return pd.concat(frames, ignore_index=True)[columns]


def _tables(frame: pd.DataFrame) -> dict[str, Tables]:
    """Scores of each method, in the order of the frame."""
    found: dict[str, dict[str, pd.DataFrame]] = {method: {} for method in frame["method"].unique()}
    for (method, task), own in frame.groupby(["method", "task"]):
        if own.duplicated(["seed", "example_id"]).any():
            problem = f"two runs of {method!r} with one seed answered the same questions of {task}"
            raise ConfigError(f"{problem}; name them apart as in 'NAME: PATTERN', or leave one out")
        found[method][task] = own.pivot(index="seed", columns="example_id", values="score")
    return found


@dataclass(frozen=True)
class Resampling:
    """How 95% bootstrap intervals are made. ConfigError for a setting that cannot work.

    What a resample draws anew is ``over``: "seeds", the runs of each task; "questions", the held-out questions of each
    task, the same for all its runs; "both" at once, independently, which is the widest.
    """

    over: str = "both"
    resamples: int = 10_000

    def __post_init__(self) -> None:
        if self.over not in OVER:
            raise ConfigError(f"unknown over {self.over!r}{did_you_mean(self.over, OVER)}")
        if self.resamples < 1:
            raise ConfigError(f"resamples must be 1 or more, not {self.resamples!r}")

    def interval(self, statistic: Callable[..., np.ndarray], *methods: Tables):
        """(low, high) of a statistic of one or two methods' tables; NaN over the seeds of single runs."""
        if self.over == "seeds" and all(len(table) == 1 for part in methods for table in part.values()):
            return float("nan"), float("nan")
        values = statistic(*(self._draws(tables, stream) for stream, tables in enumerate(methods)))
        low, high = np.quantile(values, TAILS)
        return float(low), float(high)

    def _draws(self, tables: Tables, stream: int) -> list[np.ndarray]:
        """(resamples, runs) scores of the runs of each task in each resample.

        The questions of a resample depend on the task alone, so that methods are compared on the same ones;
        its runs also on ``stream``.
        """
        drawn = []
        for k, (task, table) in enumerate(tables.items()):
            runs, questions = table.shape
            if self.over == "seeds":
                means = np.tile(table.mean(axis=1).to_numpy(), (self.resamples, 1))
            elif table.isna().any(axis=None):
                problem = f"the runs on {task} were asked different held-out questions"
                raise ConfigError(f"{problem}, which cannot be drawn together; use over='seeds'")
            else:
                means = _question_counts(k, questions, self.resamples) @ table.to_numpy().T / questions
            if self.over != "questions":
                chosen = np.random.default_rng([0, k, 1, stream]).integers(runs, size=(self.resamples, runs))
                means = np.take_along_axis(means, chosen, axis=1)
            drawn.append(means)
        return drawn


@lru_cache(maxsize=16)
def _question_counts(task: int, questions: int, resamples: int) -> np.ndarray:
    """(resamples, questions) how often each question is in each resample of a task, for whatever runs."""
    random = np.random.default_rng([0, task, 0])
    return random.multinomial(questions, np.full(questions, 1 / questions), resamples).astype(np.uint16)


RESAMPLING = Resampling()


def _observed(tables: Tables) -> list[np.ndarray]:
    """(runs,) scores of the runs of each task."""
    return [table.mean(axis=1).to_numpy() for table in tables.values()]


def _mean(per_task: list[np.ndarray]) -> np.ndarray:
    """Mean over tasks of the mean over runs (the last axis)."""
    return np.mean([runs.mean(-1) for runs in per_task], axis=0)


def _iqm(per_task: list[np.ndarray]) -> np.ndarray:
    """Interquartile mean over all runs of all tasks."""
    return interquartile_mean(np.concatenate(per_task, axis=-1))


def _improvement(x: list[np.ndarray], y: list[np.ndarray]) -> np.ndarray:
    """Mean over tasks of P(X > Y) + P(X = Y) / 2 for a run X of one method and a run Y of the other."""
    signs = [np.sign(a[..., :, None] - b[..., None, :]) for a, b in zip(x, y, strict=True)]
    return np.mean([(1 + sign.mean((-2, -1))) / 2 for sign in signs], axis=0)


def performance(frame: pd.DataFrame, resampling: Resampling = RESAMPLING) -> pd.DataFrame:
    """Final accuracy: a row a method over all its tasks, then a row each task where there are several.

    frame is that of ``scores``. Columns: method, task, runs, questions (distinct), step (its range), iqm, iqm_low,
    iqm_high, mean, mean_low, mean_high, lowest and highest run, and where it is known trace_use, its mean over runs in
    nats. The bounds are NaN over the seeds of a single run, and Wilson's over the questions where all answers are right
    or all wrong, which a bootstrap cannot see beyond.
    """
    rows = []
    for label, tables in _tables(frame).items():
        own = frame[frame["method"] == label]
        parts = {"all tasks": tables} if len(tables) > 1 else {}
        parts |= {task: {task: table} for task, table in tables.items()}
        for name, part in parts.items():
            mine = own[own["task"].isin(list(part))]
            steps, runs = mine["step"], np.concatenate(_observed(part))
            questions = sum(table.shape[1] for table in part.values())
            reached = " to ".join(str(s) for s in sorted({steps.min(), steps.max()}))
            row = {"method": label, "task": name, "runs": len(runs), "questions": questions, "step": reached}
            for column, statistic in (("iqm", _iqm), ("mean", _mean)):
                value = float(statistic(_observed(part)))
                low, high = resampling.interval(statistic, part)
                if resampling.over != "seeds" and runs.mean() in (0, 1):
                    _, low, high = share_interval(value * questions, questions)
                row |= {column: value, f"{column}_low": low, f"{column}_high": high}
            row |= {"lowest": float(runs.min()), "highest": float(runs.max())}
            if "trace_use" in frame and frame["trace_use"].notna().any():
                row["trace_use"] = mine.drop_duplicates(["task", "seed"])["trace_use"].mean()
            rows.append(row)
    return pd.DataFrame(rows)


def _pairs(frame: pd.DataFrame, reference: str) -> list[tuple[str, str, Tables, Tables]]:
    """Methods to compare: each with the reference, or all with all. Both must have the same tasks."""
    tables = _tables(frame)
    if reference and reference not in tables:
        raise ConfigError(f"unknown method {reference!r}{did_you_mean(reference, tables)}")
    against = [(label, reference) for label in tables if label != reference]
    pairs = against if reference else list(itertools.combinations(tables, 2))
    for x, y in pairs:
        if tables[x].keys() != tables[y].keys():
            tasks = "; ".join(", ".join(tables[label]) for label in (x, y))
            raise ConfigError(f"{x!r} and {y!r} have different tasks ({tasks}) and cannot be compared")
    return [(x, y, tables[x], tables[y]) for x, y in pairs]


def paired_differences(frame: pd.DataFrame, reference: str = "", resampling: Resampling = RESAMPLING) -> pd.DataFrame:
    """Accuracy of one method minus another's, paired by task, seed and question; a row a pair.

    All pairs, or each method against ``reference``. Columns: method, minus, difference (mean over tasks of
    the mean over pairs), low, high, seeds (pairs of runs), questions, by_seed (list; the mean over tasks).
    The bounds are NaN over a single pair of seeds; where no answer differs, they are the largest share of
    answers that could (Wilson's for none), to either side. ConfigError where two methods share no seed, or
    were asked different held-out questions.
    """
    rows = []
    for x, y, mine, other in _pairs(frame, reference):
        gain = {}
        for task, table in mine.items():
            if set(table.columns) != set(other[task].columns):
                problem = f"{x!r} and {y!r} were asked different held-out questions of {task}"
                raise ConfigError(f"{problem}; pairs need the same task settings and eval_questions")
            shared = table.index.intersection(other[task].index)
            if not len(shared):
                seeds = [", ".join(map(str, t.index)) for t in (table, other[task])]
                raise ConfigError(f"{x!r} (seeds {seeds[0]}) and {y!r} (seeds {seeds[1]}) share no seed on {task}")
            gain[task] = table.loc[shared] - other[task].loc[shared, table.columns]
        questions = sum(table.shape[1] for table in gain.values())
        low, high = resampling.interval(_mean, gain)
        if resampling.over != "seeds" and not any(table.to_numpy().any() for table in gain.values()):
            high = share_interval(0, questions)[2]
            low = -high
        by_seed = pd.concat([table.mean(axis=1) for table in gain.values()], axis=1).mean(axis=1)
        mean = float(_mean(_observed(gain)))
        rows.append((x, y, mean, low, high, len(by_seed), questions, by_seed.tolist()))
    columns = ["method", "minus", "difference", "low", "high", "seeds", "questions", "by_seed"]
    return pd.DataFrame(rows, columns=columns)


def probability_of_improvement(
    frame: pd.DataFrame, reference: str = "", resampling: Resampling = RESAMPLING
) -> pd.DataFrame:
    """How probably a run of one method beats a run of another on a task; a row a pair.

    The mean over tasks of P(X > Y) + P(X = Y) / 2, which is Mann-Whitney's U over the number of pairs: it
    says how often, not by how much. Columns: method, against, probability, low, high.
    """
    rows = []
    for x, y, *tables in _pairs(frame, reference):
        value = float(_improvement(*map(_observed, tables)))
        rows.append((x, y, value, *resampling.interval(_improvement, *tables)))
    return pd.DataFrame(rows, columns=["method", "against", "probability", "low", "high"])


def over_seeds(frame: pd.DataFrame, value: str) -> pd.DataFrame:
    """Mean of ``value`` by method and alpha, with its 95% bootstrap interval over seeds; one run gives a point.

    Columns: method, alpha, runs, mean, low, high. Two or three runs give an interval from the lowest to the highest.
    """
    resampling, rows = Resampling("seeds"), []
    for (method, alpha), group in frame.dropna(subset=[value]).groupby(["method", "alpha"], sort=True):
        scores = group[[value]].astype(float)
        mean = float(scores[value].mean())
        low, high = resampling.interval(_mean, {"": scores}) if len(scores) > 1 else (mean, mean)
        rows.append((method, alpha, len(group), mean, low, high))
    return pd.DataFrame(rows, columns=["method", "alpha", "runs", "mean", "low", "high"])
