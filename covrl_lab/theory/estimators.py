"""How good the estimators are: data frames from an enumerable world, exact sums beside random draws.

Everything goes through the library's own functions (``objectives``, ``methods``), one rollout at a time, on a
``world.World``. The knobs are ``alpha``, ``composite_weight`` w, ``clip_range``, the distance between p and q
and the temperature (``World.between``). Nothing here plots.
"""

import dataclasses
import itertools
import math
from collections import Counter
from collections.abc import Iterable, Sequence

import pandas as pd
import torch
from torch import Tensor

from ..config import RunConfig
from ..defaults import METHOD_DEFAULTS, settings_read
from ..train.methods import METHODS
from ..train.objectives import Totals, clipped_ratio, kl_estimate, log_mixture, log_mixture_ratio, responsibility
from .world import World

PRIOR_SAMPLE = "prior sample"
CORRECTED = "posterior sample, c = (1−w)/w"
PUBLISHED = "posterior sample, c = 1"
KNOBS = ("distance", "composite_weight")
# The setting in which every method's gradient is exact: nothing traded for lower noise.
EXACT_SETTINGS = {"clip": "none", "loss_aggregation": "trace_sum", "baseline": "none", "advantage_scale": "none"}
EXACT_SETTINGS |= {"advantage_clip": 0.0, "kl_weight": 1.0, "nll_weight": 1.0, "std_filter": 0.0}


def _draws(values: Tensor, probs: Tensor, samples: int, generator: torch.Generator) -> dict[str, float]:
    """Mean of ``samples`` independent draws of ``values``, their deviation and its standard error; {} for none."""
    if not samples:
        return {}
    drawn = values[torch.multinomial(probs, samples, replacement=True, generator=generator)]
    mean, deviation = drawn.mean().item(), drawn.std().item()
    return {"mean": mean, "sample_deviation": deviation, "standard_error": deviation / math.sqrt(samples)}


def _need_one_token(world: World) -> None:
    if world.length != 1:
        raise ValueError(f"only one-token traces are exact: the world needs length 1, not {world.length}")


# --- KL(p'||p)


def kl_estimators(world: World, weight: float, samples: int = 0, seed: int = 0) -> pd.DataFrame:
    """The estimators of KL(p'||p) on a one-token world, a row each; all values in nats.

    exact: KL(p'||p); expected, deviation: mean and standard deviation of one sample, as sums; lowest: its least value;
    with ``samples`` also mean, sample_deviation and standard_error of as many draws.
    """
    _need_one_token(world)
    generator, rows = torch.Generator().manual_seed(seed), []
    with torch.no_grad():
        tokens, source = world.logprobs().rows(slice(len(world.traces))), torch.ones(len(world.traces), dtype=bool)
        p, q = world.prior_probs(), world.posterior_probs()
        log_u = log_mixture_ratio(tokens.posterior - tokens.prior, weight)[:, 0]
        log_v = (log_mixture(tokens, weight) - tokens.posterior)[:, 0]
        for name, values, probs in (
            (PRIOR_SAMPLE, kl_estimate(tokens, tokens, source, weight, "exact")[:, 0], p),
            (CORRECTED, kl_estimate(tokens, tokens, ~source, weight, "exact")[:, 0], q),
            (PUBLISHED, log_v.exp() * log_u + torch.expm1(log_v), q),
        ):
            expected = (probs * values).sum()
            deviation = (probs * (values - expected) ** 2).sum().sqrt()
            row = {"estimator": name, "exact": world.composite_kl(weight).item(), "expected": expected.item()}
            row |= {"deviation": deviation.item(), "lowest": values.min().item()}
            rows.append(row | _draws(values, probs, samples, generator))
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
    probs, answer = world.prior_probs(), world.answer_logprobs()
    if name in ("covrl_published", "ravr_like"):
        return world.elbo(weight)
    if name == "verifree":
        return world.log_evidence().exp()
    if name == "rlpr":  # the reward is a constant to the policy: no answer term
        return (probs * (0.9 * answer.exp().mean(1) + 0.1).detach()).sum()
    if name == "grpo":
        return (probs * _verifier_reward(world)).sum()
    if name == "latro":
        kl = (probs * (probs.log() - reference)).sum()
        return world.jensen_bound() - METHOD_DEFAULTS["latro"]["reference_kl_weight"] * kl
    return world.jensen_bound()


