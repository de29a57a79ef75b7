"""Comparisons against scores known by hand, by enumeration, and from rliable, scipy and statsmodels."""

import itertools
import json
import math
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from covrl_lab import ConfigError, RunConfig
from covrl_lab.__main__ import main
from covrl_lab.runs import compare
from covrl_lab.runs.compare import Resampling
from covrl_lab.runs.stats import interquartile_mean, share_interval
from covrl_lab.views.comparison import export, plot_intervals, readable

RNG = np.random.default_rng(0)
SEEDS, MANY = Resampling("seeds"), Resampling("seeds", resamples=50_000)


def write_run(folder, scores, step=4, **settings):
    """A run folder with one evaluation; scores is {question id: greedy score}."""
    folder.mkdir(parents=True)
    config = RunConfig(**({"eval_questions": len(scores)} | settings))
    config.save(folder / "config.json")
    (folder / "evaluations").mkdir()
    rows = [{"example_id": i, "sample": k, "score": s if k < 0 else 0.5} for i, s in scores.items() for k in (-1, 0)]
    pd.DataFrame(rows).to_parquet(folder / "evaluations" / f"step_{step:05d}.parquet")
    accuracy = float(np.mean(list(scores.values())))
    line = {"step": step, "accuracy": accuracy, "accuracy_low": accuracy, "accuracy_high": accuracy}
    (folder / "evaluations.jsonl").write_text(json.dumps(line) + "\n")
    return folder


def answers(*values):
    return {f"q{i}": float(v) for i, v in enumerate(values)}


def table_of(arrays, task="t"):
    """The frame of ``compare.scores`` from method -> (seeds, questions) or task -> (seeds, questions)."""
    rows = []
    for method, found in arrays.items():
        for name, array in (found if isinstance(found, dict) else {task: found}).items():
            for (seed, i), value in np.ndenumerate(np.asarray(array, float)):
                rows.append((method, name, seed, 7, f"q{i}", value))
    return pd.DataFrame(rows, columns=["method", "task", "seed", "step", "example_id", "score"])


# --- statistics


@pytest.mark.parametrize("count", [1, 2, 3, 4, 5, 8, 11])
def test_interquartile_mean_is_the_trimmed_mean(count):
    values = RNG.random(count).round(2)
    kept = list(values)
    for _ in range(int(0.25 * count)):  # one by one from either end, as scipy.stats.trim_mean(x, 0.25)
        kept.remove(max(kept))
        kept.remove(min(kept))
    assert interquartile_mean(values) == pytest.approx(sum(kept) / len(kept))
    assert interquartile_mean(np.stack([values, values + 1])) == pytest.approx([np.mean(kept), np.mean(kept) + 1])


# statsmodels.stats.proportion.proportion_confint(right, count, method="wilson"), version 0.15.0
@pytest.mark.parametrize(
    "right, count, low, high",
    [
        (0, 10, 0.0, 0.27753279986288926),
        (10, 10, 0.7224672001371106, 1.0),
        (3, 64, 0.016069016786292974, 0.1289965374009369),
        (100, 200, 0.43136085960389187, 0.5686391403961082),
    ],
)
def test_share_interval_is_wilsons(right, count, low, high):
    assert share_interval(right, count) == pytest.approx((right / count, low, high))
    # Its definition: the shares p that lie z standard errors from what was seen.
    for p in {low, high} - {0.0, 1.0}:
        assert abs(right / count - p) == pytest.approx(1.959964 * math.sqrt(p * (1 - p) / count), rel=1e-5)


def test_share_interval_of_nothing_is_refused():
    with pytest.raises(ValueError, match="no answers"):
        share_interval(0, 0)


