"""Every method through the functions that train it: exact gradients, edges, and a few steps each.

Expected gradients are sums over all groups of rollouts of an enumerable world (world.py), in the setting
that each method's objective is written in: no clip, no division by a deviation, weights 1.
"""

import copy
import dataclasses
import json
import math
import zlib
from itertools import product
from types import MappingProxyType

import pandas as pd
import pytest
import torch
from helpers import adapter_change, select
from transformers import LlamaForCausalLM

from covrl_lab.config import RunConfig
from covrl_lab.defaults import settings_read
from covrl_lab.runs.folder import load_run
from covrl_lab.theory.world import World
from covrl_lab.train import methods, objectives
from covrl_lab.train.methods import METHODS, repeats, rlpr_credit
from covrl_lab.train.models import load_policy, load_tokenizer
from covrl_lab.train.objectives import Totals, kl_estimate
from covrl_lab.train.prompts import Prompter
from covrl_lab.train.scoring import reference, trace_logprobs
from covrl_lab.train.tasks import load_task
from covrl_lab.train.trainer import Trainer
from covrl_lab.types import Credit, Demonstration, Example, LogProbs, TraceBatch

torch.set_num_threads(1)

SETTINGS = {name: dict(method=name) for name in METHODS} | {"jepo": dict(method="jlb", n_sample=2)}
TINY = dict(model="tiny", quantization="none")
EXACT = TINY | dict(clip="none", loss_aggregation="trace_sum", baseline="none", advantage_scale="none")
EXACT |= dict(advantage_clip=0, kl_weight=1, nll_weight=1, std_filter=0)
CREDIT = ("reward", "advantage", "answer_weight")
FIELDS = ("prior", "posterior", "answer", "ref_prior", "bare_answer", "no_trace")
TOLERANCE = 1e-10
BETA = 0.3  # LaTRO's weight of the KL to the reference


def exact(**changes) -> RunConfig:
    settings = EXACT | changes
    return RunConfig(**settings_read(settings["method"], settings))


def worst(left, right) -> float:
    return (left - right).abs().max().item()


# --- expected gradients
def verdicts(world: World) -> torch.Tensor:
    """A verdict of 0 or 1 for each trace, both present."""
    generator = torch.Generator().manual_seed(4)
    return (torch.rand(len(world.traces), generator=generator) < 0.5).double()


def frozen_prior(world: World) -> World:
    return World(world.length, world.answer_tokens, seed=11)


def expected_gradient(world: World, config: RunConfig, group: int = 1, bare=None) -> torch.Tensor:
    """Minus the expected gradient of a method's own credit and loss, over all groups it may draw."""
    method = METHODS[config.method]
    new, law = world.logprobs(), world.sampling_probs(config.alpha)
    old = dataclasses.replace(new.detach(), ref_prior=frozen_prior(world).logprobs().prior.detach(), bare_answer=bare)
    batch = dataclasses.replace(world.batch(), verifier_reward=verdicts(world).repeat(2))
    total = torch.zeros((), dtype=torch.float64)
    for members in product(law.nonzero()[:, 0].tolist(), repeat=group):
        index = list(members)
        part, part_old = select(batch, index, group_size=group), select(old, index)
        credit = method.credit(part, part_old, config, {})
        totals = Totals.of(part, part_old.answer_mask)
        loss, _ = method.loss(select(new, index), part_old, part, credit, totals, config)
        total = total + law[index].prod() * loss
    return -world.gradient(total)


def likelihood(world: World) -> torch.Tensor:
    return world.answer_logprobs().sum(1).exp()


def latro_bound(world: World) -> torch.Tensor:
    law = world.prior_probs()
    kl = (law * (law / frozen_prior(world).prior_probs().detach()).log()).sum()
    return world.jensen_bound() - BETA * kl


def rlpr_reward(world: World, bare: float = 0.0) -> torch.Tensor:
    """0.9 max(0, mean token probability - bare) + 0.1, as every trace of the world is finished."""
    return 0.9 * (world.answer_logprobs().exp().mean(1) - bare).clamp_min(0) + 0.1


OBJECTIVES = {
    "verifree": (dict(), lambda world: likelihood(world) @ world.prior_probs()),
    "jlb": (dict(), World.jensen_bound),
    "latro": (dict(reference_kl_weight=BETA), latro_bound),
    "rlpr": (dict(), lambda world: rlpr_reward(world).detach() @ world.prior_probs()),
    "grpo": (dict(), lambda world: verdicts(world) @ world.prior_probs()),
    "ravr_like": (dict(), lambda world: world.elbo(0)),  # E_Q[log p(y|x,z)] - KL(Q||P)
}
BOTH = [(name, length) for name in OBJECTIVES for length in (1, 3) if (name, length) != ("ravr_like", 3)]


