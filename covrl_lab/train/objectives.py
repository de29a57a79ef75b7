"""The objective in pure functions: mixtures, KL, rewards, advantages, clip, and the loss they make.

Symbols of CoVRL (arXiv 2512.12576), per token given its prefix; w is ``composite_weight``:

    p, q           prior and posterior: the same weights under two prompts
    p' = w p + (1-w) q          composite, what is optimised (paper: w = 1/2)
    h  = alpha p + (1-alpha) q  hybrid, what traces are drawn from
    u = p'/p,  v = p'/q,  so that w/u + (1-w)/v = 1
    d = log q - log p,  a = log u = log(w + (1-w) e^d)
    rho = w/u      responsibility of the prior: grad log p' = rho grad log p + (1-rho) grad log q

The loss of a step is

    - mean A f(p'_new / h_old)  +  kl_weight mean KL(p'||p)  -  nll_weight mean c_y log p(y|x,z)

METHODS.md says where its gradient is exactly that of a bound on log p(y|x). With w = alpha = 1 the composite and the
hybrid are the prior, and it is REINFORCE or PPO on the traces plus an answer term.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor

from ..config import RunConfig
from ..types import Credit, LogProbs, TraceBatch

LOG_RATIO_CAP = 30.0  # nats: exp() of a log-ratio is cut here, where float32 would soon overflow


# --- the two mixtures


def log_mixture_ratio(d: Tensor, weight: float) -> Tensor:
    """log((weight p + (1 - weight) q) / p) from d = log q - log p, accurate near d = 0 and far from it."""
    if weight == 1:
        return torch.zeros_like(d)
    if weight == 0:
        return d
    near = torch.log1p((1 - weight) * torch.expm1(d.clamp(-1, 1)))
    far = torch.logaddexp(torch.full_like(d, math.log(weight)), d + math.log1p(-weight))
    return torch.where(d.abs() < 1, near, far)


def log_mixture(logprobs: LogProbs, weight: float) -> Tensor:
    """log(weight p + (1 - weight) q), (N, T): the composite p' at w, the hybrid h at alpha."""
    if weight == 1 or logprobs.posterior is None:
        if weight != 1:
            raise ValueError(f"a mixture with weight {weight} needs posterior log-probabilities")
        return logprobs.prior
    return logprobs.prior + log_mixture_ratio(logprobs.posterior - logprobs.prior, weight)


def responsibility(logprobs: LogProbs, weight: float) -> Tensor:
    """rho = w p / p', (N, T): the share of a token's policy gradient that reaches the prior."""
    if weight in (0, 1):
        return torch.full_like(logprobs.prior, weight)
    odds = math.log(weight) - math.log1p(-weight)
    return torch.sigmoid(logprobs.prior - logprobs.posterior + odds)


# --- KL(p'||p)


def kl_estimate(new: LogProbs, old: LogProbs, from_prior: Tensor, weight: float, gradient: str) -> Tensor:
    """Low-variance estimates of KL(p'||p) at each visited prefix, (N, T), never negative at new = old.

    From a prior sample k_P = u log u - u + 1, from a posterior sample k_Q = (p/q) k_P, which is
    v log u + c (v - 1) with c = (1-w)/w. Both have expectation KL(p'||p) under their own source.

    gradient="published" differentiates every p and q, also those in the sampling weights u and v: a biased gradient.
    "exact" holds these at their old values (u = p'_new / p_old, v = p'_new / q_old), for an exact one.
    """
    a = log_mixture_ratio(new.posterior - new.prior, weight)
    if gradient == "published":
        a_weight, source = a, new
    else:
        a_weight, source = a + (new.prior - old.prior), old
    a_weight = a_weight.clamp_max(LOG_RATIO_CAP)
    # e^{a_weight} a - (e^{a_weight} - 1), arranged so that nothing cancels near u = 1.
    k_prior = torch.expm1(a_weight) * a - _expm1_minus(a_weight) + (a - a_weight)
    log_importance = torch.where(from_prior[:, None], 0.0, source.prior - source.posterior)
    return log_importance.clamp_max(LOG_RATIO_CAP).exp() * k_prior


def _expm1_minus(x: Tensor) -> Tensor:
    """e^x - 1 - x, by its series where the difference would cancel."""
    small = x.clamp(-0.05, 0.05)
    series = torch.zeros_like(x)
    for k in range(9, 1, -1):
        series = series * small + 1 / math.factorial(k)
    return torch.where(x.abs() < 0.05, small**2 * series, torch.expm1(x) - x)


# --- rewards and advantages