def test_over_seeds_is_the_enumeration_of_all_resamples():
    """Two tasks of three runs: 27 * 27 equally likely resamples, of which the quantiles are known."""
    arrays = {"one": RNG.random((3, 5)), "two": RNG.random((3, 4))}
    per_run = [array.mean(1) for array in arrays.values()]
    draws = [
        np.mean([runs[list(pick)].mean() for runs, pick in zip(per_run, picks, strict=True)])
        for picks in itertools.product(itertools.product(range(3), repeat=3), repeat=2)
    ]
    table = compare.performance(table_of({"m": arrays}), resampling=SEEDS)
    assert list(table["task"]) == ["all tasks", "one", "two"]
    row = table.iloc[0]
    assert row["mean"] == pytest.approx(np.mean([runs.mean() for runs in per_run]))
    low, high = np.quantile(draws, [0.025, 0.975])
    assert (row["mean_low"], row["mean_high"]) == pytest.approx((low, high), abs=0.01 * (high - low) + 0.004)
    assert (row["runs"], row["questions"]) == (6, 9)
    one = table.iloc[1]  # three runs: 1/27 of the resamples hold the lowest alone, more than 2.5%
    assert (one["mean_low"], one["mean_high"]) == pytest.approx((per_run[0].min(), per_run[0].max()))
    assert (one["lowest"], one["highest"]) == pytest.approx((per_run[0].min(), per_run[0].max()))


def test_over_questions_keeps_the_runs_and_their_questions_together():
    """Runs that answer alike are one run's worth of evidence; over seeds they leave nothing open."""
    one = (np.arange(400) < 120).astype(float)
    frame = table_of({"m": np.stack([one, one, one])})
    row = compare.performance(frame, resampling=Resampling("questions")).iloc[0]
    half = 1.959964 * math.sqrt(0.3 * 0.7 / 400)
    assert (row["mean_low"], row["mean_high"]) == pytest.approx((0.3 - half, 0.3 + half), abs=0.1 * half)
    row = compare.performance(frame, resampling=SEEDS).iloc[0]
    assert row["mean_low"] == row["mean_high"] == pytest.approx(0.3)


def test_over_both_adds_the_variances():
    chance = np.linspace(0.2, 0.8, 12)[:, None]
    scores = (RNG.random((12, 300)) < chance).astype(float)
    frame = table_of({"m": scores})

    def width(over):
        row = compare.performance(frame, resampling=Resampling(over)).iloc[0]
        return row["mean_high"] - row["mean_low"]

    assert width("both") == pytest.approx(math.hypot(width("seeds"), width("questions")), rel=0.1)
    assert width("both") > width("seeds") > width("questions")


def test_nothing_to_resample_is_not_certainty():
    frame = table_of({"m": [[0, 0, 0, 0, 0]]})
    row = compare.performance(frame).iloc[0]
    assert (row["mean_low"], row["mean_high"]) == share_interval(0, 5)[1:]
    row = compare.performance(frame, resampling=SEEDS)
    assert row[["iqm_low", "iqm_high", "mean_low", "mean_high"]].isna().all(axis=None)
    assert "(–)" in readable(row)["mean"][0]

    frame = table_of({"x": [[1, 0, 0, 1]], "y": [[1, 0, 0, 1]]})
    row = compare.paired_differences(frame).iloc[0]
    high = share_interval(0, 4)[2]
    assert (row["difference"], row["low"], row["high"]) == (0, -high, high)
    assert compare.paired_differences(frame, resampling=SEEDS)[["low", "high"]].isna().all(axis=None)

    rare = np.zeros((8, 10))
    rare[0, 0] = 1  # the interquartile mean is 0, but not all answers are wrong
    row = compare.performance(table_of({"m": rare}), resampling=Resampling(resamples=500)).iloc[0]
    assert row["iqm"] == row["iqm_low"] == 0 and row["iqm_high"] < share_interval(0, 10)[2]


# Scores of 4 runs on 2 tasks, and (value, low, high) of rliable 1.2.0 over 50 000 and 20 000 resamples.
RLIABLE = {
    "x": [[0.52, 0.10], [0.61, 0.35], [0.47, 0.22], [0.80, 0.41]],
    "y": [[0.50, 0.20], [0.61, 0.12], [0.40, 0.05], [0.45, 0.15]],
}
RLIABLE_IQM = {"x": (0.4375, 0.345, 0.52), "y": (0.3, 0.26, 0.3525)}
RLIABLE_PROBABILITY = (0.796875, 0.53125, 1.0)