@pytest.mark.parametrize("name, length", BOTH)
def test_expected_gradient_is_that_of_the_objective(name, length):
    """Single rollouts without baseline, and all pairs with the leave-one-out baseline."""
    world, (settings, objective) = World(length, answer_tokens=2), OBJECTIVES[name]
    truth = world.gradient(objective(world))
    assert truth.norm() > 0.02
    for group, baseline in ((1, "none"), (2, "leave_one_out")):
        found = expected_gradient(world, exact(method=name, baseline=baseline, **settings), group)
        assert worst(found, truth) < TOLERANCE, baseline


@pytest.mark.parametrize("name", OBJECTIVES)
def test_mean_baseline_shrinks_the_policy_term_by_one_over_g(name):
    """(G-1)/G exactly, for G = 2 and 3."""
    world, settings = World(1, answer_tokens=2), OBJECTIVES[name][0] | dict(nll_weight=0, kl_weight=0)
    whole = expected_gradient(world, exact(method=name, **settings))
    assert whole.norm() > 0.02
    for group in (2, 3):
        shrunk = expected_gradient(world, exact(method=name, baseline="mean", **settings), group)
        assert worst(shrunk, whole * (group - 1) / group) < 1e-14


@pytest.mark.parametrize("name", ["rlpr", "grpo"])
def test_ppo_clip_is_off_at_the_first_update(name):
    world, settings = World(3, answer_tokens=2), OBJECTIVES[name][0]
    clipped = exact(method=name, clip="ppo", **settings)
    assert worst(expected_gradient(world, clipped), world.gradient(OBJECTIVES[name][1](world))) < TOLERANCE


# --- JEPO
def jepo_bound(world: World, n: int) -> torch.Tensor:
    """E[log mean_j p(y|x,z_j)] over all n-tuples of prior traces."""
    law, value, total = world.prior_probs(), likelihood(world), 0.0
    for members in product(range(len(law)), repeat=n):
        index = list(members)
        total = total + law[index].prod() * value[index].mean().log()
    return total


@pytest.mark.parametrize("length, n, group", [(1, 2, 2), (1, 3, 3), (3, 2, 2), (1, 2, 4)])
def test_jepo_descends_the_n_sample_bound(length, n, group):
    """Also with two sets of two in a group of four; the bound tightens with n."""
    world = World(length, answer_tokens=2)
    bound, settings = jepo_bound(world, n), dict(method="jlb", n_sample=n, rollouts_per_question=group)
    found = expected_gradient(world, exact(**settings), group)
    assert worst(found, world.gradient(bound)) < TOLERANCE
    assert world.jensen_bound() + 0.01 < bound < world.log_evidence()


def test_jepo_by_hand():
    """Sets {1/2, 1/8} and {1/4, 1/4}, then {1/2, 1/4, 1/8}; log-mean-exp over n, and over n - 1."""

    def credit(probabilities, n):
        answer = torch.tensor(probabilities, dtype=torch.float64).log()[:, None]
        rows = LogProbs(-torch.ones_like(answer), None, answer, torch.ones_like(answer, dtype=torch.bool))
        yes = torch.ones(len(answer), dtype=torch.bool)
        batch = TraceBatch(yes[:, None].long(), yes[:, None], yes, yes, group_size=len(answer))
        config = exact(method="jlb", n_sample=n, rollouts_per_question=len(answer))
        return METHODS["jlb"].credit(batch, rows, config, {})

    pairs = credit([1 / 2, 1 / 8, 1 / 4, 1 / 4], 2)
    assert pairs.advantage.tolist() == pytest.approx([2 * math.log(2.5), 2 * math.log(0.625), 0, 0], abs=1e-15)
    assert pairs.answer_weight.tolist() == pytest.approx([1.6, 0.4, 1, 1], abs=1e-14)
    triple = credit([1 / 2, 1 / 4, 1 / 8], 3)
    whole, others = 7 / 24, (3 / 16, 5 / 16, 3 / 8)
    assert triple.advantage.tolist() == pytest.approx([3 * math.log(whole / o) for o in others], abs=1e-14)
    assert triple.answer_weight.tolist() == pytest.approx([12 / 7, 6 / 7, 3 / 7], abs=1e-14)


