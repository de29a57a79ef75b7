"""The methods of the paper's comparison: for each, how rollouts earn credit and the loss that spends it.

METHODS.md has them in a table, with what differs from their papers and public code. R is the reward, A the advantage,
c_y the factor of log p(y|x,z); sums over traces of a group are written with j.
"""

import math
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from ..config import RunConfig
from ..types import Credit, LogProbs, TraceBatch
from .objectives import (
    advantages,
    answer_reward,
    coupled_loss,
    evidence_loss,
    floor_unfinished,
    group_credit,
    likelihood_credit,
    source_weights,
    whole_trace,
)

State = Mapping[str, float]


def covrl_credit(batch: TraceBatch, old: LogProbs, config: RunConfig, state: State) -> Credit:
    """CoVRL with the group bound, the default: all traces of a question inside one logarithm.

    With e_i = p(y|x,z_i)^k P(z_i)/H(z_i) the evidence of trace i, 0 where unfinished, the objective of a question is

        E[log(c + (1/G) sum_i e_i)]  <=  log(c + p(y|x))        k = evidence_power >= 1
                                                                c = p(y|x without a trace) ^ evidence_floor

    A_i = s_i - b_i P/H and c_y = k s_i, with s and the baseline b of ``group_credit``. The posterior is drawn towards
    the true posterior p(z|x,y), where k = 1: B_i = posterior_weight (s_i - b_i Q/H), with no weight by default.
    """
    size = batch.group_size
    power = config.evidence_power
    answer = (power * whole_trace(old.answer, old.answer_mask)).exp() * batch.finished
    no_trace = whole_trace(old.no_trace, old.answer_mask)
    prior_weight, posterior_weight = source_weights(old, batch)
    evidence = answer * prior_weight
    floor = (config.evidence_floor * no_trace).exp().clamp_min(torch.finfo(torch.double).tiny)  # credit is never 0/0
    floor = floor.view(-1, size)[:, :1]
    credit, baseline = group_credit(evidence.view(-1, size), floor, batch.from_prior.view(-1, size))
    credit, baseline = credit.flatten(), baseline.flatten()
    posterior_advantage = None
    if old.posterior is not None and config.posterior_weight:
        posterior_advantage = config.posterior_weight * (credit - baseline * posterior_weight)
    return Credit(
        reward=evidence.to(old.prior),
        advantage=(credit - baseline * prior_weight).to(old.prior),
        answer_weight=(power * credit).to(old.prior),
        method_state=dict(state),
        posterior_advantage=None if posterior_advantage is None else posterior_advantage.to(old.prior),
    )


MAX_ALPHA = 0.9  # so that some posterior traces remain to measure what they are worth
MIN_CREDIT = 0.01  # a mean credit below this says nothing about the sources


def adapt_alpha(batch: TraceBatch, old: LogProbs, credit: Credit, config: RunConfig) -> dict[str, float]:
    """The state after a step, with alpha moved by ``alpha_rate`` towards the best mixture of the two prompts.

    Traces in proportion to their credit are draws of the true posterior p(z|x,y). The best mixture is the nearest to it
    in KL (population Monte Carlo, Douc et al. 2007). A tenth of log alpha is added: where the prompts write alike any
    mixture would do, and the prior will. alpha stays between its setting and ``MAX_ALPHA``.
    """
    state, worth = credit.method_state, credit.answer_weight.double()
    if not config.alpha_rate or config.alpha >= MAX_ALPHA or float(worth.mean()) < MIN_CREDIT:
        return state
    log_ratio = whole_trace(old.posterior, batch.mask) - whole_trace(old.prior, batch.mask)  # (N,) log Q/P
    alphas = torch.linspace(0.01, 1, 100, dtype=torch.double, device=worth.device)
    mixture = torch.logaddexp(alphas.log(), torch.log1p(-alphas) + log_ratio[:, None])
    best = float(alphas[(worth @ mixture / worth.sum() + 0.1 * alphas.log()).argmax()])
    alpha = state.get("alpha", config.alpha)
    return {**state, "alpha": min(MAX_ALPHA, max(config.alpha, alpha + config.alpha_rate * (best - alpha)))}


def jlb_credit(batch: TraceBatch, old: LogProbs, config: RunConfig, state: State) -> Credit:
    """JLB and JEPO (arXiv 2503.19618): the Jensen bound E_P[log (1/n) sum_j p(y|x,z_j)], n = ``n_sample``.

    JLB is n = 1. For n > 1 (JEPO) groups are cut into sets of n traces; with L the log of a set's mean likelihood and
    L_-j that of the set without j, A_j = n (L - L_-j) and c_j = n p(y|x,z_j) / sum_k p(y|x,z_k): the factor n makes a
    mean over traces the gradient of the bound.
    """
    n = config.n_sample
    if n == 1:
        return likelihood_credit(batch, old, config, state)
    reward = floor_unfinished(answer_reward(old, "sum_logprob"), batch, "sum_logprob", config.unfinished_penalty)
    sets = reward.view(-1, n)
    total = sets.logsumexp(1, keepdim=True)
    itself = torch.eye(n, dtype=torch.bool, device=sets.device)
    others = sets[:, None, :].expand(-1, n, -1).masked_fill(itself, -torch.inf)
    improvement = (total - math.log(n)) - (others.logsumexp(2) - math.log(n - 1))
    advantage = advantages(
        n * improvement.flatten(), batch.group_size, "none", config.advantage_scale, config.advantage_clip
    )
    answer_weight = (n * (sets - total).exp()).flatten() * batch.finished
    return Credit(reward, advantage, answer_weight)