def test_as_rliable():
    arrays = {m: {f"task {k}": np.array(v)[:, k : k + 1] for k in (0, 1)} for m, v in RLIABLE.items()}
    frame = table_of(arrays)
    table = compare.performance(frame, resampling=MANY)
    table = table[table["task"] == "all tasks"].set_index("method")
    for method, (iqm, low, high) in RLIABLE_IQM.items():
        row = table.loc[method]
        assert row["iqm"] == pytest.approx(iqm)
        assert (row["iqm_low"], row["iqm_high"]) == pytest.approx((low, high), abs=0.006)
    row = compare.probability_of_improvement(frame, resampling=MANY).iloc[0]
    value, low, high = RLIABLE_PROBABILITY
    assert row["probability"] == pytest.approx(value)
    assert (row["low"], row["high"]) == pytest.approx((low, high), abs=0.02)


def test_probability_of_improvement_by_counting_pairs():
    x, y = RNG.integers(0, 2, (5, 6)), RNG.integers(0, 2, (4, 6))
    row = compare.probability_of_improvement(table_of({"x": x, "y": y})).iloc[0]
    pairs = [(a > b) + 0.5 * (a == b) for a in x.mean(1) for b in y.mean(1)]
    assert row["probability"] == pytest.approx(np.mean(pairs)) and 0 <= row["low"] <= row["high"] <= 1


def test_differences_are_paired_by_seed_and_question():
    """What is hard for both cancels: the interval is that of the gains, not of two accuracies."""
    hard = RNG.random((4, 250)) < np.linspace(0.05, 0.95, 250)
    x, y = hard.astype(float), hard.astype(float)
    gained = RNG.random(250) < 0.1
    x[:, gained] = 1.0
    gains = (x - y).mean(0)
    shuffled = table_of({"x": x, "y": y}).sample(frac=1, random_state=0)
    row = compare.paired_differences(shuffled, reference="y", resampling=Resampling("questions")).iloc[0]
    assert (row["method"], row["minus"], row["seeds"], row["questions"]) == ("x", "y", 4, 250)
    assert row["difference"] == pytest.approx(gains.mean())
    half = 1.959964 * gains.std() / math.sqrt(250)
    assert (row["low"], row["high"]) == pytest.approx((gains.mean() - half, gains.mean() + half), abs=0.15 * half)
    assert row["by_seed"] == pytest.approx((x - y).mean(1))


def test_only_shared_seeds_are_paired():
    frame = table_of({"x": RNG.random((3, 4)), "y": RNG.random((5, 4))})
    assert compare.paired_differences(frame).iloc[0]["seeds"] == 3


def test_pairs_are_all_or_those_with_the_reference():
    frame = table_of({name: RNG.random((2, 3)) for name in "abc"})
    for found in (compare.paired_differences, compare.probability_of_improvement):
        assert found(frame).iloc[:, :2].to_numpy().tolist() == [["a", "b"], ["a", "c"], ["b", "c"]]
        assert found(frame, reference="b").iloc[:, :2].to_numpy().tolist() == [["a", "b"], ["c", "b"]]
        with pytest.raises(ConfigError, match="unknown method 'd'"):
            found(frame, reference="d")
    alone = table_of({"a": RNG.random((2, 3))})
    assert compare.paired_differences(alone).empty and compare.probability_of_improvement(alone).empty


def test_settings_that_cannot_resample_are_refused():
    with pytest.raises(ConfigError, match="unknown over 'seed'; did you mean 'seeds'"):
        Resampling("seed")
    with pytest.raises(ConfigError, match="resamples must be"):
        Resampling(resamples=0)


# --- run folders