# --- RLPR against VeriFree
@pytest.mark.parametrize("length", [1, 3])
def test_rlpr_is_nine_tenths_of_verifrees_policy_term(length):
    """For one-token answers and no baseline score: VeriFree = RLPR / 0.9 + E_P[grad p(y|x,z)].

    RLPR's reward moves with the policy but is held fixed in the gradient; what is missing is 0.9 times
    that answer term.
    """
    world = World(length, answer_tokens=1)
    rlpr = expected_gradient(world, exact(method="rlpr"))
    policy = expected_gradient(world, exact(method="verifree", nll_weight=0))
    whole = expected_gradient(world, exact(method="verifree"))
    answer_term = world.gradient(world.prior_probs().detach() @ likelihood(world))
    assert worst(rlpr, 0.9 * policy) < TOLERANCE
    assert worst(whole, rlpr / 0.9 + answer_term) < TOLERANCE
    truth = world.gradient(rlpr_reward(world) @ world.prior_probs())
    assert worst(truth - rlpr, 0.9 * answer_term) < TOLERANCE
    missing = ((truth - rlpr).norm() / truth.norm()).item()
    cosine = torch.cosine_similarity(rlpr, truth, dim=0).item()
    assert (missing, cosine) == pytest.approx({1: (0.853, 0.522), 3: (0.345, 0.939)}[length], abs=5e-4)


def test_rlpr_holds_its_reward_fixed_also_below_the_baseline_score():
    """grad E_P[sg R] with max(0, B - B_0) cutting some traces off and not others."""
    world, bare = World(3, answer_tokens=2), 0.3
    gap = world.answer_logprobs().exp().mean(1) - bare
    assert (gap > 0).any() and (gap < 0).any()
    scores = torch.full((54, 2), math.log(bare), dtype=torch.float64)
    found = expected_gradient(world, exact(method="rlpr"), bare=scores)
    assert worst(found, world.gradient(rlpr_reward(world, bare).detach() @ world.prior_probs())) < TOLERANCE


# --- RAVR-like
def test_posterior_only_kl_is_k3():
    """At w = 0, with samples of q: log(q/p) - 1 + p/q, unbiased for KL(Q||P), value and gradient."""
    world = World(1)
    rows, law = select(world.logprobs(), slice(3)), world.posterior_probs()
    k3 = kl_estimate(rows, rows.detach(), torch.zeros(3, dtype=torch.bool), 0.0, "exact")[:, 0]
    log_ratio = (rows.posterior - rows.prior)[:, 0]
    assert worst(k3, log_ratio - 1 + (-log_ratio).exp()) < 1e-9
    kl = world.composite_kl(0)
    assert (law * k3).sum().item() == pytest.approx(kl.item(), abs=1e-9)
    assert worst(world.gradient((law.detach() * k3).sum()), world.gradient(kl)) < 1e-9


def test_ravr_like_is_exact_for_one_token_and_rough_for_three():
    """At T = 3 all but the KL's gradient through later prefixes is exact."""
    world = World(3, answer_tokens=2)
    config = exact(method="ravr_like")
    found, truth = expected_gradient(world, config), world.gradient(world.elbo(0))
    without = expected_gradient(world, dataclasses.replace(config, kl_weight=0))
    value = world.posterior_probs() @ world.answer_logprobs().sum(1)
    assert worst(without, world.gradient(value)) < TOLERANCE
    cosine = torch.cosine_similarity(found, truth, dim=0).item()
    assert cosine == pytest.approx(0.979, abs=5e-4)


# --- prior-only methods with posterior traces
COSINES = {"jlb": 1, "rlpr": 1, "grpo": 1, "verifree": 0.956, "latro": 0.895, "jepo": 0.901}


@pytest.mark.parametrize("name", COSINES)
def test_what_posterior_traces_cost_the_prior_only_methods(name):
    """alpha = 1/2, T = 1: exact where every term carries p/h, as in JLB, RLPR and GRPO.

    The answer terms of VeriFree, LaTRO and JEPO do not (nor do JEPO's sets): these three want alpha = 1.
    """
    world, group = World(1, answer_tokens=2), 2 if name == "jepo" else 1
    settings = SETTINGS[name] | dict(rollouts_per_question=2, alpha=0.5)
    if name == "jepo":
        truth = world.gradient(jepo_bound(world, 2))
    else:
        settings |= OBJECTIVES[name][0]
        truth = world.gradient(OBJECTIVES[name][1](world))
    found = expected_gradient(world, exact(**settings), group)
    cosine = torch.cosine_similarity(found, truth, dim=0).item()
    assert cosine == pytest.approx(COSINES[name], abs=5e-4)
    assert (worst(found, truth) < TOLERANCE) == (COSINES[name] == 1)


