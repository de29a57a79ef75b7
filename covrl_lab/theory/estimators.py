"""How good the estimators are: data frames from an enumerable world, exact sums beside random draws.

Everything goes through the library's own functions (``objectives``, ``methods``), one rollout at a time, on a
``world.World``. The knobs are ``alpha``, ``composite_weight`` w, ``clip_range``, the distance between p and q
and the temperature (``World.between``). Nothing here plots.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable

import pandas as pd
import torch
from torch import Tensor

from ..config import RunConfig
from ..defaults import METHOD_DEFAULTS, settings_read
from ..train.methods import METHODS
from ..train.objectives import (
    Totals,
    clipped_ratio,
    kl_estimate,
    log_mixture,
    log_mixture_ratio,
    responsibility,
)
from ..types import LogProbs, TraceBatch
from .world import World

PRIOR_SAMPLE = "prior sample"
CORRECTED = "posterior sample, c = (1−w)/w"
PUBLISHED = "posterior sample, c = 1"
KNOBS = ("distance", "composite_weight")
# The setting in which every method's gradient is exact: nothing traded for lower noise.
EXACT_SETTINGS = {
    "clip": "none",
    "loss_aggregation": "trace_sum",
    "baseline": "none",
    "advantage_scale": "none",
    "advantage_clip": 0.0,
    "kl_weight": 1.0,
    "nll_weight": 1.0,
    "std_filter": 0.0,
}


def _moments(values: Tensor, law: Tensor) -> tuple[float, float]:
    """Mean and standard deviation of ``values`` under the probabilities ``law``."""
    mean = (law * values).sum()
    return mean.item(), (law * (values - mean) ** 2).sum().sqrt().item()


def _draws(values: Tensor, law: Tensor, samples: int, generator: torch.Generator) -> tuple[float, float]:
    """Mean and standard deviation of ``samples`` independent draws of ``values``."""
    drawn = values[torch.multinomial(law, samples, replacement=True, generator=generator)]
    return drawn.mean().item(), drawn.std().item()


# --- KL(p'||p)


def kl_estimators(world: World, weight: float, samples: int = 0, seed: int = 0) -> pd.DataFrame:
    """The estimators of KL(p'||p) on a one-token world, a row each; all values in nats.

    estimator; exact: KL(p'||p); expected, deviation: mean and standard deviation of one sample, as sums;
    lowest: the least value one sample can give; with ``samples`` also mean, sample_deviation and
    standard_error of as many draws.
    """
    if world.length != 1:
        raise ValueError(f"the estimators are per token: the world needs length 1, not {world.length}")
    with torch.no_grad():
        tokens = world.logprobs().rows(slice(len(world.traces)))
        p, q = world.prior_probs(), world.posterior_probs()
        exact = world.composite_kl(weight).item()

        def library(from_prior: bool) -> Tensor:
            source = torch.full((len(p),), from_prior)
            return kl_estimate(tokens, tokens, source, weight, "exact")[:, 0]

        log_u = log_mixture_ratio(tokens.posterior - tokens.prior, weight)[:, 0]
        log_v = (log_mixture(tokens, weight) - tokens.posterior)[:, 0]
        published = log_v.exp() * log_u + torch.expm1(log_v)
        kinds = [
            (PRIOR_SAMPLE, library(True), p),
            (CORRECTED, library(False), q),
            (PUBLISHED, published, q),
        ]
        generator, rows = torch.Generator().manual_seed(seed), []
        for name, values, law in kinds:
            expected, deviation = _moments(values, law)
            row = {"estimator": name, "exact": exact, "expected": expected, "deviation": deviation}
            row["lowest"] = values.min().item()
            if samples:
                row["mean"], row["sample_deviation"] = _draws(values, law, samples, generator)
                row["standard_error"] = row["sample_deviation"] / math.sqrt(samples)
            rows.append(row)
    return pd.DataFrame(rows)


def kl_sweep(
    world: World,
    over: str,
    values: Iterable[float],
    *,
    distance: float = 1.0,
    composite_weight: float = 0.5,
    temperature: float = 1.0,
    samples: int = 0,
    seed: int = 0,
) -> pd.DataFrame:
    """``kl_estimators`` for every value of ``over`` ("distance" or "composite_weight"), the other held.

    The columns distance and composite_weight say where a row was computed, ``over`` which of them varies.
    """
    if over not in KNOBS:
        raise ValueError(f"over must be one of {', '.join(KNOBS)}, not {over!r}")
    frames = []
    for k, value in enumerate(values):
        at = {"distance": distance, "composite_weight": composite_weight} | {over: float(value)}
        moved = world.between(at["distance"], temperature)
        frame = kl_estimators(moved, at["composite_weight"], samples, seed + 1000 * k)
        frames.append(frame.assign(over=over, **at))
    return pd.concat(frames, ignore_index=True)


# --- gradients


def _verifier_reward(world: World) -> Tensor:
    """A verifier's score of each trace: 1 where the answer is more probable than after the median trace."""
    likely = world.answer_logprobs().sum(1).detach()
    return (likely > likely.median()).double()


def _objective(world: World, name: str, weight: float, reference: Tensor) -> Tensor:
    """What a method's gradient is the gradient of, when nothing is traded for lower noise; a scalar."""
    law, answer = world.prior_probs(), world.answer_logprobs()
    if name in ("covrl_published", "ravr_like"):
        return world.elbo(weight)
    if name == "verifree":
        return world.log_evidence().exp()
    if name == "rlpr":  # the reward is a constant to the policy: no answer term
        return (law * (0.9 * answer.exp().mean(1) + 0.1).detach()).sum()
    if name == "grpo":
        return (law * _verifier_reward(world)).sum()
    bound = world.jensen_bound()
    if name == "latro":
        kl = (law * (law.log() - reference)).sum()
        bound = bound - METHOD_DEFAULTS["latro"]["reference_kl_weight"] * kl
    return bound


def _spread(gradients: Tensor, law: Tensor, truth: Tensor) -> tuple[float, float]:
    """Bias and noise of per-rollout gradients (rollouts, logits), both divided by the norm of ``truth``.

    NaN where the true gradient is zero.
    """
    norm = truth.norm()
    if norm < 1e-12:
        return math.nan, math.nan
    mean = law @ gradients
    noise = (law @ (gradients - mean).square().sum(1)).sqrt()
    return ((mean - truth).norm() / norm).item(), (noise / norm).item()


def method_gradients(world: World, name: str, config: RunConfig, reference: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Minus the loss gradient of every single rollout (rollouts, logits), their law, the exact gradient.

    ``reference`` is log p of each trace under the frozen base, (traces,).
    """
    method, law = METHODS[name], world.sampling_probs(config.alpha)
    new = world.logprobs()
    old = dataclasses.replace(new.detach(), ref_prior=reference.repeat(2)[:, None])
    batch = dataclasses.replace(world.batch(), verifier_reward=_verifier_reward(world).repeat(2))
    drawn, gradients = law.nonzero()[:, 0], []
    for i in drawn.tolist():
        part, part_old = batch.rows([i]), old.rows([i])
        credit = method.credit(part, part_old, config, {})
        totals = Totals.of(part, credit, part_old.answer_mask)
        loss, _ = method.loss(new.rows([i]), part_old, part, credit, totals, config)
        gradients.append(-world.gradient(loss))
    truth = world.gradient(_objective(world, name, config.composite_weight, reference))
    return torch.stack(gradients), law[drawn], truth


def gradient_quality(
    world: World,
    alpha: float,
    composite_weight: float,
    clip_range: float,
) -> pd.DataFrame:
    """Bias and noise of one rollout's gradient, for the KL term alone and for every method's whole loss.

    estimator; part ("KL term" or "whole loss"); bias: norm of the expected gradient minus the exact one;
    noise: root of the summed variances over all logits; both as multiples of the exact gradient's norm, NaN
    where that is zero. Group size 1, so no baseline; no clip except in the row that names it. The world must
    have one-token traces.
    """
    if world.length != 1:
        raise ValueError(f"only one-token traces are exact: the world needs length 1, not {world.length}")
    rows = []

    def add(part: str, name: str, gradients: Tensor, law: Tensor, truth: Tensor) -> None:
        bias, noise = _spread(gradients, law, truth)
        rows.append({"part": part, "estimator": name, "bias": bias, "noise": noise})

    tokens = world.logprobs().rows(slice(len(world.traces)))
    truth = world.gradient(world.composite_kl(composite_weight))
    for source, law in (("prior", world.prior_probs()), ("posterior", world.posterior_probs())):
        for kind in ("exact", "published"):
            from_prior = torch.full((len(law),), source == "prior")
            values = kl_estimate(tokens, tokens.detach(), from_prior, composite_weight, kind)[:, 0]
            gradients = torch.stack([world.gradient(value) for value in values])
            add("KL term", f"{source} sample, {kind}", gradients, law.detach(), truth)

    # The frozen base of LaTRO and nothing else: the prior, half as sharp.
    reference = (world.prior[0] / 2).log_softmax(1)[0].detach()
    variants = {name: {} for name in METHODS if name != "covrl"}  # its bound is about groups, not single rollouts
    variants["covrl_published, published KL gradient"] = {"kl_gradient": "published"}
    variants["covrl_published, clipped"] = {
        "clip": "ppo",
        "clip_range": clip_range,
        "clip_range_high": clip_range,
    }
    for label, changes in variants.items():
        name = label.split(",")[0]
        own = {"alpha": alpha, "composite_weight": composite_weight, "nll_gate": "none"}
        settings = EXACT_SETTINGS | (own if name == "covrl_published" else {}) | changes
        config = RunConfig(method=name, **settings_read(name, settings))
        add("whole loss", label, *method_gradients(world, name, config, reference))
    order = {
        "covrl_published": 0,
        "covrl_published, published KL gradient": 1,
        "covrl_published, clipped": 2,
    }
    rows.sort(key=lambda row: (row["part"], order.get(row["estimator"], 3)))
    return pd.DataFrame(rows)


# --- ratios and responsibilities


def _tokens(world: World) -> tuple[LogProbs, TraceBatch]:
    return world.logprobs().detach(), world.batch()


def ratio_range(
    world: World,
    alphas: Iterable[float],
    composite_weight: float,
    clip_range: float,
    samples: int = 0,
    seed: int = 0,
) -> pd.DataFrame:
    """The ratios p'/h before any update and the share of tokens the clip touches, a row for each alpha.

    bound_low, bound_high: between w/alpha and (1-w)/(1-alpha), whatever p and q; low, high: the world's own
    least and largest; touched: probability that a sampled token's ratio is cut for an advantage of either
    sign; touched_positive, touched_negative: for that sign; with ``samples`` (traces) also mean and
    standard_error of the touched share over as many draws.
    """
    old, batch = _tokens(world)
    generator, rows = torch.Generator().manual_seed(seed), []
    for alpha in alphas:
        alpha = float(alpha)
        log_ratio = log_mixture(old, composite_weight) - log_mixture(old, alpha)
        law = world.sampling_probs(alpha)
        held = {
            sign: clipped_ratio(log_ratio, torch.full((len(batch),), value), "ppo", clip_range)[1]
            for sign, value in (("positive", 1.0), ("negative", -1.0))
        }
        either = (held["positive"] | held["negative"]).double().mean(1)
        ends = [
            composite_weight / alpha if alpha else math.inf,
            (1 - composite_weight) / (1 - alpha) if alpha < 1 else math.inf,
        ]
        row = {
            "alpha": alpha,
            "bound_low": min(ends),
            "bound_high": max(ends),
            "low": log_ratio.min().exp().item(),
            "high": log_ratio.max().exp().item(),
            "touched": (law @ either).item(),
        }
        row |= {f"touched_{sign}": (law @ cut.double().mean(1)).item() for sign, cut in held.items()}
        if samples:
            row["mean"], deviation = _draws(either, law, samples, generator)
            row["standard_error"] = deviation / math.sqrt(samples)
        rows.append(row)
    return pd.DataFrame(rows).assign(composite_weight=composite_weight, clip_range=clip_range)


def responsibilities(
    world: World,
    distances: Iterable[float],
    composite_weight: float,
    temperature: float = 1.0,
    samples: int = 0,
    seed: int = 0,
) -> pd.DataFrame:
    """rho = w p / p' of sampled tokens against the distance, rows for "prior" and "posterior" traces.

    rho is the share of a token's policy gradient that reaches the prior. expected: mean over a source's
    traces, as a sum; lowest, highest: over all tokens; with ``samples`` (traces) also mean, standard_error.
    """
    generator, rows = torch.Generator().manual_seed(seed), []
    for distance in distances:
        moved = world.between(float(distance), temperature)
        old, batch = _tokens(moved)
        rho = responsibility(old, composite_weight)
        for source, keep, alpha in (
            ("prior", batch.from_prior, 1.0),
            ("posterior", ~batch.from_prior, 0.0),
        ):
            law, values = moved.sampling_probs(alpha)[keep], rho[keep].mean(1)
            row = {"distance": float(distance), "source": source, "expected": (law @ values).item()}
            row |= {"lowest": rho.min().item(), "highest": rho.max().item()}
            if samples:
                row["mean"], deviation = _draws(values, law, samples, generator)
                row["standard_error"] = deviation / math.sqrt(samples)
            rows.append(row)
    return pd.DataFrame(rows).assign(composite_weight=composite_weight)