@pytest.fixture
def runs(tmp_path, monkeypatch):
    """covrl and rlpr, two seeds each, on the same four questions."""
    monkeypatch.chdir(tmp_path)
    write_run(tmp_path / "runs/a-s0", answers(1, 1, 0, 0), seed=0)
    write_run(tmp_path / "runs/a-s1", answers(1, 1, 1, 0), seed=1)
    write_run(tmp_path / "runs/b-s0", answers(1, 0, 0, 0), seed=0, method="rlpr")
    write_run(tmp_path / "runs/b-s1", answers(0, 0, 0, 0), seed=1, method="rlpr")
    (tmp_path / "runs/notes.txt").write_text("not a run")
    return tmp_path


def test_runs_to_numbers(runs):
    methods = compare.find_runs("runs/*")
    assert {k: [r.path.name for r in v] for k, v in methods.items()} == {
        "covrl": ["a-s0", "a-s1"],
        "rlpr": ["b-s0", "b-s1"],
    }
    settings = compare.differences(methods)
    assert list(settings.columns) == [
        ("covrl", "a-s0"),
        ("covrl", "a-s1"),
        ("rlpr", "b-s0"),
        ("rlpr", "b-s1"),
    ]
    assert list(settings.loc["seed"]) == [0, 1, 0, 1]
    assert list(settings.loc["alpha"]) == [0.5, 0.5, 1.0, 1.0]
    assert {"method", "nll_weight"} <= set(settings.index) and not {"steps", "run_dir"} & set(settings.index)

    frame = compare.scores(methods)
    assert len(frame) == 16, "greedy answers alone"
    row = compare.paired_differences(frame).iloc[0]
    assert row["by_seed"] == [0.25, 0.75] and row["difference"] == 0.5
    table = compare.performance(frame).set_index("method")
    assert table["mean"].to_dict() == {"covrl": 0.625, "rlpr": 0.125}
    assert set(table["step"]) == {"4"} and set(table["task"]) == {"arithmetic"}
    curves = compare.curves(methods)["arithmetic"]
    assert {k: list(v["seed"]) for k, v in curves.items()} == {"covrl": [0, 1], "rlpr": [0, 1]}


def test_labels_are_the_settings_that_tell_methods_apart(runs):
    """Not the seed, nor the task, nor what the method itself fixes."""
    write_run(runs / "runs/c-s10", answers(1), seed=10, alpha=0.3, nll_weight=0.1)
    write_run(runs / "runs/c-s9", answers(1), seed=9, alpha=0.3, nll_weight=0.1)
    write_run(runs / "runs/d", answers(1), method="rlpr", difficulty=2)
    methods = compare.find_runs("runs/*")
    assert {k: [r.path.name for r in v] for k, v in methods.items()} == {
        "covrl, alpha 0.5": ["a-s0", "a-s1"],
        "rlpr": ["b-s0", "b-s1", "d"],
        "covrl, alpha 0.3, …": ["c-s9", "c-s10"],
    }
    assert list(compare.find_runs("runs/a-*")) == ["all runs"]
    assert list(compare.find_runs("runs/a-s0, runs/c-*")) == ["alpha 0.5", "alpha 0.3, …"]
    write_run(runs / "runs/e", answers(1, 0), alpha=0.3, eval_every=1)
    assert list(compare.find_runs("runs/a-s0, runs/e, ./runs/a*0")) == ["alpha 0.5", "alpha 0.3"]


def test_names_and_folders_as_given(runs):
    methods = compare.find_runs("ours: runs/a-*, theirs: runs/b-s0, theirs: runs/b-s1")
    assert {k: len(v) for k, v in methods.items()} == {"ours": 2, "theirs": 2}
    (runs / "notebooks").mkdir()
    (runs / "runs").rename(runs / "notebooks/kept")
    assert len(compare.find_runs("kept/*")["covrl"]) == 2


def test_tasks_are_strata(runs):
    for seed in (0, 1):
        for name, method in (("a", "covrl"), ("b", "rlpr")):
            write_run(runs / f"runs/{name}-hard-s{seed}", answers(1, 0), seed=seed, method=method, difficulty=3)
    methods = compare.find_runs("runs/*")
    frame = compare.scores(methods)
    assert set(frame["task"]) == {"arithmetic", "arithmetic, difficulty 3"}
    table = compare.performance(frame)
    assert list(table["task"][:3]) == ["all tasks", "arithmetic", "arithmetic, difficulty 3"]
    assert table["mean"][0] == pytest.approx((0.625 + 0.5) / 2)
    assert compare.paired_differences(frame).iloc[0]["difference"] == pytest.approx((0.5 + 0) / 2)
    assert set(compare.curves(methods)) == set(frame["task"])