def whole_trace(values: Tensor, mask: Tensor) -> Tensor:
    """Sum over the tokens of a trace, or of an answer, in float64; (N, T) to (N,)."""
    return torch.where(mask, values, 0.0).double().sum(1)


def answer_reward(logprobs: LogProbs, kind: str) -> Tensor:
    """R(z) from the reference answer's token log-probabilities, (N,).

    sum_logprob log p(y|x,z); mean_logprob the same a token; probability p(y|x,z); mean_probability the
    arithmetic mean of the probabilities of the answer's own tokens, without its wrapper (RLPR).
    """
    tokens, mask = logprobs.answer_mask.sum(1), logprobs.answer_mask
    if kind == "mean_probability":
        core = mask if logprobs.answer_core is None else logprobs.answer_core
        return torch.where(core, logprobs.answer.exp(), 0.0).sum(1) / core.sum(1)
    total = torch.where(mask, logprobs.answer, 0.0).sum(1)
    return {"sum_logprob": total, "mean_logprob": total / tokens, "probability": total.exp()}[kind]


def floor_unfinished(reward: Tensor, batch: TraceBatch, kind: str, penalty: float) -> Tensor:
    """Replace unfinished traces' rewards so that never stopping cannot pay.

    Log-rewards become the group's worst finished reward minus ``penalty`` (nats; equal for all where none finished);
    probabilities become 0.
    """
    if kind in ("probability", "mean_probability"):
        return torch.where(batch.finished, reward, 0.0)
    groups, finished = reward.view(-1, batch.group_size), batch.finished.view(-1, batch.group_size)
    worst = groups.masked_fill(~finished, math.inf).amin(1, keepdim=True)
    worst = torch.where(worst.isinf(), groups.amin(1, keepdim=True), worst)
    return torch.where(finished, groups, worst - penalty).flatten()


def advantages(
    reward: Tensor, group_size: int, baseline: str, scale: str, clip: float = 0.0, from_prior: Tensor | None = None
) -> Tensor:
    """Centre (and scale) rewards within groups of ``group_size``; (N,) to (N,).

    "mean" is the joint mean of a group, "leave_one_out" the mean of the others. Where ``from_prior`` (N,) says that a
    group holds at least two traces of each source, it is the sources' leave-one-out means, each with its share of the
    group: a plain mean of the others would tell which source the trace came from, and so bias the gradient.
    """
    if reward.dim() != 1:
        raise ValueError(f"rewards must have shape (N,), got {tuple(reward.shape)}")
    groups = reward.view(-1, group_size)
    advantage = groups
    if baseline != "none":
        mean = groups.mean(1, keepdim=True)
        if baseline == "leave_one_out":
            mean = (groups.sum(1, keepdim=True) - groups) / (group_size - 1)
            if from_prior is not None:
                mean = _balanced_mean(groups, from_prior.view(-1, group_size), mean)
        equal = groups.amax(1, keepdim=True) == groups.amin(1, keepdim=True)
        advantage = torch.where(equal, 0.0, groups - mean)  # not the mean's rounding error
    if scale == "std":
        advantage = advantage / (groups.std(1, keepdim=True, correction=0) + 1e-4)
    if clip:
        advantage = advantage.clamp(-clip, clip)
    return advantage.flatten()


def _balanced_mean(groups: Tensor, from_prior: Tensor, otherwise: Tensor) -> Tensor:
    """Leave-one-out mean by source, weighed by the sources' shares, (B, G); ``otherwise`` where one is rare."""
    found = torch.zeros_like(groups)
    enough = torch.ones_like(from_prior[:, :1])
    for source in (from_prior, ~from_prior):
        count = source.sum(1, keepdim=True)
        total = torch.where(source, groups, 0.0).sum(1, keepdim=True)
        left = torch.where(source, count - 1, count)
        found += count * (total - torch.where(source, groups, 0.0)) / left.clamp_min(1)
        enough = enough & (count >= 2)
    return torch.where(enough, found / groups.shape[1], otherwise)


# --- credit and loss


