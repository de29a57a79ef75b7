"""The mixing panel without a browser: its numbers at any setting."""

import json
import time
from dataclasses import replace

import numpy as np
import pytest
from helpers import EXAMPLE_RUN, made_up_run, random_frame

from covrl_lab import MixingRatio, RunConfig, TraceComparison, TraceExplorer, load_run, reweight
from covrl_lab.runs.folder import write_parquet
from covrl_lab.views.report import page as page_of
from covrl_lab.views.token_figures import plot_mixing
from covrl_lab.views.widgets import Plot


@pytest.fixture(scope="module")
def example():
    return load_run(EXAMPLE_RUN)


def test_a_slider_recomputes_its_side(example):
    mixing = MixingRatio(example, 15)
    traces = reweight.Traces.of(example.traces(15))
    before = mixing.summary["A"]
    mixing.sides[1].alpha.value = 0.9
    mixing.sides[1].clip_range.value = 0.1
    mixing.sides[1].clip.value = "soft"
    expected = reweight.summarise_traces(traces, reweight.Settings(0.9, 0.5, "soft", 0.1))
    assert mixing.summary["B"] == pytest.approx(expected)
    assert mixing.summary["A"] is before
    assert f"{100 * expected['clipped_share']:.1f}" in mixing.table.value
    mixing.step.value = 30
    assert mixing.summary["A"]["reward"] == pytest.approx(example.metrics.set_index("step")["reward"][30], rel=1e-4)


def test_densities_and_gradient_weights_add_up(example):
    traces = reweight.Traces.of(example.traces(15))
    settings = reweight.Settings(0.3, 0.5)
    found = reweight.densities(traces, settings)
    for name in ("log p", "log q", "log h"):
        edges, share = found[name]
        assert len(edges) == len(share) + 1 and share.sum() == pytest.approx(1)
    by_source = [found[f"ratio {source}"][1].sum() for source in ("prior", "posterior")]
    assert sum(by_source) == pytest.approx(1)
    ratio = reweight.quantities(traces, settings)["ratio"]
    edges, share = found["ratio prior"]
    prior = traces.mask & traces.from_prior[:, None]
    counted, _ = np.histogram(np.log(ratio[prior]), edges)
    np.testing.assert_allclose(share / share.sum(), counted / counted.sum(), atol=1e-9)
    weights, summary = (
        reweight.gradient_weights(traces, settings),
        reweight.summarise_traces(traces, settings),
    )
    for moved in ("prior", "posterior"):
        total = sum(value for (m, _), value in weights.items() if m == moved)
        assert total == pytest.approx(summary[f"gradient_weight_{moved}"])


def test_a_slider_move_is_quick(capsys):
    """Printed, not asserted: the kernel's side of one move, 64 traces of 256 tokens."""
    frame = random_frame(64, 1)
    rng = np.random.default_rng(0)
    logp = -rng.exponential(2.0, (64, 256))
    frame = frame.assign(logp=list(logp), logq=list(np.minimum(logp + rng.standard_normal((64, 256)), 0)))
    traces, times = reweight.Traces.of(frame), []
    for alpha in np.linspace(0.1, 0.9, 9):
        started = time.perf_counter()
        settings = reweight.Settings(alpha, 0.5)
        values = reweight.quantities(traces, settings)
        reweight.summarise_traces(traces, settings, values)
        densities = reweight.densities(traces, settings, values)
        weights = reweight.gradient_weights(traces, settings, values)
        plot_mixing({"A": ""}, [(densities, settings.clip_bounds, weights)]).to_json()
        times.append(1000 * (time.perf_counter() - started))
    with capsys.disabled():
        shown = f"median {np.median(times):.0f} ms, most {max(times):.0f} ms"
        print(f"\nslider move, kernel's side, 64 traces of 256 tokens: {shown}")


def shown(panel):
    """The widgets of the panel that take part in the page, by kind."""
    found, left = [], [panel.widget]
    while left:
        widget = left.pop()
        if widget.layout is None or widget.layout.display != "none":
            found.append(type(widget).__name__)
            left += getattr(widget, "children", ())
    return found


def test_the_numbers_stand_next_to_the_sliders_however_narrow_the_page(tmp_path):
    """On a narrow page everything stands below each other, in this order."""
    kinds = shown(MixingRatio(made_up_run(tmp_path / "run")))[::-1]
    sliders = [place for place, kind in enumerate(kinds) if kind == "FloatSlider"]
    assert "Plot" not in kinds[: max(sliders)] and "HTML" in kinds[max(sliders) : kinds.index("Plot")]


def test_without_a_posterior_the_sentence_stands_alone(tmp_path):
    mixing = MixingRatio(made_up_run(tmp_path / "run", source="prior", logq=None))
    assert not {"FloatSlider", "Plot"} & set(shown(mixing)) and "Dropdown" in shown(mixing)
    (page,) = mixing.static()
    assert "nothing to mix" in page.data and "<table" not in page.data
    assert shown(MixingRatio(made_up_run(tmp_path / "other"))).count("FloatSlider") == 6