@pytest.mark.parametrize(
    "patterns, message",
    [
        ("runs/z*", "no run folder matches 'runs/z\\*'"),
        ("runs/notes.txt", "no run folder matches"),
        (" , ", "names no run folder"),
        ("one: runs/*", "the runs named 'one' are 2 methods .covrl; rlpr.; name each"),
        ("runs/a-s0, copy/a-s0", "are both 'all runs', arithmetic, seed 0; leave one out"),
    ],
)
def test_wrong_patterns_are_one_sentence(runs, patterns, message):
    write_run(runs / "copy/a-s0", answers(1, 1, 0, 0))
    with pytest.raises(ConfigError, match=message):
        compare.find_runs(patterns)


def test_what_cannot_be_compared_is_one_sentence(runs):
    empty = write_run(runs / "runs/c", answers(1), method="grpo")
    (empty / "evaluations/step_00004.parquet").unlink()
    with pytest.raises(ConfigError, match="c has no evaluation of any step"):
        compare.scores(compare.find_runs("runs/*"))
    with pytest.raises(ConfigError, match="a-s0 has no evaluation of step 0"):
        compare.scores(compare.find_runs("runs/a-*"), step=0)

    write_run(runs / "other/task", answers(1, 0, 0, 0), method="grpo", task="shop")
    write_run(runs / "other/questions", answers(1, 0), method="latro")
    write_run(runs / "other/seed", answers(1, 0, 0, 0), method="jlb", seed=5)
    for name, message in {
        "task": "'covrl' and 'grpo' have different tasks .arithmetic; shop. and cannot be compared",
        "questions": "'covrl' and 'latro' were asked different held-out questions of arithmetic",
        "seed": "'covrl' .seeds 0, 1. and 'jlb' .seeds 5. share no seed on arithmetic",
    }.items():
        frame = compare.scores(compare.find_runs(f"covrl: runs/a-*, {name}: other/{name}"))
        frame["method"] = frame["method"].replace({"task": "grpo", "questions": "latro", "seed": "jlb"})
        with pytest.raises(ConfigError, match=message):
            compare.paired_differences(frame)

    write_run(runs / "runs/a-s2", answers(1, 0), seed=2)
    frame = compare.scores(compare.find_runs("covrl: runs/a-*"))
    assert len(compare.performance(frame, resampling=SEEDS)) == 1
    with pytest.raises(ConfigError, match="asked different held-out questions.*over='seeds'"):
        compare.performance(frame)


def test_runs_of_two_tasks_that_answered_one_set_need_names(runs):
    for task in ("arithmetic", "shop"):
        folder = write_run(runs / "sets" / task, answers(1, 0, 0, 0), task=task)
        file = folder / "evaluations/step_00004.parquet"
        pd.read_parquet(file).assign(set="gsm8k").to_parquet(file)
    frame = compare.scores(compare.find_runs("sets/*"))
    with pytest.raises(ConfigError, match="two runs of 'all runs' with one seed answered the same questions of gsm8k"):
        compare.performance(frame)
    named = compare.scores(compare.find_runs("A: sets/arithmetic, B: sets/shop"))
    assert compare.performance(named)["mean"].tolist() == [0.25, 0.25]


# --- for readers


def test_export_keeps_numbers_in_csv_and_reads_well_in_markdown(runs):
    table = compare.performance(compare.scores(compare.find_runs("a | <b>: runs/a-*, rlpr: runs/b-*")))
    csv, markdown = export(table, "out/tables", "final")
    pd.testing.assert_frame_equal(pd.read_csv(csv, dtype={"step": str}), table)
    lines = markdown.read_text("utf-8").splitlines()
    assert lines[0].startswith("| method | task | runs | questions | step | iqm | mean |")
    assert len(lines) == 4 and lines[2].startswith("| a \\| &lt;b&gt; | arithmetic | 2 | 4 | 4 | 62.5% (")
    signed = readable(compare.paired_differences(compare.scores(compare.find_runs("runs/*"))))
    assert signed["difference"][0].startswith("+50.0% (") and signed["by_seed"][0] == "+25.0%, +75.0%"


