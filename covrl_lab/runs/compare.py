"""Runs side by side: settings, curves, final accuracy with intervals, differences. No model, no torch.

A *method* is what runs have in common but for seed, task and evaluation: a label and its run folders. The
score of a run is its greedy held-out accuracy after its last evaluation. Conventions are those of Agarwal
et al. 2021 (arXiv 2108.13264): interquartile means over runs and tasks, bootstrap intervals stratified by
task, and the average probability of improvement. What a resample draws anew is ``Resampling.over``:

- ``"seeds"``: the runs of each task. What another set of seeds could give, on these questions.
- ``"questions"``: the held-out questions of each task, the same for all its runs. What other questions
  could give, with these trained models.
- ``"both"``: both at once, independently. The widest.

A bootstrap over n runs cannot know of scores beyond the lowest and the highest: over three seeds a 95%
interval goes from the one to the other, and holds the median of further runs in 75% of cases only.
"""

from __future__ import annotations

import glob
import itertools
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from ..config import RunConfig
from ..types import ConfigError, did_you_mean
from .folder import Run, load_run, step_file, steps_in
from .stats import interquartile_mean, share_interval

OVER = ("seeds", "questions", "both")
TASK_SETTINGS = (
    "task",
    "difficulty",
    "question_column",
    "answer_column",
    "trace_column",
    "dataset_config",
    "dataset_split",
)
# What runs of one method may differ in: the numbers change, the method does not.
WITHIN = ("seed", "device", "eval_every", "eval_questions", "eval_samples", *TASK_SETTINGS)

Methods = Mapping[str, list[Run]]


# --- which runs, and what tells them apart


def find_runs(patterns: str) -> dict[str, list[Run]]:
    """Run folders by the label of their method.

    patterns are folders separated by commas, with the wildcards of a shell, relative to the working folder
    or to ``notebooks/`` in it. ``NAME: PATTERN`` names a method; without a name, the label is the settings
    that differ between methods. ConfigError where a pattern finds no run, a name stands for several
    methods, or a method has two runs of one task and seed.
    """
    named: dict[str, dict[Path, Run]] = {}
    for entry in filter(None, map(str.strip, patterns.split(","))):
        name, colon, pattern = entry.partition(": ")
        name, pattern = (name.strip(), pattern.strip()) if colon else ("", entry)
        named.setdefault(name, {}).update((run.path.resolve(), run) for run in _matches(pattern))
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
    for label, found in methods.items():
        seen: dict[tuple[str, int], Run] = {}
        for run in found:
            settings = _settings(run)
            task, seed = _task(settings), settings["seed"]
            other = seen.setdefault((task, seed), run)
            if other is not run:
                raise ConfigError(
                    f"{other.path} and {run.path} are both {label!r}, {task}, seed {seed}; leave one out"
                )
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
    return [(1, int("".join(g))) if d else (0, "".join(g)) for d, g in itertools.groupby(path, str.isdigit)]


def _settings(run: Run) -> dict[str, Any]:
    return RunConfig.load(run.path / "config.json").to_dict()


def _task(settings: Mapping[str, Any]) -> str:
    """A task's name: where its questions come from, without the settings that are not set."""
    parts = {name: settings[name] for name in TASK_SETTINGS if settings[name] is not None}
    return ", ".join(str(v) if name == "task" else f"{name} {v}" for name, v in parts.items())


def _varying(runs: list[Run]) -> list[str]:
    """Settings that change the numbers and differ between runs, in the order of ``RunConfig``."""
    configs = [RunConfig.load(run.path / "config.json") for run in runs]
    different = set().union(*(configs[0].differences(other) for other in configs[1:]))
    return [name for name in configs[0].to_dict() if name in different]


def _distinct(settings: list[dict[str, Any]], names: list[str]) -> int:
    return len({tuple(s[name] for name in names) for s in settings})


