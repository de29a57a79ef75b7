"""The ablation's frames, figure and panel without a browser, on made-up run folders."""

import json
from types import SimpleNamespace

import nbformat
import numpy as np
import pandas as pd
import pytest
from helpers import NOTEBOOKS, made_up_run

from covrl_lab.runs.worker import write_end
from covrl_lab.types import ConfigError
from covrl_lab.views import ablation
from covrl_lab.views.comparison import plot_against_alpha

ALPHAS, SEEDS = (0.25, 0.5, 0.75), (0, 1, 2)


@pytest.fixture
def measured():
    """Results of a grid of two methods: what ``sweep_results`` gives."""
    rng = np.random.default_rng(0)
    rows = [
        {"id": f"{method}{alpha}{seed}", "method": method, "alpha": alpha, "seed": seed}
        | dict(zip(("accuracy", "reward_prior", "reward_posterior"), rng.random(3), strict=True))
        for method in ("covrl", "jlb")
        for alpha in ALPHAS
        for seed in SEEDS
    ]
    return pd.DataFrame(rows)


def test_no_interval_hides_another_and_each_names_its_alpha(measured):
    figure = plot_against_alpha(measured)
    lines = [line for line in figure.data if line.mode == "lines+markers"]
    assert [line.xaxis for line in lines].count("x") == 2 and len(lines) == 6
    for axis in ("x", "x2"):
        places = np.array([line.x for line in lines if line.xaxis == axis])
        assert np.diff(np.sort(places, axis=0), axis=0).min() > 0.01, "of an axis from 0 to 1"
        assert np.abs(places - ALPHAS).max() < 0.125, "nearer to its own alpha than to the next"
    for line in lines:
        column = {"prior traces": "reward_prior", "posterior traces": "reward_posterior"}
        method, _, source = line.name.partition(", ")
        own = measured[measured["method"] == method].groupby("alpha")[column.get(source, "accuracy")]
        np.testing.assert_array_equal(line.customdata[:, 0], ALPHAS)
        np.testing.assert_allclose(line.y, own.mean())
        np.testing.assert_allclose(line.y + line.error_y.array, own.max())  # three runs: their range
        np.testing.assert_allclose(line.y - line.error_y.arrayminus, own.min())


def test_one_method_stands_at_its_alpha(measured):
    figure = plot_against_alpha(measured[measured["method"] == "covrl"])
    (accuracy,) = (line for line in figure.data if line.xaxis == "x" and line.name)
    np.testing.assert_array_equal(accuracy.x, ALPHAS)


def test_the_panel_s_own_grid_can_be_launched(tmp_path):
    panel = ablation.Ablation(tmp_path)
    assert not panel.launch_button.disabled and panel.cost.value.startswith("12 runs, 12 to do")


def test_a_grid_without_steps_takes_the_plots_away(tmp_path):
    panel = ablation.Ablation(tmp_path, alphas=0.5, seeds=0, steps=2, model="tiny")
    assert panel.plots[0].figure == ""
    before = panel._bundles()
    (run_id,) = panel.sweep.runs
    path = panel.sweep.path(run_id)
    path.mkdir(parents=True)
    panel.sweep.runs[run_id].save(path / "config.json")
    step = {"step": 1, "seconds": 1.0, "reward_prior": -2.0, "reward_posterior": -1.0, "accuracy": None}
    (path / "metrics.jsonl").write_text(json.dumps(step) + "\n")
    panel.refresh()
    assert panel.cost.value.startswith("1 run, 1 to do with 1 steps")
    assert json.loads(panel.plots[0].figure)["layout"]["yaxis"]["range"] == [0, 1], "no accuracy: not up to 400%"
    assert json.loads(panel.plots[1].figure)["layout"]["yaxis"]["range"] == [0, 1]
    assert len(panel.static()) == 3 and len(panel._bundles()) == len(before), "a page gets its outputs once"
    lines = json.loads(panel.plots[0].figure)["data"]
    assert {line.get("name") for line in lines} >= {"covrl, prior traces", "covrl, posterior traces"}
    before = [plot.figure for plot in panel.plots]
    for alphas, figures in (("no number", ["", ""]), ("0.5", before)):
        panel.fields["alphas"].value = alphas
        assert [plot.figure for plot in panel.plots] == figures, alphas
    panel.fields["alphas"].value = "0.25"
    assert [plot.figure for plot in panel.plots] == ["", ""]


def test_estimate_says_that_it_measures_and_then_what_it_found(tmp_path, monkeypatch):
    panel = ablation.Ablation(tmp_path, alphas="0.5", seeds="0", steps=2, model="tiny")
    shown = []

    def plan(config):
        shown.append((panel.cost.value, panel.estimate_button.disabled))
        return SimpleNamespace(minutes=0.5)

    monkeypatch.setattr("covrl_lab.train.plan.plan", plan)
    panel.estimate()
    assert shown == [("measuring this machine, a few seconds …", True)]
    assert "about 1.0 minutes" in panel.cost.value and not panel.estimate_button.disabled