# --- a step of two groups, everything that methods read
def full_step(name: str, **changes):
    """new, old (ref_prior and bare_answer too), batch and config of a method, ragged, in float64."""
    settings = TINY | SETTINGS[name] | changes
    config = RunConfig(**settings_read(settings["method"], settings))
    g = torch.Generator().manual_seed(0)
    mask = torch.arange(5) < torch.tensor([5, 3, 1, 4, 2, 5, 3, 4])[:, None]
    answer_mask = torch.arange(3) < torch.tensor([1, 1, 1, 1, 3, 3, 3, 3])[:, None]

    def draw(keep, scale=3.0):
        return torch.where(keep, -scale * torch.rand(keep.shape, generator=g, dtype=torch.float64), 0.0)

    new = LogProbs(draw(mask), draw(mask), draw(answer_mask), answer_mask)
    nearby = (x + draw(x != 0, 0.3) for x in (new.prior, new.posterior, new.answer))
    bare = draw(answer_mask[::4], 6.0).repeat_interleave(4, 0)
    old = LogProbs(*nearby, answer_mask, ref_prior=draw(mask), bare_answer=bare, no_trace=bare)
    if config.alpha == config.composite_weight == 1:
        new, old = (dataclasses.replace(x, posterior=None) for x in (new, old))
    finished = torch.tensor([1, 1, 0, 1, 1, 1, 1, 0], dtype=torch.bool)
    from_prior = torch.arange(8) % 4 < 4 * config.alpha
    verdict = torch.tensor([1, 0, 1, 0, 1, 0, 0, 1.0])
    return new, old, TraceBatch(mask.long(), mask, from_prior, finished, 4, verifier_reward=verdict), config


def live(rows: LogProbs):
    names = [n for n in ("prior", "posterior", "answer") if getattr(rows, n) is not None]
    leaves = [getattr(rows, n).clone().requires_grad_() for n in names]
    return dataclasses.replace(rows, **dict(zip(names, leaves, strict=True))), leaves


def step_gradient(new, old, batch, config):
    method, (new, leaves) = METHODS[config.method], live(new)
    credit = method.credit(batch, old, config, {})
    totals = Totals.of(batch, new.answer_mask)
    loss, _ = method.loss(new, old, batch, credit, totals, config)
    return credit, loss, torch.autograd.grad(loss, leaves, allow_unused=True)


@pytest.mark.parametrize("value", [1e4, -1e4])
@pytest.mark.parametrize("name", SETTINGS)
def test_padding_never_matters(name, value):
    """Every log-probability of old and new poisoned where there is no token."""
    new, old, batch, config = full_step(name)
    clean = step_gradient(new, old, batch, config)

    def poison(rows, how):
        masks = {n: batch.mask if n.endswith(("prior", "posterior")) else rows.answer_mask for n in FIELDS}
        dirty = {n: getattr(rows, n) for n in FIELDS if getattr(rows, n) is not None}
        signs = {"ref_prior": -1}  # not what the prior holds, else the two would cancel
        hows = {n: signs.get(n, 1) * how for n in dirty}
        return dataclasses.replace(rows, **{n: torch.where(masks[n], x, hows[n]) for n, x in dirty.items()})

    dirty = step_gradient(poison(new, value), poison(old, 1e4), batch, config)
    assert all(torch.equal(getattr(clean[0], n), getattr(dirty[0], n)) for n in CREDIT)
    assert clean[0].method_state == dirty[0].method_state
    assert torch.equal(clean[1], dirty[1])
    assert clean[2][0].any()
    for left, right in zip(clean[2], dirty[2], strict=True):
        assert (left is None and right is None) or torch.equal(left, right)


@pytest.mark.parametrize("name", SETTINGS)
def test_micro_batches_add_up_to_the_step(name):
    new, old, batch, config = full_step(name)
    credit, loss, grads = step_gradient(new, old, batch, config)
    totals, method = Totals.of(batch, new.answer_mask), METHODS[name.replace("jepo", "jlb")]
    for pieces in (1, 2, 4, 8):
        mine, leaves = live(new)
        total = 0.0
        for i in torch.tensor([3, 0, 6, 5, 1, 7, 2, 4]).chunk(pieces):
            part = mine.rows(i), old.rows(i), batch.rows(i), credit.rows(i)
            total = total + method.loss(*part, totals, config)[0]
        assert total.item() == pytest.approx(loss.item(), abs=1e-12)
        for left, right in zip(torch.autograd.grad(total, leaves, allow_unused=True), grads, strict=True):
            assert (left is None and right is None) or worst(left, right) < 1e-12


@pytest.mark.parametrize("name", SETTINGS)
def test_a_column_of_rewards_never_becomes_a_square(name, monkeypatch):
    """(N, 1) where (N,) is meant: refused, or read as the N numbers it holds."""
    _, old, batch, config = full_step(name)
    credit, right = METHODS[config.method].credit, objectives.answer_reward
    clean = credit(batch, old, config, {})
    for module in (methods, objectives):
        monkeypatch.setattr(module, "answer_reward", lambda *a: right(*a)[:, None])
    try:
        if name == "grpo":
            batch = dataclasses.replace(batch, verifier_reward=batch.verifier_reward[:, None])
        wrong = credit(batch, old, config, {})
    except (ValueError, RuntimeError):
        return
    assert name in ("covrl", "covrl_published", "jlb", "jepo", "ravr_like")
    assert all(torch.equal(getattr(clean, n), getattr(wrong, n)) for n in CREDIT)