def _labels(runs: list[Run]) -> list[str]:
    """One label a run: its method and the fewest settings that tell that method's runs apart.

    "…" stands for others that differ between the runs and are not the method's own default. "all runs" where
    nothing differs.
    """
    settings = [_settings(run) for run in runs]
    varying = [name for name in _varying(runs) if name not in WITHIN]
    usual = {s["method"]: RunConfig(method=s["method"]).to_dict() for s in settings}
    shown: dict[str, list[str]] = {}
    for method in usual:
        own = [s for s in settings if s["method"] == method]
        shown[method] = names = []
        for name in varying:
            if _distinct(own, [*names, name]) > _distinct(own, names):
                names.append(name)
    labels = []
    for s in settings:
        method, names = s["method"], shown[s["method"]]
        parts = [method] if "method" in varying else []
        parts += [f"{name} {s[name]}" for name in names]
        hidden = set(varying) - {"method", *names}
        parts += ["…"] if any(s[name] != usual[method][name] for name in hidden) else []
        labels.append(", ".join(parts) or "all runs")
    return labels


def differences(methods: Methods) -> pd.DataFrame:
    """Settings that differ, one row each; a column a run, under (method, run folder)."""
    runs = [run for found in methods.values() for run in found]
    names = _varying(runs)
    columns = {(label, run.path.name): _settings(run) for label, found in methods.items() for run in found}
    table = pd.DataFrame({key: [settings[name] for name in names] for key, settings in columns.items()}, dtype=object)
    table.index = pd.Index(names, name="setting")
    table.columns = pd.MultiIndex.from_tuples(columns, names=["method", "run"])
    return table


# --- scores


def curves(methods: Methods) -> dict[str, dict[str, pd.DataFrame]]:
    """task -> label -> evaluations with a column ``seed``: what a plot of learning curves needs."""
    found: dict[str, dict[str, list[pd.DataFrame]]] = {}
    for label, runs in methods.items():
        for run in runs:
            settings = _settings(run)
            own = run.evaluations.assign(seed=settings["seed"])
            found.setdefault(_task(settings), {}).setdefault(label, []).append(own)
    return {task: {k: pd.concat(v) for k, v in own.items()} for task, own in found.items()}


def scores(methods: Methods, step: int | None = None) -> pd.DataFrame:
    """One row a run and held-out question: method, task, seed, step, example_id, score (0 to 1, greedy).

    From the evaluation after ``step``, or each run's last. ConfigError where a run has none.
    """
    frames = []
    for label, runs in methods.items():
        for run in runs:
            settings, steps = _settings(run), steps_in(run.path / "evaluations")
            last = steps[-1] if step is None and steps else step
            if last not in steps:
                wanted = "any step" if step is None else f"step {step}"
                raise ConfigError(f"{run.path} has no evaluation of {wanted}; leave it out or resume it")
            found = pd.read_parquet(step_file(run.path / "evaluations", last))
            found = found.loc[found["sample"] < 0, ["example_id", "score"]]
            named = {"method": label, "task": _task(settings), "seed": settings["seed"], "step": last}
            frames.append(found.assign(**named))
    columns = ["method", "task", "seed", "step", "example_id", "score"]
    return pd.concat(frames, ignore_index=True)[columns]


def _tables(frame: pd.DataFrame, method: str) -> dict[str, pd.DataFrame]:
    """task -> (seeds, questions) scores of a method; NaN where a run was not asked a question."""
    labels = list(frame["method"].unique())
    if method not in labels:
        raise ConfigError(f"unknown method {method!r}{did_you_mean(method, labels)}")
    own = frame[frame["method"] == method]
    return {task: part.pivot(index="seed", columns="example_id", values="score") for task, part in own.groupby("task")}