@pytest.mark.parametrize(("name", "wrong"), [("task", "arithmetics"), ("task", "nothing.jsonl"), ("model", "smol")])
def test_a_task_or_model_that_does_not_exist_is_refused_at_once(tmp_path, name, wrong):
    panel = ablation.Ablation(tmp_path, alphas="0.5", seeds="0", steps=2, model="tiny")
    right = panel.fields[name].value
    assert not panel.launch_button.disabled
    panel.fields[name].value = wrong
    assert f"{wrong!r}" in panel.cost.value.replace("&#x27;", "'") and "minutes" not in panel.cost.value
    assert panel.launch_button.disabled and panel.table.rows == [] and panel.sweep is None
    panel.fields[name].value = right
    assert not panel.launch_button.disabled and len(panel.table.rows) == 1
    assert not list(tmp_path.iterdir())


def test_the_table_follows_the_files_and_its_buttons_the_picked_run(tmp_path):
    panel = ablation.Ablation(tmp_path, alphas="0.25, 0.5", seeds="0", steps=2, model="tiny")
    first, second = panel.sweep.runs
    for run_id, evaluations in ((first, 1), (second, 0)):
        path = panel.sweep.path(run_id)
        made_up_run(path, steps=1)
        panel.sweep.runs[run_id].save(path / "config.json")
        step = {"step": 1, "seconds": 1.5, "reward_prior": -2.0, "reward_posterior": -1.0}
        (path / "metrics.jsonl").write_text(json.dumps(step) + "\n")
        scores = {"step": 1, "accuracy": 0.125, "accuracy_low": 0.0, "accuracy_high": 0.5, "eval_questions": 8}
        (path / "evaluations.jsonl").write_text(evaluations * (json.dumps(scores) + "\n"))
    write_end(panel.sweep.path(second), "failed", "<b>no space</b>")
    panel.refresh()
    rows = {row["id"]: row for row in panel.table.rows}
    assert [rows[first][name] for name in ("alpha", "seed", "accuracy", "seconds")] == [0.25, 0, 12.5, 1.5]
    assert rows[second]["state"] == "✗ failed: <b>no space</b>" and rows[second]["accuracy"] is None
    page, *plots = panel.static()
    assert "&lt;b&gt;no space" in page.data and "12.5" in page.data and len(plots) == 2

    assert panel.table.picked == first and panel.act_button.description == "Cancel"
    panel.table.picked = second
    assert panel.act_button.description == "Retry" and not panel.act_button.disabled
    panel.traces_button.click()
    assert second in panel.traces.children[0].value
    shown = panel.static()
    assert len(shown) == panel.places and "reference answer" in shown[1].data and shown[2].data, "its traces, too"
    panel.table.picked = first
    panel.act_button.click()
    assert panel.sweep.statuses[first] == "cancelled" and panel.act_button.description == "Retry"
    assert "0 to do" in panel.cost.value and panel.launch_button.disabled  # Retry is what is left
    panel.fields["seeds"].value = "1"
    assert panel.traces.children == () and panel.traces_button.disabled  # those were another grid's
    assert "2 to do" in panel.cost.value and not panel.launch_button.disabled

    # The cell is run again: its fields stay as they were set. Another default counts as a new wish.
    again = ablation.Ablation(tmp_path, alphas="0.25, 0.5", seeds="0", steps=2, model="tiny")
    assert again.fields["seeds"].value == "1" and again.fields["alphas"].value == "0.25, 0.5"
    assert ablation.Ablation(tmp_path, alphas="0.5", seeds="0", model="tiny").fields["seeds"].value == "0"


def test_the_notebook_s_grid_takes_every_setting(tmp_path):
    """Also those that its cell of parameters leaves out, which papermill passes on all the same."""
    cells = [cell.source for cell in nbformat.read(NOTEBOOKS[3], as_version=4).cells if cell.cell_type == "code"]
    first, imports, *rest = cells
    assert NOTEBOOKS[3].stem == "04_mixing_ratio" and first.startswith("alphas")
    (grid,) = [source for source in rest if source.startswith("sweep = Sweep(")]
    given = {"sweep_dir": str(tmp_path), "alphas": 0.5, "seeds": 1, "learning_rate": 1e-3, "trace_column": "t"}

    def run(**more):
        names = {}
        exec(first, names)
        exec(imports, names := names | given | more)
        exec(grid, names)
        return list(names["sweep"].runs.values())

    (config,) = run(task="rows.csv")
    assert (config.alpha, config.seed, config.task, config.max_trace_tokens) == (0.5, 1, "rows.csv", 40)
    assert (config.learning_rate, config.trace_column) == (1e-3, "t")
    with pytest.raises(ConfigError, match="unknown parameter 'alpha'; did you mean 'alphas'?"):
        run(alpha=0.3)
    with pytest.raises(ConfigError, match="unknown parameter 'alhpas'; did you mean 'alphas'?"):
        run(alhpas=0.3)
