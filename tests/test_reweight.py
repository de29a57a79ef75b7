"""The numpy quantities against the objective's functions and autograd, and against a trained run's files."""

import dataclasses
import itertools

import numpy as np
import pandas as pd
import pytest
import torch
from helpers import EXAMPLE_RUN, random_frame

from covrl_lab import reweight
from covrl_lab.runs.folder import load_run
from covrl_lab.train import objectives
from covrl_lab.types import ConfigError, LogProbs

WEIGHTS = [0.0, 0.2, 0.5, 1.0]


def as_tensors(frame):
    """LogProbs of the frame in float64, with mask, sources and advantages."""

    def padded(name):
        return torch.nn.utils.rnn.pad_sequence(
            [torch.tensor(row, dtype=torch.float64) for row in frame[name]], batch_first=True
        )

    lengths = torch.tensor([len(row) for row in frame["logp"]])
    mask = torch.arange(int(lengths.max())) < lengths[:, None]
    answer = torch.zeros(len(frame), 1, dtype=torch.float64)
    logprobs = LogProbs(padded("logp"), padded("logq"), answer, answer == 0)
    return logprobs, mask, torch.tensor(frame["source"] == "prior"), torch.tensor(frame["advantage"])


def equal(found, expected, mask):
    """Equal on trace tokens to float64 rounding, NaN in the padding."""
    keep = mask.numpy()
    np.testing.assert_allclose(found[keep], expected.detach().numpy()[keep], rtol=1e-9, atol=1e-11)
    assert np.isnan(found[~keep]).all()


@pytest.mark.parametrize("alpha, weight", itertools.product(WEIGHTS, WEIGHTS))
@pytest.mark.parametrize("clip, high", [("ppo", None), ("ppo", 0.6), ("soft", None), ("none", None)])
def test_every_quantity_equals_the_objectives(alpha, weight, clip, high):
    frame = random_frame()
    old, mask, from_prior, advantage = as_tensors(frame)
    settings = reweight.Settings(alpha, weight, clip, 0.3, high)
    found = reweight.quantities(reweight.Traces.of(frame), settings)

    composite = objectives.log_mixture(old, weight)
    hybrid = objectives.log_mixture(old, alpha)
    moved = composite.clone().requires_grad_()
    surrogate, clipped = objectives.clipped_ratio(moved - hybrid, advantage, clip, 0.3, high)
    surrogate.sum().backward()
    rho = objectives.responsibility(old, weight)
    equal(found["logp"], old.prior, mask)
    equal(found["log_gap"], old.posterior - old.prior, mask)
    equal(found["log_composite"], composite, mask)
    equal(found["log_hybrid"], hybrid, mask)
    equal(found["responsibility"], rho, mask)
    equal(found["ratio"], (composite - hybrid).clamp_max(objectives.LOG_RATIO_CAP).exp(), mask)
    equal(found["clipped"], clipped.double(), mask)
    equal(found["kl"], objectives.kl_estimate(old, old, from_prior, weight, "exact"), mask)
    # The gradient through the mixture's own parts, not through the rule rho and 1 - rho.
    equal(found["gradient_weight"], moved.grad, mask)
    parts = dataclasses.replace(
        old, prior=old.prior.clone().requires_grad_(), posterior=old.posterior.clone().requires_grad_()
    )
    log_ratio = objectives.log_mixture(parts, weight) - hybrid
    total = objectives.clipped_ratio(log_ratio, advantage, clip, 0.3, high)[0].sum()
    for name, leaf in (
        ("gradient_weight_prior", parts.prior),
        ("gradient_weight_posterior", parts.posterior),
    ):
        (gradient,) = torch.autograd.grad(total, leaf, retain_graph=True, allow_unused=True)
        equal(found[name], torch.zeros_like(leaf) if gradient is None else gradient, mask)


def test_some_tokens_are_clipped_and_some_are_not():
    """Guards the comparison above against inputs on which the clip never acts."""
    found = reweight.quantities(reweight.Traces.of(random_frame()), reweight.Settings(0.2, 0.5))
    assert 0.05 < np.nanmean(found["clipped"]) < 0.95
    assert reweight.LOG_RATIO_CAP == objectives.LOG_RATIO_CAP


def test_extreme_gaps_stay_finite_and_equal():
    frame = random_frame(spread=60.0)
    old, mask, from_prior, _ = as_tensors(frame)
    for weight in WEIGHTS:
        for alpha in WEIGHTS:
            found = reweight.quantities(reweight.Traces.of(frame), reweight.Settings(alpha, weight, "soft"))
            assert all(np.isfinite(values[mask.numpy()]).all() for values in found.values())
        equal(found["kl"], objectives.kl_estimate(old, old, from_prior, weight, "exact"), mask)


def test_without_a_posterior_quantities_are_absent():
    frame = random_frame().assign(logq=None, source="prior")
    traces = reweight.Traces.of(frame)
    assert set(reweight.quantities(traces, reweight.Settings(0.5, 0.5))) == {"logp"}
    summary = reweight.summarise_traces(traces, reweight.Settings(0.5, 0.5))
    known = {name for name, value in summary.items() if not np.isnan(value)}
    assert known == {"reward", "reward_prior"}
    alone = reweight.quantities(traces, reweight.Settings(1.0, 1.0))
    assert not {"logq", "log_gap", "kl"} & set(alone)
    np.testing.assert_array_equal(alone["ratio"][traces.mask], 1)
    np.testing.assert_array_equal(alone["responsibility"][traces.mask], 1)
    np.testing.assert_allclose(
        alone["gradient_weight"][traces.mask], np.repeat(frame["advantage"], traces.lengths), rtol=1e-12
    )


