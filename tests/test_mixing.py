"""The mixing panel without a browser: its numbers at any setting."""

import time

import numpy as np
import pytest
from helpers import EXAMPLE_RUN, random_frame

from covrl_lab import MixingRatio, load_run, reweight
from covrl_lab.views.token_figures import plot_mixing


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