@dataclass(frozen=True)
class Resampling:
    """How bootstrap intervals are made. ConfigError for a setting that cannot work."""

    over: str = "both"  # what a resample draws anew: "seeds", "questions" or "both"
    confidence: float = 0.95  # share of the resamples that an interval holds
    resamples: int = 10_000
    seed: int = 0  # of the draws

    def __post_init__(self) -> None:
        if self.over not in OVER:
            raise ConfigError(f"unknown over {self.over!r}{did_you_mean(self.over, OVER)}")
        if not 0 < self.confidence < 1:
            raise ConfigError(f"confidence must be between 0 and 1, not {self.confidence!r}")
        if self.resamples < 1:
            raise ConfigError(f"resamples must be 1 or more, not {self.resamples!r}")

    def interval(self, statistic: Callable[..., np.ndarray], *methods: Mapping[str, pd.DataFrame]):
        """(low, high) of a statistic of one or two methods' tables; NaN over the seeds of single runs."""
        if self.over == "seeds" and all(len(table) == 1 for part in methods for table in part.values()):
            return float("nan"), float("nan")
        values = statistic(*(self._draws(tables, stream) for stream, tables in enumerate(methods)))
        low, high = np.quantile(values, [(1 - self.confidence) / 2, (1 + self.confidence) / 2])
        return float(low), float(high)

    def _draws(self, tables: Mapping[str, pd.DataFrame], stream: int) -> list[np.ndarray]:
        """(resamples, runs) scores of the runs of each task in each resample.

        The questions of a resample depend on the task alone, so that methods are compared on the same ones;
        its runs also on ``stream``.
        """
        drawn = []
        for k, (task, table) in enumerate(sorted(tables.items())):
            runs, questions = table.shape
            if self.over == "seeds":
                means = np.tile(table.mean(axis=1).to_numpy(), (self.resamples, 1))
            else:
                if table.isna().any(axis=None):
                    raise ConfigError(
                        f"the runs on {task} were asked different held-out questions, which cannot be drawn "
                        "together; use over='seeds'"
                    )
                random = np.random.default_rng([self.seed, k, 0])
                counts = random.multinomial(questions, np.full(questions, 1 / questions), self.resamples)
                means = counts @ table.to_numpy().T / questions
            if self.over != "questions":
                random = np.random.default_rng([self.seed, k, 1, stream])
                chosen = random.integers(runs, size=(self.resamples, runs))
                means = np.take_along_axis(means, chosen, axis=1)
            drawn.append(means)
        return drawn


RESAMPLING = Resampling()


