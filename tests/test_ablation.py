"""The ablation's frames, figure and panel without a browser, on made-up run folders."""

import json

import numpy as np
import pandas as pd
import pytest

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
    panel = ablation.Ablation(tmp_path, alphas="0.5", seeds="0", steps=2, model="tiny")
    assert panel.alpha_plot.figure == ""
    (run_id,) = panel.sweep.runs
    path = panel.sweep.path(run_id)
    path.mkdir(parents=True)
    panel.sweep.runs[run_id].save(path / "config.json")
    step = {"step": 1, "seconds": 1.0, "reward_prior": -2.0, "reward_posterior": -1.0, "accuracy": None}
    (path / "metrics.jsonl").write_text(json.dumps(step) + "\n")
    panel.refresh()
    assert panel.cost.value.startswith("1 run, 1 to do with 1 steps")
    assert json.loads(panel.alpha_plot.figure)["layout"]["yaxis"]["range"] == [0, 1], "no accuracy: not up to 400%"
    assert json.loads(panel.learning_plot.figure)["layout"]["yaxis"]["range"] == [0, 1]
    lines = json.loads(panel.alpha_plot.figure)["data"]
    assert {line.get("name") for line in lines} >= {"covrl, prior traces", "covrl, posterior traces"}
    panel.fields["alphas"].value = "0.25"
    assert panel.alpha_plot.figure == panel.learning_plot.figure == ""


@pytest.mark.parametrize(("name", "wrong"), [("task", "arithmetics"), ("task", "nothing.jsonl"), ("model", "smol")])
def test_a_task_or_model_that_does_not_exist_is_refused_at_once(tmp_path, name, wrong):
    panel = ablation.Ablation(tmp_path, alphas="0.5", seeds="0", steps=2, model="tiny")
    right = panel.fields[name].value
    assert not panel.launch_button.disabled
    panel.fields[name].value = wrong
    assert f"{wrong!r}" in panel.cost.value.replace("&#x27;", "'") and "minutes" not in panel.cost.value
    assert panel.launch_button.disabled and panel.rows.children == () and panel.sweep is None
    panel.fields[name].value = right
    assert not panel.launch_button.disabled and len(panel.rows.children) == 1
    assert not list(tmp_path.iterdir())
