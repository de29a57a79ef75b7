"""The estimators' data frames and the panel, against sums written out here from the world's logits alone."""

import math

import numpy as np
import pytest
import torch

from covrl_lab.theory import estimators
from covrl_lab.theory.views import (
    EstimatorPanel,
    plot_gradient_quality,
    plot_group_splits,
    plot_kl_estimators,
    plot_ratio_range,
    plot_responsibility,
)
from covrl_lab.theory.world import World
from covrl_lab.train.methods import METHODS
from covrl_lab.types import ConfigError

torch.set_num_threads(1)


def token_probs(world, distance, temperature):
    """p and q of a one-token world, (tokens,) arrays, without the library's formulas."""
    prior, posterior = (table[0][0].detach().numpy() for table in (world.prior, world.posterior))
    logits = (prior, prior + distance * (posterior - prior))
    return [np.exp(x / temperature) / np.exp(x / temperature).sum() for x in logits]


def kl_by_hand(p, q, w):
    composite = w * p + (1 - w) * q
    return (composite * np.log(composite / p)).sum()


@pytest.mark.parametrize(("distance", "temperature"), [(0.0, 1.0), (1.0, 1.0), (2.5, 0.5)])
def test_between_moves_the_posterior_and_scales_the_traces(distance, temperature):
    world = World(1, answer_tokens=2)
    before = [x.clone() for x in world.parameters]
    moved = world.between(distance, temperature)
    p, q = token_probs(world, distance, temperature)
    np.testing.assert_allclose(moved.prior_probs().detach(), p, atol=1e-14)
    np.testing.assert_allclose(moved.posterior_probs().detach(), q, atol=1e-14)
    assert torch.equal(moved.answer_logprobs(), world.answer_logprobs())
    assert all(torch.equal(x, y) for x, y in zip(before, world.parameters, strict=True))
    assert all(x.requires_grad and x.is_leaf for x in moved.parameters)


def test_between_keeps_longer_worlds_and_refuses_no_temperature():
    world = World(3, seed=7)
    same = world.between(1.0)
    for mine, theirs in zip(world.parameters, same.parameters, strict=True):
        torch.testing.assert_close(mine, theirs, atol=1e-15, rtol=0)
    with pytest.raises(ValueError, match="above 0"):
        world.between(1.0, 0.0)


@pytest.mark.parametrize("w", [0.2, 0.5, 0.8])
def test_kl_estimators_have_the_exact_mean_and_the_corrected_one_its_sign(w):
    world, samples = World(1), 4000
    frame = estimators.kl_sweep(world, "distance", [0.5, 1.0, 1.5], composite_weight=w, samples=samples)
    assert len(frame) == 9
    for row in frame.itertuples():
        p, q = token_probs(world, row.distance, 1.0)
        u, v = w + (1 - w) * q / p, w * p / q + (1 - w)
        c = {estimators.CORRECTED: (1 - w) / w, estimators.PUBLISHED: 1.0}.get(row.estimator)
        probs, values = (p, u * np.log(u) - u + 1) if c is None else (q, v * np.log(u) + c * (v - 1))
        exact = kl_by_hand(p, q, w)
        assert row.exact == pytest.approx(exact, abs=1e-13)
        assert row.expected == pytest.approx(exact, abs=1e-13)
        assert row.deviation == pytest.approx(math.sqrt((probs * (values - exact) ** 2).sum()), abs=1e-12)
        assert row.lowest == pytest.approx(values.min(), abs=1e-13)
        assert row.lowest >= 0 or row.estimator == estimators.PUBLISHED
        # Five standard errors, the true ones: a sample's own may have missed the tail.
        assert abs(row.mean - exact) < 5 * row.deviation / math.sqrt(samples)
        assert row.standard_error == pytest.approx(row.sample_deviation / math.sqrt(samples))
    published = frame[frame["estimator"] == estimators.PUBLISHED]
    assert (published["lowest"] < 0).any() == (w != 0.5)


def test_kl_sweep_over_weights_ends_at_zero():
    frame = estimators.kl_sweep(World(1), "composite_weight", [0.1, 0.5, 1.0], distance=1.0)
    exact = frame.groupby("composite_weight")["exact"].first()
    assert list(exact) == sorted(exact, reverse=True) and exact.loc[1.0] == 0
    with pytest.raises(ValueError, match="over must be"):
        estimators.kl_sweep(World(1), "alpha", [0.5])