@pytest.mark.parametrize("field", CREDIT)
def test_credit_of_a_wrong_shape_is_refused(field):
    right = {name: torch.zeros(4) for name in CREDIT}
    for wrong in (torch.zeros(4, 1), torch.zeros(3), torch.zeros(1)):
        with pytest.raises(ValueError, match="shape"):
            Credit(**(right | {field: wrong}))


@pytest.mark.parametrize("scale", ["none", "std"])
@pytest.mark.parametrize("baseline", ["mean", "leave_one_out"])
@pytest.mark.parametrize("name", SETTINGS)
def test_never_stopping_never_pays(name, baseline, scale):
    """Unfinished traces with a certain answer, a right verdict and no divergence earn nothing."""
    settings = dict(baseline=baseline, advantage_scale=scale)
    _, old, batch, config = full_step(name, **settings)
    done = batch.finished[:, None]
    assert batch.finished.view(2, 4).sum(1).tolist() == [3, 3]
    certain = dict(answer=torch.where(done, old.answer, 0.0))
    certain["ref_prior"] = torch.where(done, old.ref_prior, old.prior + 5)  # LaTRO's KL would pay, too
    batch = dataclasses.replace(batch, verifier_reward=torch.where(batch.finished, batch.verifier_reward, 1.0))
    credit = METHODS[config.method].credit(batch, dataclasses.replace(old, **certain), config, {})
    assert (credit.advantage[~batch.finished] < 0).all()
    assert (credit.advantage[batch.finished] > 0).any()
    assert not credit.answer_weight[~batch.finished].any()


def test_never_stopping_does_not_pay_beside_a_repetitive_trace_either():
    batch = rlpr_batch([[7] * 19, [1]], [1, 0], group=2)
    credit = rlpr_credit(batch, rlpr_rows(batch, [[0.5], [0.5]]), exact(method="rlpr", baseline="mean"), {})
    assert credit.advantage[1] <= 0


# --- RLPR by hand
def rlpr_batch(traces: list[list[int]], finished: list[int], group: int) -> TraceBatch:
    width = max(map(len, traces))
    ids = torch.tensor([z + [7] * (width - len(z)) for z in traces])
    mask = torch.arange(width) < torch.tensor([len(z) for z in traces])[:, None]
    done = torch.tensor(finished, dtype=torch.bool)
    return TraceBatch(ids, mask, torch.ones_like(done), done, group_size=group)


def rlpr_rows(batch: TraceBatch, answer, bare=None, mask=None) -> LogProbs:
    answer = torch.tensor(answer, dtype=torch.float64).log()
    mask = torch.ones_like(answer, dtype=torch.bool) if mask is None else torch.tensor(mask).bool()
    bare = None if bare is None else torch.tensor(bare, dtype=torch.float64).log().expand(answer.shape)
    return LogProbs(-batch.mask.double(), None, answer, mask, bare_answer=bare)


def test_rlpr_reward_by_hand():
    """B_0 = 0.2; better, worse, unfinished, repetitive, and (one answer token, B_0 = 0.3) the mean's mask."""
    traces = [[7] * 18, [1], [2, 3], [7] * 19]
    batch = rlpr_batch(traces, [1, 1, 0, 1], group=4)
    answer = [[0.5, 0.25], [0.1, 0.1], [1.0, 1.0], [0.8, 0.8]]
    credit = rlpr_credit(batch, rlpr_rows(batch, answer, [0.3, 0.1]), exact(method="rlpr"), {})
    worst_finished = 0.9 * 0.6 + 0.1 - 1  # what the unfinished trace gets, as it lies below 0
    expected = [0.9 * 0.175 + 0.1, 0.1, worst_finished, worst_finished]
    assert credit.reward.tolist() == pytest.approx(expected, abs=1e-15)
    assert credit.advantage.tolist() == pytest.approx(expected, abs=1e-15)
    assert not credit.answer_weight.any()
    one_token = rlpr_rows(batch, answer, [0.3, 0.1], mask=[[1, 0]] * 4)
    credit = rlpr_credit(batch, one_token, exact(method="rlpr"), {})
    assert credit.reward[:2].tolist() == pytest.approx([0.9 * 0.2 + 0.1, 0.1], abs=1e-15)
    batch = rlpr_batch([*traces[:3], [7] * 18], [1, 1, 0, 1], group=4)  # nobody repeats: 0 for unfinished
    no_bare = rlpr_credit(batch, rlpr_rows(batch, answer), exact(method="rlpr"), {})
    assert no_bare.reward.tolist() == pytest.approx([0.9 * 0.375 + 0.1, 0.19, 0, 0.82], abs=1e-15)