def test_trace_use_and_alarms_stand_beside_the_accuracy(runs, capsys):
    for name, uses in (("runs/a-s0", [6.0, 2.0]), ("runs/a-s1", [6.0, 5.0])):
        told = json.loads(Path(name, "evaluations.jsonl").read_text())
        lines = [told | {"step": step, "trace_dependence": use} for step, use in zip((0, 4), uses, strict=True)]
        Path(name, "evaluations.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    methods = compare.find_runs("a: runs/a-*, b: runs/b-*")
    table = compare.performance(compare.scores(methods))
    assert list(table["trace_use"].round(6)) == pytest.approx([3.5, math.nan], nan_ok=True)
    assert list(readable(table)["trace use, nats"]) == ["3.5", "–"]
    assert compare.listed(methods).splitlines()[0] == "a: a-s0 (⚠ trace dependence), a-s1"
    assert "trace_use" not in compare.performance(compare.scores({"b": methods["b"]}))  # nothing is known
    with pytest.raises(SystemExit):
        main(["compare", "runs/a-*"])
    assert "a-s0 (⚠ trace dependence)" in (said := capsys.readouterr().out) and "trace use, nats" in said


def test_each_evaluation_set_has_its_own_trace_use(runs):
    folder = write_run(Path("several"), answers(1, 0), eval_task="gsm8k, math-500")
    frame = pd.read_parquet(folder / "evaluations/step_00004.parquet").assign(set=["gsm8k"] * 2 + ["math-500"] * 2)
    frame.to_parquet(folder / "evaluations/step_00004.parquet")
    told = json.loads((folder / "evaluations.jsonl").read_text())
    told |= {"trace_dependence": 2.0, "gsm8k/trace_dependence": 1.0, "math-500/trace_dependence": 3.0}
    (folder / "evaluations.jsonl").write_text(json.dumps(told) + "\n")
    table = compare.performance(compare.scores(compare.find_runs("several")))
    assert dict(zip(table["task"], table["trace_use"], strict=True)) == {"all tasks": 2, "gsm8k": 1, "math-500": 3}


def test_the_command_prints_and_exports_every_table(runs, capsys):
    with pytest.raises(SystemExit) as done:
        main(["compare", "a: runs/a-*", "rlpr: runs/b-*", "--over", "seeds", "--export", "out/command"])
    assert done.value.code == 0
    printed = capsys.readouterr().out
    for name in ("final_accuracy", "paired_differences", "improvement"):
        assert f"{name}\n" in printed
        assert (Path("out/command") / f"{name}.csv").is_file()
        assert (Path("out/command") / f"{name}.md").is_file()
    assert "+50.0% (" in printed


def test_figures_hold_the_tables_numbers(runs):
    frame = compare.scores(compare.find_runs("<b>: runs/a-*, rlpr: runs/b-*"))
    for table, value in (
        (compare.performance(frame), "iqm"),
        (compare.paired_differences(frame), "difference"),
        (compare.probability_of_improvement(frame), "probability"),
    ):
        figure = plot_intervals(table, value)
        points = figure.data[-1]
        assert list(points.x) == list(table[value])
        prefix = "iqm_" if value == "iqm" else ""
        assert list(points.x + points.error_x.array) == pytest.approx(list(table[f"{prefix}high"]))
        assert list(points.x - points.error_x.arrayminus) == pytest.approx(list(table[f"{prefix}low"]))
        assert "&lt;b&gt;" in figure.layout.yaxis.ticktext[0]
    seeds = plot_intervals(compare.paired_differences(frame), "difference").data[0]
    assert list(seeds.x) == [0.25, 0.75]