@pytest.mark.parametrize(("alpha", "w"), [(0.5, 0.5), (0.8, 0.4), (0.2, 1.0)])
def test_exact_gradients_are_exact_and_the_others_are_not(alpha, w):
    frame = estimators.gradient_quality(World(1).between(1.2, 0.8), alpha, w, 0.05).set_index("estimator")
    loss = frame[frame["part"] == "whole loss"]
    exact = sorted(set(METHODS) - {"covrl"})  # its bound is about groups: tests/test_group_bound.py
    assert set(exact) <= set(loss.index)
    assert (loss.loc[exact, "bias"] < 1e-10).all()
    assert (loss["noise"] > 0.01).all()
    exact, published = ([f"{s} sample, {kind}" for s in ("prior", "posterior")] for kind in ("exact", "published"))
    if w == 1:  # no KL, and so nothing to be biased against
        assert frame.loc[exact + published, "bias"].isna().all()
        return
    assert (frame.loc[exact, "bias"] < 1e-10).all()
    assert (frame.loc[published, "bias"] > 0.01).all()
    assert loss.loc["covrl_published, published KL gradient", "bias"] > 1e-3
    assert (loss.loc["covrl_published, clipped", "bias"] > 1e-3) == (alpha != w)


def test_gradient_noise_against_a_sum_by_hand():
    """The verifier's gradient is A times the score of a softmax: every term known."""
    world = World(1)
    row = estimators.gradient_quality(world, 0.5, 0.5, 0.3).set_index("estimator").loc["grpo"]
    p, _ = token_probs(world, 1.0, 1.0)
    likely = world.answer_logprobs()[:, 0].detach().numpy()
    verdict = (likely > np.median(likely)).astype(float)
    scores = np.eye(3) - p  # gradient of log p(token) by the prior's logits, a row a token
    gradients = verdict[:, None] * scores
    mean = p @ gradients
    noise = math.sqrt(p @ ((gradients - mean) ** 2).sum(1)) / np.linalg.norm(mean)
    assert row["noise"] == pytest.approx(noise, abs=1e-12)


def test_ratios_stay_between_their_bounds_and_the_clip_share_is_the_sum():
    world, w, epsilon = World(1).between(1.5), 0.3, 0.3
    p, q = (probs.detach().numpy() for probs in (world.prior_probs(), world.posterior_probs()))
    alphas = [0.05, 0.3, 0.6, 0.95]
    frame = estimators.ratio_range(world, alphas, w, epsilon, samples=4000, seed=1)
    for row in frame.itertuples():
        ratio = (w * p + (1 - w) * q) / (row.alpha * p + (1 - row.alpha) * q)
        hybrid = row.alpha * p + (1 - row.alpha) * q
        ends = sorted([w / row.alpha, (1 - w) / (1 - row.alpha)])
        assert [row.bound_low, row.bound_high] == pytest.approx(ends)
        assert [row.low, row.high] == pytest.approx([ratio.min(), ratio.max()], abs=1e-13)
        assert row.bound_low - 1e-12 <= row.low <= row.high <= row.bound_high + 1e-12
        assert row.touched_positive == pytest.approx(hybrid[ratio > 1 + epsilon].sum(), abs=1e-13)
        assert row.touched_negative == pytest.approx(hybrid[ratio < 1 - epsilon].sum(), abs=1e-13)
        assert row.touched == pytest.approx(row.touched_positive + row.touched_negative, abs=1e-13)
        error = math.sqrt(row.touched * (1 - row.touched) / 4000)
        assert abs(row.mean - row.touched) <= 5 * error + 1e-12
    assert frame["touched"].max() > 0.1 and frame.loc[1, "touched"] == 0
    assert math.isinf(estimators.ratio_range(world, [1.0], w, epsilon)["bound_high"][0])