def test_repetition_is_ten_windows_of_ten():
    """19 equal tokens hold 10 windows, 18 hold 9; a pattern of two needs 28. Padding does not count."""
    traces = [[7] * 19, [7] * 18, [1, 2] * 14, [1, 2] * 13 + [1], list(range(60)), [7] * 9]
    batch = rlpr_batch(traces, [1] * 6, group=6)
    assert repeats(batch).tolist() == [True, False, True, False, False, False]


def test_rlpr_filter_by_hand():
    """Ten steps of warm-up, then groups below half the running mean of deviations get no advantage.

    Pairs of one-token answers with probabilities b -+ s have rewards 0.9 (b -+ s) + 0.1: deviation 0.9 s.
    """
    config = exact(method="rlpr", baseline="mean", std_filter=0.5)
    batch = rlpr_batch([[1]] * 4, [1] * 4, group=2)

    def step(deviations, memory):
        answer = [[0.5 + sign * d / 0.9] for d in deviations for sign in (-1, 1)]
        before = dict(memory)
        credit = rlpr_credit(batch, rlpr_rows(batch, answer), config, MappingProxyType(memory))
        assert memory == before
        return [bool(pair.any()) for pair in credit.advantage.view(2, 2)], credit.method_state

    memory = {}
    for t in range(9):
        kept, memory = step((0.09, 0.27) if t < 5 else (0.0001, 0.0899), memory)
        assert kept == [True, True]
    # the first mean starts the average: 0.18 for five steps, then 0.045 with weight 0.01 for four
    after_9 = 0.045 + 0.135 * 0.99**4
    assert memory == {"rlpr_steps": 9, "rlpr_std": pytest.approx(after_9, abs=1e-12)}
    kept, memory = step((0.01, 0.08), memory)  # the tenth step is the last of the warm-up
    assert kept == [True, True]
    after_10 = 0.99 * after_9 + 0.01 * 0.045
    assert memory == {"rlpr_steps": 10, "rlpr_std": pytest.approx(after_10, abs=1e-12)}
    # the threshold is that of the average before this step, 0.0867: after it, 0.0862 would pass
    kept, memory = step((0.0862, 0.0872), memory)
    assert kept == [False, True]
    after_11 = 0.99 * after_10 + 0.01 * 0.0867
    assert memory == {"rlpr_steps": 11, "rlpr_std": pytest.approx(after_11, abs=1e-12)}
    assert step((0.0862, 0.0863), json.loads(json.dumps(memory)))[0] == [False, True]  # now half of 0.1725
    assert step((0.0862, 0.0863), {})[0] == [True, True]  # a new run warms up again


# --- training
class Spy:
    """Stands for a trainer's method and keeps what passes through it."""

    def __init__(self, method):
        self.loss, self.needs, self.by_group = method.loss, method.needs, method.by_group
        self.next_state = method.next_state
        self._credit, self.seen = method.credit, []

    def credit(self, batch, old, config, memory):
        credit = self._credit(batch, old, config, memory)
        self.seen.append((batch, old, credit))
        return credit


def shade(prediction: str, example: Example) -> float:
    """A score that differs between any two predictions, so that it tells which text was scored."""
    return zlib.crc32(f"{example.id}/{prediction}".encode()) / 2**32


def trainer(name, folder, **changes) -> Trainer:
    settings = dict(steps=5, questions_per_step=2, rollouts_per_question=4, max_trace_tokens=12)
    settings |= dict(demonstrations=1, eval_every=0, eval_questions=2, max_answer_tokens=4, dtype="float32")
    settings |= TINY | SETTINGS[name] | dict(run_dir=str(folder), lora_rank=4, learning_rate=1e-2)
    made = Trainer(RunConfig(**(settings | changes)), progress=False).setup()
    made.task = dataclasses.replace(made.task, score=shade)
    made.method = Spy(made.method)
    return made


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """name -> a trainer that has made five steps."""
    cache = {}

    def get(name):
        if name not in cache:
            cache[name] = trainer(name, tmp_path_factory.mktemp("runs") / name).run()
        return cache[name]

    return get