def _observed(tables: Mapping[str, pd.DataFrame]) -> list[np.ndarray]:
    """(runs,) scores of the runs of each task."""
    return [table.mean(axis=1).to_numpy() for _, table in sorted(tables.items())]


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

    frame is that of ``scores``. Columns: method, task, runs, questions (distinct), step (of the evaluation;
    the last one's range where they differ), iqm, iqm_low, iqm_high, mean, mean_low, mean_high, lowest and
    highest run. The bounds are NaN over the seeds of a single run, and Wilson's over the questions where
    all answers are right or all wrong, which a bootstrap cannot see beyond.
    """
    rows = []
    for label in frame["method"].unique():
        tables = _tables(frame, label)
        parts = {"all tasks": tables} if len(tables) > 1 else {}
        parts |= {task: {task: table} for task, table in tables.items()}
        for name, part in parts.items():
            steps = frame[(frame["method"] == label) & frame["task"].isin(list(part))]["step"]
            runs = np.concatenate(_observed(part))
            questions = sum(table.shape[1] for table in part.values())
            row = {
                "method": label,
                "task": name,
                "runs": len(runs),
                "questions": questions,
                "step": " to ".join(str(s) for s in sorted({steps.min(), steps.max()})),
            }
            for column, statistic in (("iqm", _iqm), ("mean", _mean)):
                value = float(statistic(_observed(part)))
                low, high = resampling.interval(statistic, part)
                if resampling.over != "seeds" and runs.mean() in (0, 1):
                    _, low, high = share_interval(value * questions, questions, resampling.confidence)
                row |= {column: value, f"{column}_low": low, f"{column}_high": high}
            rows.append(row | {"lowest": float(runs.min()), "highest": float(runs.max())})
    return pd.DataFrame(rows)


def _pairs(frame: pd.DataFrame, reference: str) -> list[tuple[str, str]]:
    """Methods to compare: each with the reference, or all with all. Both must have the same tasks."""
    labels = list(frame["method"].unique())
    if reference:
        _tables(frame, reference)
        pairs = [(label, reference) for label in labels if label != reference]
    else:
        pairs = list(itertools.combinations(labels, 2))
    for x, y in pairs:
        mine, other = (sorted(_tables(frame, label)) for label in (x, y))
        if mine != other:
            raise ConfigError(
                f"{x!r} and {y!r} have different tasks ({', '.join(mine)}; {', '.join(other)}) and cannot be compared"
            )
    return pairs


def paired_differences(frame: pd.DataFrame, reference: str = "", resampling: Resampling = RESAMPLING) -> pd.DataFrame:
    """Accuracy of one method minus another's, paired by task, seed and question; a row a pair.

    All pairs, or each method against ``reference``. Columns: method, minus, difference (mean over tasks of
    the mean over pairs), low, high, seeds (pairs of runs), questions, by_seed (list; the mean over tasks).
    The bounds are NaN over a single pair of seeds; where no answer differs, they are the largest share of
    answers that could (Wilson's for none), to either side. ConfigError where two methods share no seed, or
    were asked different held-out questions.
    """
    rows = []
    for x, y in _pairs(frame, reference):
        mine, other, gain = _tables(frame, x), _tables(frame, y), {}
        for task, table in mine.items():
            if set(table.columns) != set(other[task].columns):
                raise ConfigError(
                    f"{x!r} and {y!r} were asked different held-out questions of {task}; pairs need the same "
                    "task settings and eval_questions"
                )
            shared = table.index.intersection(other[task].index)
            if not len(shared):
                seeds = [", ".join(map(str, t.index)) for t in (table, other[task])]
                raise ConfigError(f"{x!r} (seeds {seeds[0]}) and {y!r} (seeds {seeds[1]}) share no seed on {task}")
            gain[task] = table.loc[shared] - other[task].loc[shared, table.columns]
        questions = sum(table.shape[1] for table in gain.values())
        low, high = resampling.interval(_mean, gain)
        if resampling.over != "seeds" and not any(table.to_numpy().any() for table in gain.values()):
            high = share_interval(0, questions, resampling.confidence)[2]
            low = -high
        by_seed = pd.concat([table.mean(axis=1) for table in gain.values()], axis=1).mean(axis=1)
        rows.append(
            {
                "method": x,
                "minus": y,
                "difference": float(_mean(_observed(gain))),
                "low": low,
                "high": high,
                "seeds": len(by_seed),
                "questions": questions,
                "by_seed": by_seed.tolist(),
            }
        )
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
    for x, y in _pairs(frame, reference):
        tables = [_tables(frame, label) for label in (x, y)]
        low, high = resampling.interval(_improvement, *tables)
        value = float(_improvement(*map(_observed, tables)))
        rows.append({"method": x, "against": y, "probability": value, "low": low, "high": high})
    return pd.DataFrame(rows, columns=["method", "against", "probability", "low", "high"])


def over_seeds(frame: pd.DataFrame, value: str, confidence: float = 0.95) -> pd.DataFrame:
    """Mean of ``value`` by method and alpha, with its bootstrap interval over seeds.

    Columns: method, alpha, runs, mean, low, high. One run gives a point. At 95%, two or three runs give an
    interval from the lowest to the highest.
    """
    resampling, rows = Resampling("seeds", confidence), []
    for (method, alpha), group in frame.dropna(subset=[value]).groupby(["method", "alpha"], sort=True):
        scores = group[[value]].astype(float)
        mean = float(scores[value].mean())
        low, high = resampling.interval(_mean, {"": scores}) if len(scores) > 1 else (mean, mean)
        rows.append((method, alpha, len(group), mean, low, high))
    return pd.DataFrame(rows, columns=["method", "alpha", "runs", "mean", "low", "high"])