def test_responsibility_is_w_p_over_the_composite():
    world, w = World(1), 0.4
    frame = estimators.responsibilities(world, [0.0, 1.0, 3.0], w, 0.7, samples=4000, seed=2)
    for row in frame.itertuples():
        p, q = token_probs(world, row.distance, 0.7)
        rho, probs = w * p / (w * p + (1 - w) * q), {"prior": p, "posterior": q}[row.source]
        assert row.expected == pytest.approx((probs * rho).sum(), abs=1e-13)
        assert [row.lowest, row.highest] == pytest.approx([rho.min(), rho.max()], abs=1e-13)
        assert 0 <= row.lowest <= row.highest <= 1
        error = math.sqrt((probs * (rho - (probs * rho).sum()) ** 2).sum() / 4000)
        assert abs(row.mean - row.expected) <= 5 * error + 1e-12
    means = frame.pivot(index="distance", columns="source", values="expected")
    assert means.loc[0.0].tolist() == pytest.approx([w, w])
    # Under p' the mean is w, at any distance.
    assert (w * means["prior"] + (1 - w) * means["posterior"]).tolist() == pytest.approx([w] * 3)


def group_by_hand(right, posterior, sources, floor):
    """Gap and noise of groups of two traces from ``sources``, from probabilities alone."""
    p, r = np.array([right, (1 - right) / 2, (1 - right) / 2]), np.array([0.99, 0.002, 0.002])
    q, c = p * r**posterior / (p * r**posterior).sum(), math.exp(floor)
    hybrid = sum({"p": p, "q": q}[source] for source in sources) / 2
    answers = np.stack([r, (1 - r) / 2, (1 - r) / 2], 1)  # after each trace
    bound, probs, gradients = 0.0, [], []
    for i in range(3):
        for j in range(3):
            probs.append({"p": p, "q": q}[sources[0]][i] * {"p": p, "q": q}[sources[1]][j])
            e = (r * p / hybrid)[[i, j]]
            credit = e / (c + e.mean())
            # A baseline is left only by a second trace of the same source: what the other one alone would earn.
            baseline = e[::-1] / (c + e[::-1]) if sources[0] == sources[1] else np.zeros(2)
            advantage = credit - baseline * (p / hybrid)[[i, j]]
            prior, answer = np.zeros(3), np.zeros((3, 3))
            for trace, a, s in zip((i, j), advantage, credit, strict=True):
                prior += a * (np.eye(3)[trace] - p) / 2
                answer[trace] += s * (np.eye(3)[0] - answers[trace]) / 2
            bound += probs[-1] * math.log(c + e.mean())
            gradients.append([*prior, *answer.flatten()])
    probs, gradients = np.array(probs), np.array(gradients)
    mean = probs @ gradients
    noise = math.sqrt(probs @ ((gradients - mean) ** 2).sum(1)) / np.linalg.norm(mean)
    return math.log(c + p @ r) - bound, noise


@pytest.mark.parametrize(("right", "posterior"), [(0.1, 0.5), (0.6, 1.0)])
def test_splits_of_a_group_against_sums_by_hand(right, posterior):
    world = World.of_reasoning(right, posterior)
    frame = estimators.group_splits(world, 2, floor=-1.5).set_index("alpha")
    for alpha, sources in ((1.0, "pp"), (0.5, "pq"), (0.0, "qq")):
        gap, noise = group_by_hand(right, posterior, sources, -1.5)
        # The worlds' logits are made from float32 numbers.
        assert frame.loc[alpha, "gap"] == pytest.approx(gap, abs=1e-6)
        assert frame.loc[alpha, "noise"] == pytest.approx(noise, rel=1e-5)


def test_one_posterior_trace_is_worth_most_where_the_prior_is_often_right():
    """Two of four serve a rare prior with a half-blind posterior better; notebook 06 draws it."""
    often, rare = (estimators.group_splits(World.of_reasoning(right, 0.5)).set_index("alpha") for right in (0.3, 0.02))
    assert often["noise"].idxmin() == 0.75 and rare.loc[0.5, "noise"] < rare.loc[0.75, "noise"]
    assert (np.diff(often.sort_index()["gap"]) > 0).all()  # the bound tightens with every posterior trace
    figure = plot_group_splits(often.reset_index().assign(right=0.3, posterior=0.5))
    assert list(figure.data[0].y) == list(often["noise"]) and figure.layout.yaxis.type == "log"