def method_gradients(world: World, name: str, config: RunConfig, reference: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Minus the loss gradient of every single rollout (rollouts, logits), their probabilities, the exact gradient.

    ``reference`` is log p of each trace under the frozen base, (traces,).
    """
    method, probs = METHODS[name], world.sampling_probs(config.alpha)
    new = world.logprobs()
    old = dataclasses.replace(new.detach(), ref_prior=reference.repeat(2)[:, None])
    batch = dataclasses.replace(world.batch(), verifier_reward=_verifier_reward(world).repeat(2))
    drawn, gradients = probs.nonzero()[:, 0], []
    for i in drawn.tolist():
        part, part_old = batch.rows([i]), old.rows([i])
        credit = method.credit(part, part_old, config, {})
        totals = Totals.of(part, part_old.answer_mask)
        loss, _ = method.loss(new.rows([i]), part_old, part, credit, totals, config)
        gradients.append(-world.gradient(loss))
    truth = world.gradient(_objective(world, name, config.composite_weight, reference))
    return torch.stack(gradients), probs[drawn], truth


def gradient_quality(world: World, alpha: float, composite_weight: float, clip_range: float) -> pd.DataFrame:
    """Bias and noise of one rollout's gradient, for the KL term alone and for every method's whole loss.

    estimator; part ("KL term" or "whole loss"); bias: norm of the expected gradient minus the exact one; noise: root of
    the summed variances over all logits; both as multiples of the exact gradient's norm, NaN where that is zero. For
    one-token worlds; no clip except in the row that names it.
    """
    _need_one_token(world)
    rows = []

    def add(part: str, name: str, gradients: Tensor, probs: Tensor, truth: Tensor) -> None:
        mean, norm = probs @ gradients, truth.norm() if truth.norm() > 1e-12 else math.nan
        noise = (probs @ (gradients - mean).square().sum(1)).sqrt()
        bias, noise = float((mean - truth).norm() / norm), float(noise / norm)
        rows.append({"part": part, "estimator": name, "bias": bias, "noise": noise})

    tokens = world.logprobs().rows(slice(len(world.traces)))
    truth = world.gradient(world.composite_kl(composite_weight))
    for source, probs in (("prior", world.prior_probs()), ("posterior", world.posterior_probs())):
        for kind in ("exact", "published"):
            from_prior = torch.full((len(probs),), source == "prior")
            values = kl_estimate(tokens, tokens.detach(), from_prior, composite_weight, kind)[:, 0]
            gradients = torch.stack([world.gradient(value) for value in values])
            add("KL term", f"{source} sample, {kind}", gradients, probs.detach(), truth)

    # The frozen base of LaTRO and nothing else: the prior, half as sharp.
    reference = (world.prior[0] / 2).log_softmax(1)[0].detach()
    own = {"alpha": alpha, "composite_weight": composite_weight, "nll_gate": "none"}
    clip = {"clip": "ppo", "clip_range": clip_range, "clip_range_high": clip_range}
    variants = {
        "covrl_published": own,
        "covrl_published, published KL gradient": own | {"kl_gradient": "published"},
        "covrl_published, clipped": own | clip,
    }
    # Not covrl: its bound is about groups, not single rollouts.
    variants |= {name: {} for name in METHODS if name not in ("covrl", "covrl_published")}
    for label, changes in variants.items():
        name = label.split(",")[0]
        config = RunConfig(method=name, **settings_read(name, EXACT_SETTINGS | changes))
        add("whole loss", label, *method_gradients(world, name, config, reference))
    return pd.DataFrame(rows)


def group_splits(world: World, size: int = 4, floor: float = -2.5) -> pd.DataFrame:
    """``covrl``'s group bound, a row for each split of ``size`` traces between prior and posterior; ``floor`` is log c.

    alpha: the prior's share; gap: nats by which the bound lies below log(c + p(y|x)); noise: root of the summed
    variances of one group's gradient over all logits, as a multiple of its expectation's norm. Sums over all
    groups, so for one-token worlds; groups that differ in the order of their traces are computed once.
    """
    _need_one_token(world)
    config, method, rows = RunConfig(method="covrl", evidence_floor=1.0, posterior_weight=0.0), METHODS["covrl"], []
    new, count = world.logprobs(), len(world.traces)
    new = dataclasses.replace(new, no_trace=torch.full_like(new.answer, floor / world.answer_tokens))
    old, chances = new.detach(), torch.cat([world.prior_probs(), world.posterior_probs()]).detach()
    limit = (math.exp(floor) + world.log_evidence().exp()).log().item()
    for posterior in range(size + 1):
        drawn = (range(count), size - posterior), (range(count, 2 * count), posterior)
        halves = itertools.product(*itertools.starmap(itertools.combinations_with_replacement, drawn))
        bound, probs, gradients = 0.0, [], []
        for half in halves:
            group = [*half[0], *half[1]]
            part, part_old = dataclasses.replace(world.batch().rows(group), group_size=size), old.rows(group)
            credit = method.credit(part, part_old, config, {})
            totals = Totals.of(part, part_old.answer_mask)
            gradients.append(-world.gradient(method.loss(new.rows(group), part_old, part, credit, totals, config)[0]))
            probs.append(chances[group].prod() * math.prod(map(_orders, half)))
            bound += (probs[-1] * (math.exp(floor) + credit.reward.mean()).log()).item()
        probs, gradients = torch.stack(probs), torch.stack(gradients)
        mean = probs @ gradients
        noise = (probs @ (gradients - mean).square().sum(1)).sqrt() / mean.norm()
        rows.append({"alpha": 1 - posterior / size, "gap": limit - bound, "noise": noise.item()})
    return pd.DataFrame(rows)


def _orders(traces: Sequence[int]) -> int:
    """The orders in which traces, some of them alike, can be drawn."""
    return math.factorial(len(traces)) // math.prod(map(math.factorial, Counter(traces).values()))


# --- ratios and responsibilities


def ratio_range(
    world: World, alphas: Iterable[float], composite_weight: float, clip_range: float, samples: int = 0, seed: int = 0
) -> pd.DataFrame:
    """The ratios p'/h before any update and the share of tokens the clip touches, a row for each alpha.

    bound_low, bound_high: w/alpha and (1-w)/(1-alpha), whatever p and q; low, high: the world's own; touched:
    probability that a sampled token's ratio is cut for an advantage of either sign; touched_positive,
    touched_negative: for that sign; with ``samples`` (traces) also mean, sample_deviation and standard_error.
    """
    old, generator, rows = world.logprobs().detach(), torch.Generator().manual_seed(seed), []
    for alpha in map(float, alphas):
        log_ratio = log_mixture(old, composite_weight) - log_mixture(old, alpha)
        probs = world.sampling_probs(alpha)
        positive, negative = (
            clipped_ratio(log_ratio, torch.full((len(probs),), sign), "ppo", clip_range)[1] for sign in (1.0, -1.0)
        )
        w, either = composite_weight, (positive | negative).double().mean(1)
        ends = [w / alpha if alpha else math.inf, (1 - w) / (1 - alpha) if alpha < 1 else math.inf]
        row = {"alpha": alpha, "bound_low": min(ends), "bound_high": max(ends)}
        row |= {"low": log_ratio.min().exp().item(), "high": log_ratio.max().exp().item()}
        row["touched"] = (probs @ either).item()
        for name, where in (("touched_positive", positive), ("touched_negative", negative)):
            row[name] = (probs @ where.double().mean(1)).item()
        rows.append(row | _draws(either, probs, samples, generator))
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

    expected: mean over a source's traces, as a sum; lowest, highest: over all tokens; with ``samples`` (traces) also
    mean, sample_deviation and standard_error of as many draws.
    """
    generator, rows = torch.Generator().manual_seed(seed), []
    for distance in map(float, distances):
        moved = world.between(distance, temperature)
        rho = responsibility(moved.logprobs().detach(), composite_weight)[: len(world.traces)]
        for source, probs in (("prior", moved.prior_probs()), ("posterior", moved.posterior_probs())):
            probs, values = probs.detach(), rho.mean(1)
            row = {"distance": distance, "source": source, "expected": (probs @ values).item()}
            row |= {"lowest": rho.min().item(), "highest": rho.max().item()}
            rows.append(row | _draws(values, probs, samples, generator))
    return pd.DataFrame(rows).assign(composite_weight=composite_weight)