def test_a_group_bound_run_offers_alpha_alone_and_keeps_its_whole_traces(tmp_path):
    run = made_up_run(tmp_path / "run", posterior_advantage=0.25)
    settings = RunConfig(method="covrl", model="tiny").to_dict()
    (run.path / "config.json").write_text(json.dumps(settings))
    mixing = MixingRatio(run)
    assert shown(mixing).count("FloatSlider") == 2, "alpha of A and of B"
    frame = run.traces(2)
    assert mixing.sides[0].settings == reweight.Settings(0.5, 1.0, "ppo", 0.2, None, True)
    # On every token of a trace its two advantages, whatever w and the clip say.
    for moved, column in (("prior", "advantage"), ("posterior", "posterior_advantage")):
        expected = frame[column].abs().mean()
        assert mixing.summary["A"][f"gradient_weight_{moved}"] == pytest.approx(expected)
    assert "clip" not in mixing.html().split("</thead>")[0] and "α 0.25" in mixing.html()
    assert not json.loads(mixing.sides[0].plot.figure)["layout"].get("shapes")


def test_where_alpha_adapts_it_is_that_of_the_step(tmp_path, monkeypatch):
    run = made_up_run(tmp_path / "run", posterior_advantage=0.25)
    settings = RunConfig(method="covrl", model="tiny", alpha_rate=0.3).to_dict()
    (run.path / "config.json").write_text(json.dumps(settings))
    frame = run.traces(2)
    frame["source"] = ["prior"] * (len(frame) - 1) + ["posterior"]
    write_parquet(frame, run.path / "traces" / "step_00002.parquet")
    drawn, draw = [], Plot.draw
    monkeypatch.setattr(Plot, "draw", lambda plot, figure: (drawn.append(figure), draw(plot, figure)))
    mixing = MixingRatio(run, 2)
    assert mixing.sides[0].settings.alpha == round(1 - 1 / len(frame), 2) and len(drawn) == 2, "each side once"
    mixing.step.value = 1
    assert mixing.sides[0].settings.alpha == 0.5 and len(drawn) == 4
    assert f"α {mixing.sides[0].alpha.value:g}" in mixing.html()


def test_setting_a_has_the_runs_own_bounds_until_they_are_moved(tmp_path):
    run = made_up_run(tmp_path, steps=2)
    bounds = {"clip_range": 0.2, "clip_range_high": 0.28}
    settings = RunConfig(method="covrl_published", model="tiny", **bounds).to_dict()
    (run.path / "config.json").write_text(json.dumps(settings))
    mixing = MixingRatio(run, 2)
    own = reweight.Settings.of(run.config)
    assert mixing.sides[0].settings == own and own.clip_bounds == (0.8, 1.28)
    traces = reweight.Traces.of(run.traces(2))
    assert mixing.summary["A"] == pytest.approx(reweight.summarise_traces(traces, own), nan_ok=True)
    assert "ppo clip 0.8 to 1.28" in mixing.html()
    mixing.sides[0].clip_range.value = 0.3
    assert mixing.sides[0].settings.clip_bounds == (0.7, 1.3) and "ppo clip ±0.3" in mixing.html()


def test_a_damaged_step_says_so_and_the_others_are_shown(tmp_path):
    run = made_up_run(tmp_path, steps=3)
    (run.path / "config.json").write_text(json.dumps(RunConfig(model="tiny").to_dict()))
    (run.path / "traces" / "step_00002.parquet").write_bytes(b"PAR1")
    mixing = MixingRatio(load_run(run.path), 3)
    whole = mixing.table.value
    mixing.step.value = 2
    assert mixing.mixed.layout.display == "none" and "step_00002.parquet" in mixing.note.value
    (page,) = mixing.static()
    assert "step_00002.parquet" in page.data and "gradient" not in page.data
    mixing.step.value = 3
    assert mixing.mixed.layout.display == "" and mixing.table.value == whole
    both = TraceComparison(run.path, step_a=1, step_b=3)
    assert "step_00002.parquet" in both.heading.value


def test_the_alpha_of_a_step_is_the_share_of_its_prior_traces_where_it_adapts(tmp_path):
    run = made_up_run(tmp_path, steps=1)
    frame = run.traces(1)
    frame["source"] = ["prior"] * (len(frame) - 1) + ["posterior"]
    for rate, alpha in ((0.0, 0.5), (0.3, round(1 - 1 / len(frame), 2))):
        settings = RunConfig(method="covrl", model="tiny", alpha_rate=rate).to_dict()
        assert reweight.Settings.at(settings, frame) == replace(reweight.Settings.of(settings), alpha=alpha)
    (run.path / "config.json").write_text(json.dumps(settings))
    write_parquet(frame, run.path / "traces" / "step_00001.parquet")
    explorer = TraceExplorer(load_run(run.path), 1)
    assert explorer.settings.alpha == alpha and f"α {alpha:g}" in explorer.heading.value
    assert f"step 1: α = {alpha:g}" in page_of(load_run(run.path).forgiving())