def test_figures_hold_the_frames_numbers():
    world = World(1)
    sweep = estimators.kl_sweep(world, "distance", [0.0, 1.0], samples=20)
    figure = plot_kl_estimators(sweep)
    exact = next(trace for trace in figure.data if trace.name.startswith("exact"))
    assert list(exact.y) == list(sweep.groupby("distance")["exact"].first())
    bars = [trace for trace in figure.data if trace.error_y.array is not None]
    assert len(bars) == 3
    own = sweep[sweep["estimator"] == estimators.PRIOR_SAMPLE]
    assert list(bars[0].y) == list(own["mean"])
    assert list(bars[0].error_y.array) == list(2 * own["standard_error"])
    shares = plot_responsibility(estimators.responsibilities(world, [0.0, 2.0], 0.3))
    assert "ρ" in shares.layout.yaxis.title.text
    ratio = plot_ratio_range(estimators.ratio_range(world, [0.2, 0.8], 0.5, 0.3))
    assert ratio.layout.yaxis.type == "log" and "%" in ratio.layout.yaxis2.tickformat
    quality = estimators.gradient_quality(world, 0.5, 0.5, 0.3)
    dots = plot_gradient_quality(quality)
    shown = sorted(x for trace in dots.data if trace.xaxis == "x" for x in trace.x)
    assert shown == sorted(100 * quality["bias"])
    for drawn in (figure, shares, ratio, dots):
        assert all(axis.title.text for axis in drawn.select_xaxes())
        assert drawn is dots or all(axis.title.text for axis in drawn.select_yaxes())


@pytest.mark.slow
def test_the_panel_follows_its_sliders():
    world = World(1)
    panel = EstimatorPanel("kl", world, composite_weight=0.5, samples=30)
    assert panel.table.value == panel.html() == panel.static()[1].data
    assert f">{kl_by_hand(*token_probs(world, 1.0, 1.0), 0.5):.4f}</td>" in panel.html()
    for w, distance, temperature in ((0.3, 1.0, 1.0), (0.3, 2.0, 0.5)):
        panel.sliders["composite_weight"].value = w
        panel.sliders["distance"].value = distance
        panel.sliders["temperature"].value = temperature
        p, q = token_probs(world, distance, temperature)
        assert f">{kl_by_hand(p, q, w):.4f}</td>" in panel.table.value
        lines = {trace.name: trace for trace in panel.figure().data}
        exact = next(trace for name, trace in lines.items() if name.startswith("exact"))
        assert exact.y[list(exact.x).index(distance)] == pytest.approx(kl_by_hand(p, q, w))  # the plot moved along
        assert panel.plot.figure == panel.figure().to_json() and panel.figure().layout.shapes[0].x0 == distance
    panel.over.value = "composite_weight"
    exact = next(trace for trace in panel.figure().data if trace.name.startswith("exact"))
    assert exact.x[2] == pytest.approx(0.3) and exact.y[2] == pytest.approx(kl_by_hand(p, q, 0.3))

    panel = EstimatorPanel("responsibility", world, composite_weight=0.5)
    panel.sliders["composite_weight"].value = 0.2
    p, q = token_probs(world, 1.0, 1.0)
    assert f">{(q * 0.2 * p / (0.2 * p + 0.8 * q)).sum():.4f}</td>" in panel.table.value

    panel = EstimatorPanel("ratio", world, composite_weight=0.5)
    panel.sliders["alpha"].value = 0.8
    assert f">{0.5 / 0.8:.4f}</td>" in panel.table.value and f">{0.5 / 0.2:.4f}</td>" in panel.table.value


@pytest.mark.slow
def test_the_panel_at_every_end_of_its_sliders():
    for section in ("kl", "gradient", "ratio", "responsibility"):
        panel = EstimatorPanel(section, World(1), samples=10)
        for slider in panel.sliders.values():
            for value in (slider.min, slider.max):
                slider.value = value
                assert "nan" not in panel.table.value and "inf" not in panel.table.value
        assert panel.html() in panel.table.value and "w 1" in panel.table.value
    with pytest.raises(ConfigError, match="did you mean 'ratio'"):
        EstimatorPanel("ratios", World(1))