def test_traces_that_earned_nothing_have_no_gradient():
    frame = random_frame().drop(columns=["advantage", "reward"])
    found = reweight.quantities(reweight.Traces.of(frame), reweight.Settings())
    assert {"ratio", "kl"} <= set(found) and not {
        "clipped",
        "gradient_weight",
        "gradient_weight_prior",
    } & set(found)
    summary = reweight.summarise_traces(reweight.Traces.of(frame), reweight.Settings())
    assert np.isnan(summary["reward"]) and np.isnan(summary["clipped_share"])
    assert summary["effective_sample_share"] > 0


def test_summary_by_hand():
    """Two traces, three tokens: sums written out."""
    p, q = np.array([0.5, 0.25]), np.array([0.25, 0.75])  # a prior trace of two tokens
    frame = pd.DataFrame(
        {
            "source": ["prior", "posterior"],
            "finished": [True, False],
            "logp": [np.log(p), [np.log(0.1)]],
            "logq": [np.log(q), [np.log(0.9)]],
            "advantage": [1.0, -2.0],
            "reward": [-1.0, -3.0],
        }
    )
    alpha, w = 0.8, 0.5
    found = reweight.summarise_traces(reweight.Traces.of(frame), reweight.Settings(alpha, w, "ppo", 0.3))
    ratio = [(w * a + (1 - w) * b) / (alpha * a + (1 - alpha) * b) for a, b in ((0.5, 0.25), (0.25, 0.75), (0.1, 0.9))]
    assert ratio[0] < 1.3 and ratio[1] > 1.3 and ratio[2] > 1.3
    clipped = [0, 1, 0]  # A > 0 above the range; A < 0 above it is not held back
    mass = [alpha, alpha, 1 - alpha]
    assert found["clipped_share"] == pytest.approx(np.dot(mass, clipped) / sum(mass))
    weights = np.array([ratio[0] * ratio[1], ratio[2]])
    share = (alpha * weights[0] + 0.2 * weights[1]) ** 2 / (alpha * weights[0] ** 2 + 0.2 * weights[1] ** 2)
    assert found["effective_sample_share"] == pytest.approx(share)
    assert found["effective_sample_size"] == pytest.approx(2 * share)
    assert found["reward"] == pytest.approx(-0.8 - 0.6)
    assert (found["reward_prior"], found["reward_posterior"]) == (-1, -3)
    rho = [w * a / (w * a + (1 - w) * b) for a, b in ((0.5, 0.25), (0.25, 0.75), (0.1, 0.9))]
    weight = np.array([ratio[0], 0, 2 * ratio[2]])
    assert found["gradient_weight_prior"] == pytest.approx(np.dot(mass, weight * rho) / sum(mass))
    assert found["gradient_weight_posterior"] == pytest.approx(np.dot(mass, weight * (1 - np.array(rho))) / sum(mass))
    u = [0.375 / 0.5, 0.5 / 0.25]
    assert found["kl"] == pytest.approx(np.mean([x * np.log(x) - x + 1 for x in u]))  # the finished trace's
    assert (found["ratio_low"], found["ratio_high"]) == pytest.approx((min(ratio), max(ratio)))


@pytest.mark.skipif(not EXAMPLE_RUN.exists(), reason="the example run is not in this checkout")
def test_a_trained_run_is_met_at_its_own_settings():
    """What the trainer wrote, from its float32 tensors, against what its stored lists give."""
    run = load_run(EXAMPLE_RUN)
    settings = reweight.Settings.of(run.config)
    metrics = run.metrics.set_index("step")
    for step in run.steps:
        frame = run.traces(step)
        traces = reweight.Traces.of(frame)
        found = reweight.quantities(traces, settings)
        stored = np.concatenate(frame["log_ratio"].to_list())
        np.testing.assert_allclose(np.log(found["ratio"])[traces.mask], stored, atol=1e-5)
        summary, row = reweight.summarise_traces(traces, settings, found), metrics.loc[step]
        for name in ("clipped_share", "effective_sample_share", "reward", "reward_prior", "kl"):
            assert summary[name] == pytest.approx(row[name], rel=1e-3, abs=1e-5), (step, name)
        rho = found["responsibility"][traces.from_prior][traces.mask[traces.from_prior]]
        assert rho.mean() == pytest.approx(row["responsibility_prior"], rel=1e-4)


@pytest.mark.parametrize("given", [{"alpha": 1.5}, {"composite_weight": -0.1}, {"clip": "hard"}, {"clip_range": 0.0}])
def test_wrong_settings_are_refused(given):
    with pytest.raises(ConfigError):
        reweight.Settings(**given)


def test_an_empty_frame_gives_empty_arrays():
    empty = reweight.Traces.of(random_frame().iloc[:0])
    assert reweight.quantities(empty, reweight.Settings(1, 1))["ratio"].shape == (0, 0)


def test_the_group_bound_weighs_whole_traces():
    """There the advantages hold P/H already: each token of a trace moves log p by A and log q by B."""
    config = {"method": "covrl", "evidence_floor": 0.5, "alpha": 0.5, "composite_weight": 1.0, "clip": "ppo"}
    settings = reweight.Settings.of(config)
    assert settings.whole_traces and not reweight.Settings.of(config | {"method": "covrl_published"}).whole_traces
    frame = random_frame().assign(posterior_advantage=0.25)
    traces = reweight.Traces.of(frame)
    found = reweight.quantities(traces, settings)
    mask = traces.mask
    spread = np.broadcast_to(traces.advantage[:, None], mask.shape)
    np.testing.assert_array_equal(found["gradient_weight_prior"][mask], spread[mask])
    assert (found["gradient_weight_posterior"][mask] == 0.25).all() and not found["clipped"][mask].any()
    assert np.isnan(found["gradient_weight_prior"][~mask]).all()