def likelihood_credit(
    batch: TraceBatch, old: LogProbs, config: RunConfig, state: Mapping[str, float] | None = None
) -> Credit:
    """Credit of the likelihood-rewarded methods, which carry no state: reward, advantage, gated answer term.

    nll_gate="prior_positive" keeps the answer term for finished prior traces of positive advantage (CoVRL);
    "none" keeps every finished trace with the weight P'(z)/H(z) of the whole trace (1 for JLB; exact for the
    bound at any length); "reward" weighs each by its reward (VeriFree).
    """
    reward = answer_reward(old, config.reward)
    reward = floor_unfinished(reward, batch, config.reward, config.unfinished_penalty)
    how = config.baseline, config.advantage_scale, config.advantage_clip
    advantage = advantages(reward, batch.group_size, *how, batch.from_prior)
    if config.nll_gate == "prior_positive":
        answer_weight = (batch.from_prior & batch.finished & (advantage > 0)).to(reward)
    elif config.nll_gate == "reward":
        answer_weight = reward * batch.finished
    else:
        log_weight = trace_log_weight(old, batch.mask, config.composite_weight, config.alpha)
        answer_weight = (log_weight.clamp_max(LOG_RATIO_CAP).exp() * batch.finished).to(reward)
    return Credit(reward, advantage, answer_weight)


def trace_log_weight(logprobs: LogProbs, mask: Tensor, weight: float, alpha: float) -> Tensor:
    """log P'(z)/H(z), (N,) float64, for whole traces: P' = prod_t p', and H = alpha P + (1-alpha) Q, as each trace is
    drawn from one prompt."""
    composite, prior = whole_trace(log_mixture(logprobs, weight), mask), whole_trace(logprobs.prior, mask)
    if alpha == 1:
        return composite - prior
    gap = whole_trace(logprobs.posterior, mask) - prior
    return composite - prior - log_mixture_ratio(gap, alpha)


@dataclass(frozen=True)
class Totals:
    """What a whole step's sums are divided by, so that cutting it into micro-batches changes nothing."""

    traces: int
    trace_tokens: int
    kl_tokens: int  # of finished traces
    answer_tokens: int

    @classmethod
    def of(cls, batch: TraceBatch, answer_mask: Tensor) -> Self:
        """Count a step; ``answer_mask`` is (N, A)."""
        counted = (batch.mask, batch.mask & batch.finished[:, None], answer_mask)
        return cls(len(batch), *(int(mask.sum()) for mask in counted))


def clipped_ratio(
    log_ratio: Tensor, advantage: Tensor, clip: str, epsilon: float, epsilon_high: float | None = None
) -> tuple[Tensor, Tensor]:
    """A f(r) and where the clip holds the gradient back, both (N, T), for r = e^{log_ratio}.

    "ppo": min(A r, A clip(r, 1-e, 1+e_high)); e_high = e unless given. "soft": A (1 + e tanh((r-1)/e)),
    which equals SAPO's sigmoid gate with tau = 2/e up to a constant: slope 1 at r = 1, saturating smoothly
    at 1 +- e. "none": A r.
    """
    ratio = log_ratio.clamp_max(LOG_RATIO_CAP).exp()
    weight = advantage[:, None]
    outside = (ratio - 1).abs() > epsilon
    if clip == "soft":
        return weight * (1 + epsilon * torch.tanh((ratio - 1) / epsilon)), outside
    if clip == "none":
        return weight * ratio, torch.zeros_like(outside)
    cut = weight * ratio.clamp(1 - epsilon, 1 + (epsilon if epsilon_high is None else epsilon_high))
    return torch.minimum(weight * ratio, cut), cut < weight * ratio


def coupled_loss(
    new: LogProbs, old: LogProbs, batch: TraceBatch, credit: Credit, totals: Totals, config: RunConfig
) -> tuple[Tensor, dict[str, Tensor]]:
    """The loss in this module's docstring for some of a step's rollouts, divided by the step's totals.

    ``old`` are the log-probabilities the traces were drawn with (detached). Returns the scalar loss and
    its detached parts, which add up over micro-batches like the loss does.
    """

    def mean(values: Tensor, keep: Tensor, tokens: int) -> Tensor:
        kept = torch.where(keep, values, 0.0).sum()
        return kept / max(1, tokens if config.loss_aggregation == "token_mean" else totals.traces)

    log_ratio = log_mixture(new, config.composite_weight) - log_mixture(old, config.alpha)
    log_ratio, clip = torch.where(batch.mask, log_ratio, 0.0), (config.clip, config.clip_range, config.clip_range_high)
    surrogate, clipped = clipped_ratio(log_ratio, credit.advantage, *clip)
    parts = {"policy": -mean(surrogate, batch.mask, totals.trace_tokens)}
    parts["nll"] = -mean(credit.answer_weight[:, None] * new.answer, new.answer_mask, totals.answer_tokens)
    loss = parts["policy"] + config.nll_weight * parts["nll"]
    if new.posterior is not None and config.composite_weight < 1:
        kl = kl_estimate(new, old, batch.from_prior, config.composite_weight, config.kl_gradient)
        parts["kl"] = mean(kl, batch.mask & batch.finished[:, None], totals.kl_tokens)
        loss = loss + config.kl_weight * parts["kl"]
    parts["clipped_share"] = (clipped & batch.mask).sum() / max(1, totals.trace_tokens)
    return loss, {name: value.detach() for name, value in parts.items()}