def latro_credit(batch: TraceBatch, old: LogProbs, config: RunConfig, state: State) -> Credit:
    """LaTRO (arXiv 2411.04282): E_P[log p(y|x,z)] - beta KL(P||P_ref), the KL inside the reward.

    R = log p(y|x,z) - beta log(P(z|x) / P_ref(z|x)) with beta = ``reference_kl_weight`` and P_ref the frozen base
    (adapter off); A = R - mean of the others; c_y = 1.
    """
    log_ratio = torch.where(batch.mask, old.prior - old.ref_prior, 0.0).sum(1)
    reward = answer_reward(old, config.reward) - config.reference_kl_weight * log_ratio
    reward = floor_unfinished(reward, batch, config.reward, config.unfinished_penalty)
    advantage = advantages(reward, batch.group_size, config.baseline, config.advantage_scale, config.advantage_clip)
    return Credit(reward, advantage, batch.finished.to(reward))


RLPR_WARMUP, RLPR_DECAY = 10, 0.99  # steps before the filter acts; decay of its running mean


def rlpr_credit(batch: TraceBatch, old: LogProbs, config: RunConfig, state: State) -> Credit:
    """RLPR (arXiv 2506.18254): GRPO on the mean probability of the answer's tokens.

    R = 0.9 max(0, B - B_0) + 0.1 format - repetition, with B the mean token probability of y after the trace, B_0 the
    same without any trace under the frozen base, format = 1 for finished traces, repetition = 1 where a 10-token
    window occurs 10 times; B = 0 where unfinished. Groups whose reward deviation is below ``std_filter`` times its
    running mean (decay 0.99, from step 11) get A = 0.
    """
    score = floor_unfinished(answer_reward(old, "mean_probability"), batch, "mean_probability", 0.0)
    if old.bare_answer is not None:
        bare = LogProbs(old.prior, None, old.bare_answer, old.answer_mask, answer_core=old.answer_core)
        score = (score - answer_reward(bare, "mean_probability")).clamp_min(0)
    reward = 0.9 * score + 0.1 * batch.finished.to(score) - repeats(batch).to(score)
    # An unfinished trace never beats a finished one, not even a repetitive one.
    reward = torch.minimum(reward, floor_unfinished(reward, batch, "sum_logprob", 0.0))
    advantage = advantages(reward, batch.group_size, config.baseline, config.advantage_scale, config.advantage_clip)
    deviation = reward.view(-1, batch.group_size).std(1, correction=0)
    seen, average = state.get("rlpr_steps", 0), state.get("rlpr_std", float(deviation.mean()))
    if seen >= RLPR_WARMUP:
        keep = (deviation >= config.std_filter * average).repeat_interleave(batch.group_size)
        advantage = torch.where(keep, advantage, 0.0)
    average = RLPR_DECAY * average + (1 - RLPR_DECAY) * float(deviation.mean())
    after = {"rlpr_steps": seen + 1, "rlpr_std": average}
    return Credit(reward, advantage, torch.zeros_like(reward), after)


def repeats(batch: TraceBatch) -> Tensor:
    """(N,) bool: a window of 10 tokens occurs at least 10 times in the trace."""
    found = []
    for ids in map(batch.trace, range(len(batch))):
        windows = Counter(tuple(ids[start : start + 10]) for start in range(len(ids) - 9))
        found.append(max(windows.values(), default=0) >= 10)
    return torch.tensor(found, device=batch.mask.device)


def grpo_credit(batch: TraceBatch, old: LogProbs, config: RunConfig, state: State) -> Credit:
    """GRPO (arXiv 2402.03300) with a verifier, the upper reference: R = the task's score, A = group-scaled.

    The score is that of the model's own greedy answer after the trace, 0 where unfinished, so that R is a function of
    the trace and the policy term is the whole gradient.
    """
    reward = batch.verifier_reward.to(old.prior.dtype) * batch.finished
    advantage = advantages(reward, batch.group_size, config.baseline, config.advantage_scale, config.advantage_clip)
    return Credit(reward, advantage, torch.zeros_like(reward))


@dataclass(frozen=True)
class Method:
    """A method: credit of a step's rollouts, the loss that spends it, and what it needs beyond p, q and y.

    by_group: a group's credit depends on that group alone.
    needs: any of "ref_prior", "bare_answer" and "no_trace" (``LogProbs``) and "verifier_reward" (``TraceBatch``).
    next_state: the numbers carried to the next step, from the whole step's.
    """

    credit: Callable[[TraceBatch, LogProbs, RunConfig, State], Credit]
    loss: Callable[..., tuple[Tensor, dict[str, Tensor]]] = coupled_loss
    needs: frozenset[str] = frozenset()
    by_group: bool = True
    next_state: Callable[..., dict[str, float]] = lambda batch, old, credit, config: credit.method_state


METHODS: dict[str, Method] = {
    "covrl": Method(covrl_credit, loss=evidence_loss, needs=frozenset({"no_trace"}), next_state=adapt_alpha),
    "covrl_published": Method(likelihood_credit),  # arXiv 2512.12576
    "jlb": Method(jlb_credit),
    "verifree": Method(likelihood_credit),  # arXiv 2505.21493
    "latro": Method(latro_credit, needs=frozenset({"ref_prior"})),
    "rlpr": Method(rlpr_credit, needs=frozenset({"bare_answer"}), by_group=False),
    "ravr_like": Method(likelihood_credit),  # arXiv 2510.25206: p' = h = q
    "grpo": Method(grpo_credit, needs=frozenset({"verifier_reward"})),
}