@pytest.mark.parametrize("name", SETTINGS)
def test_every_method_trains(name, runs):
    made, first = runs(name), load_run(runs("covrl").run_dir)
    run = load_run(made.run_dir)
    assert list(run.metrics.columns) == list(first.metrics.columns) and len(run.metrics) == 5
    traces = run.traces()
    assert list(traces.columns) == list(first.traces().columns) and len(traces) == 40
    numbers = run.metrics[["loss", "policy_loss", "reward", "gradient_norm"]].astype(float)
    assert numbers.notna().all(axis=None) and (numbers.abs() < 1e6).all(axis=None)
    assert traces[["reward", "advantage", "answer_weight"]].notna().all(axis=None)
    both = {"prior", "posterior"}
    sources = {"covrl": both, "covrl_published": both, "ravr_like": {"posterior"}}
    assert set(traces["source"]) == sources.get(name, {"prior"})
    assert traces["finished"].any() and not traces["finished"].all()
    assert (traces["advantage"] != 0).any() and adapter_change(made.policy) > 0
    assert all(p.isfinite().all() for _, p in made.policy.trainable())


@pytest.mark.parametrize("name", SETTINGS)
def test_credit_is_cut_from_the_graph(name, runs):
    """In the training loop the methods see, and give, numbers without a graph."""
    for batch, old, credit in runs(name).method.seen:
        tensors = [getattr(x, f.name) for x in (batch, old, credit) for f in dataclasses.fields(x)]
        assert not any(t.requires_grad for t in tensors if isinstance(t, torch.Tensor))
        needs = METHODS[runs(name).config.method].needs
        found = {n for n in ("ref_prior", "bare_answer", "no_trace") if getattr(old, n) is not None}
        assert found | ({"verifier_reward"} if batch.verifier_reward is not None else set()) == needs


def test_rewards_in_the_run_folder_are_the_methods(runs):
    """VeriFree: p(y|x,z) of the stored log-probabilities; LaTRO minus 0.05 log(P/P_ref), 0 at step 1."""
    done = {name: load_run(runs(name).run_dir).traces(1).query("finished") for name in ("verifree", "latro")}
    logp = {name: frame["answer_logp"].map(sum) for name, frame in done.items()}
    assert done["verifree"]["reward"].tolist() == pytest.approx(logp["verifree"].map(math.exp), rel=1e-5)
    assert done["latro"]["reward"].tolist() == pytest.approx(logp["latro"], rel=1e-5)
    drift = [(old.prior - old.ref_prior).abs().max().item() for _, old, _ in runs("latro").method.seen]
    assert drift[0] < 1e-4 < 1e-3 < drift[-1]


def test_grpo_verdicts_score_the_greedy_continuation(runs):
    """Recomputed for the first step by transformers' own generate, from the stored token ids."""
    made = runs("grpo")
    batch, _, credit = made.method.seen[0]
    frame = load_run(made.run_dir).traces(1)
    task = load_task(made.config.task, demonstrations=1)
    prompter = Prompter(load_tokenizer("tiny"), task.demonstrations)
    policy = load_policy("tiny", quantization="none", dtype="float32", lora_rank=0)  # no step has been made
    examples = {e.id: e for e in task.train(0, 2, made.config.seed)}
    expected = []
    for row in frame.itertuples():
        prompt = prompter(examples[row.example_id])
        context = torch.tensor([[*prompt.prior, *row.token_ids, *prompt.seam]])
        output = policy.causal_lm.generate(
            context,
            attention_mask=torch.ones_like(context),
            do_sample=False,
            max_new_tokens=made.config.max_answer_tokens,
            pad_token_id=policy.tokenizer.pad_token_id,
        )
        answer = prompter.answer_text(output[0, context.shape[1] :].tolist())
        expected.append(shade(answer, examples[row.example_id]))
    assert batch.verifier_reward.tolist() == pytest.approx(expected, abs=1e-6)
    # The trace rows keep the answers themselves, and which earned full marks.
    scores = [shade(row.prediction, examples[row.example_id]) for row in frame.itertuples()]
    assert scores == pytest.approx(expected, abs=1e-6)
    assert frame["right"].tolist() == [score >= 1 for score in expected]
    finished = frame["finished"].tolist()
    by_hand = [v if done else 0.0 for v, done in zip(expected, finished, strict=True)]
    assert frame["reward"].tolist() == pytest.approx(by_hand, abs=1e-6)