# --- the group bound (METHODS.md): a question's traces inside one logarithm


def source_weights(old: LogProbs, batch: TraceBatch) -> tuple[Tensor, Tensor]:
    """P(z)/H(z) and Q(z)/H(z) of whole traces, (N,) float64, with H = (n_p P + n_q Q) / G.

    n_p and n_q are the traces that prior and posterior drew for this question: the balance heuristic of multiple
    importance sampling (Veach and Guibas 1995). Without log q the weights are 1 and 0.
    """
    log_p = whole_trace(old.prior, batch.mask)
    if old.posterior is None:
        return torch.ones_like(log_p), torch.zeros_like(log_p)
    log_q = whole_trace(old.posterior, batch.mask)
    groups = batch.from_prior.view(-1, batch.group_size).double()
    share = groups.mean(1, keepdim=True).expand_as(groups).flatten()
    log_h = torch.logaddexp(share.log() + log_p, torch.log1p(-share) + log_q)
    return (log_p - log_h).exp(), (log_q - log_h).exp()


def group_credit(evidence: Tensor, floor: Tensor, from_prior: Tensor) -> tuple[Tensor, Tensor]:
    """Credit s_i = e_i / (c + mean e) and its baseline b_i; all (B, G), floor c (B, 1).

    The baseline is what the group would earn, E / (c + E), without trace i and without one trace of the other
    source, averaged over which one. So it is distributed alike whichever source drew trace i, which keeps a
    weighted baseline unbiased when the number of traces of each source is fixed. It is 0 where no trace is left.
    """
    credit = evidence / (floor + evidence.mean(1, keepdim=True))
    prior = from_prior.to(evidence)
    same = torch.where(from_prior[:, :, None], prior[:, None, :], 1 - prior[:, None, :])  # (B, i, j)
    count = same.sum(2)  # traces of i's source
    total = (same * evidence[:, None, :]).sum(2)
    left = (count - 1).clamp_min(0)
    # Estimated evidence of i's source without i, times the source's share of the group.
    rest = torch.where(left > 0, count * (total - evidence) / left.clamp_min(1), 0.0)
    size = torch.where(left > 0, count, 0.0)
    pair = (rest[:, :, None] + rest[:, None, :]) / (size[:, :, None] + size[:, None, :]).clamp_min(1)
    alone = rest / size.clamp_min(1)
    other = 1 - same
    others = other.sum(2)
    earned = (other * (pair / (floor[:, :, None] + pair))).sum(2) / others.clamp_min(1)
    return credit, torch.where(others > 0, earned, alone / (floor + alone))


def evidence_loss(
    new: LogProbs, old: LogProbs, batch: TraceBatch, credit: Credit, totals: Totals, config: RunConfig
) -> tuple[Tensor, dict[str, Tensor]]:
    """The loss of the group bound for some of a step's rollouts, divided by the step's number of traces:

        - mean_i sum_t [ A_i f(p_new / p_old) + B_i f(q_new / q_old) ]  -  nll_weight mean_i s_i log p(y|x,z_i)

    with A = ``credit.advantage``, B = ``credit.posterior_advantage`` (already times posterior_weight) and
    s = ``credit.answer_weight``. Results as in ``coupled_loss``.
    """
    policy = clipped_tokens = torch.zeros((), device=batch.mask.device)
    clip = config.clip, config.clip_range, config.clip_range_high
    for now, before, advantage in (
        (new.prior, old.prior, credit.advantage),
        (new.posterior, old.posterior, credit.posterior_advantage),
    ):
        if advantage is not None:
            log_ratio = torch.where(batch.mask, now - before, 0.0)
            value, clipped = clipped_ratio(log_ratio, advantage, *clip)
            policy = policy - torch.where(batch.mask, value, 0.0).sum() / totals.traces
            clipped_tokens = clipped_tokens + (clipped & batch.mask).sum()
    answers = torch.where(new.answer_mask, credit.answer_weight[:, None] * new.answer, 0.0)
    parts = {"policy": policy, "nll": -answers.sum() / totals.traces}
    parts["clipped_share"] = clipped_tokens / max(1, totals.trace_tokens)
    loss = parts["policy"] + config.nll_weight * parts["nll"]
    return loss, {name: value.detach() for name, value in parts.items()}