def test_rlpr_resumes_with_its_memory(tmp_path, monkeypatch):
    """Stopped after three steps and run again: the numbers of a run that was not, filter included."""
    monkeypatch.setattr(methods, "RLPR_WARMUP", 2)
    settings = dict(std_filter=1.0, questions_per_step=4, steps=6)
    straight = trainer("rlpr", tmp_path / "straight", **settings).run()
    for record in trainer("rlpr", tmp_path / "resumed", **settings):
        if record.step == 3:
            break
    (folder,) = (tmp_path / "resumed" / "checkpoints").glob("step_00003")
    memory = json.loads((folder / "memory.json").read_text(encoding="utf-8"))
    assert memory["rlpr_steps"] == 3 and memory["rlpr_std"] > 0
    resumed = trainer("rlpr", tmp_path / "resumed", **settings)
    assert resumed.step == 3 and resumed.method_state == memory
    resumed.run()
    assert resumed.method_state == straight.method_state and straight.method_state["rlpr_steps"] == 6
    kinds = ["reward", "advantage", "token_ids"]
    left, right = (load_run(made.run_dir).traces()[kinds] for made in (straight, resumed))
    pd.testing.assert_frame_equal(left, right)
    later = left["advantage"].to_numpy()[3 * 16 :].reshape(-1, 4)
    dropped = (later == 0).all(1)
    assert dropped.any() and not dropped.all()


# --- the frozen base
@pytest.fixture(scope="module")
def scored(tiny_policies):
    """A policy whose adapter is not zero, two prompts with answers of different lengths, five traces each."""
    prompter = Prompter(load_tokenizer("tiny"), [Demonstration("2+3?", "it is five", "5")])
    prompts = [prompter(Example("a", "the hat?", "seven")), prompter(Example("b", "4+4?", "8"))]
    g = torch.Generator().manual_seed(0)
    mask = torch.arange(9) < torch.tensor([9, 1, 4, 2, 7, 3])[:, None]
    ids = torch.where(mask, torch.randint(3, 250, mask.shape, generator=g), 0)
    flags = torch.ones(6, dtype=torch.bool)
    return tiny_policies("tiny"), prompts, TraceBatch(ids, mask, flags, flags, group_size=3)


def test_the_reference_is_the_policy_without_its_adapter(scored):
    """ref_prior: as under an adapter of zeros, at the sampling temperature; padding exactly zero."""
    policy, prompts, batch = scored
    zero = copy.deepcopy(policy)
    with torch.no_grad():
        for _, parameter in zero.trainable():
            parameter.zero_()
    assert adapter_change(zero) == 0 < adapter_change(policy)
    with torch.no_grad():
        base = trace_logprobs(zero, prompts, batch, temperature=0.7)
        adapted = trace_logprobs(policy, prompts, batch, temperature=0.7)
    found = reference(policy, prompts, batch, frozenset({"ref_prior"}), 0.7)
    assert set(found) == {"ref_prior"} and found["ref_prior"].shape == batch.mask.shape
    assert worst(found["ref_prior"], base.prior) < 1e-4
    assert worst(found["ref_prior"], adapted.prior) > 0.1
    assert not found["ref_prior"][~batch.mask].any()


def test_bare_answers_are_a_plain_forward(scored):
    """bare_answer: prompt, an empty trace, seam and answer through transformers, no adapter, temperature 1."""
    policy, prompts, batch = scored
    plain = copy.deepcopy(policy).model.unload()
    assert isinstance(plain, LlamaForCausalLM) and not any("lora" in n for n, _ in plain.named_modules())
    found = reference(policy, prompts, batch, frozenset({"bare_answer", "ref_prior"}), 0.7)
    bare = found["bare_answer"]
    for i in range(len(batch)):
        p = prompts[i // 3]
        ids, n = torch.tensor([[*p.prior, *p.empty_trace, *p.seam, *p.answer]]), len(p.answer)
        assert policy.tokenizer.decode(list(p.empty_trace)) == "\n"
        with torch.no_grad():
            logp = plain(ids).logits[0].double().log_softmax(-1)
        by_hand = logp[-n - 1 : -1].gather(1, ids[0, -n:, None])[:, 0]
        assert worst(bare[i, :n], by_hand) < 1e-4
        assert not bare[i, n:].any()
    with torch.no_grad():
        answers = trace_logprobs(policy, prompts, batch)
    LogProbs(answers.prior, None, answers.answer, answers.answer_mask, **found)  # the shapes fit


def test_the_adapter_is_back_after_the_reference(scored):
    policy, prompts, batch = scored
    parameters = [p.clone() for _, p in policy.trainable()]
    with torch.no_grad():
        before = trace_logprobs(policy, prompts, batch)
        found = reference(policy, prompts, batch, frozenset({"ref_prior", "bare_answer"}))
        after = trace_logprobs(policy, prompts, batch)
    for name in ("prior", "posterior", "answer"):
        assert torch.equal(getattr(before, name), getattr(after, name))
    assert all(map(torch.equal, parameters, (p for _, p in policy.trainable())))
    assert all(p.requires_grad for _, p in policy.trainable()) and len(parameters) > 0
    assert not any(x.requires_grad for x in found.values())
