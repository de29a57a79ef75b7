"""CoVRL's group bound in the enumerable world: exact gradients at any length, and an optimum that reasons."""

import dataclasses
import itertools
import math

import numpy as np
import pandas as pd
import pytest
import torch

from covrl_lab import RunConfig
from covrl_lab.runs.reweight import value_by_use
from covrl_lab.theory.world import World
from covrl_lab.train.methods import MAX_ALPHA, METHODS, adapt_alpha, covrl_credit
from covrl_lab.train.objectives import Totals, group_credit, source_weights
from covrl_lab.types import Credit, LogProbs, TraceBatch

NO_TRACE = -3.0  # log p(y|x) without a trace, nats
COUNTS = [(1, 2, 2), (1, 1, 1), (1, 1, 2), (1, 3, 0), (1, 2, 1), (2, 1, 1)]
LONGER = [pytest.param(*counts, marks=pytest.mark.slow) for counts in [(3, 1, 1), (3, 2, 0), (2, 2, 1)]]


def group(world: World, index: torch.Tensor, from_prior: torch.Tensor) -> tuple[LogProbs, LogProbs, TraceBatch]:
    """A group of the world's traces ``index``: live log-probabilities, detached ones, and the batch."""
    prior, posterior = (world.trace_logprobs(t)[index] for t in (world.prior, world.posterior))
    answer = world.answer_logprobs()[index]
    mask = torch.ones_like(answer, dtype=torch.bool)
    no_trace = torch.full_like(answer, NO_TRACE / answer.shape[1])
    new = LogProbs(prior, posterior, answer, mask, no_trace=no_trace)
    ids = world.traces[index]
    rows = torch.ones(len(index), dtype=torch.bool)
    batch = TraceBatch(ids, torch.ones_like(ids, dtype=torch.bool), from_prior, rows, len(index))
    return new, new.detach(), batch


def enumerate_groups(world: World, n_prior: int, n_posterior: int, config: RunConfig):
    """Expected loss over all groups, the bound, and the posterior's target, each a differentiable scalar."""
    from_prior = torch.tensor([True] * n_prior + [False] * n_posterior)
    size, method = len(from_prior), METHODS["covrl"]
    log_p, log_q = (world.trace_logprobs(t).sum(1) for t in (world.prior, world.posterior))
    log_r = world.answer_logprobs().sum(1)
    floor = math.exp(config.evidence_floor * NO_TRACE)
    loss = bound = posterior_target = 0.0
    for members in itertools.product(range(len(world.traces)), repeat=size):
        index = torch.tensor(members)
        probability = torch.where(from_prior, log_p[index], log_q[index]).sum().exp().detach()
        new, old, batch = group(world, index, from_prior)
        credit = covrl_credit(batch, old, config, {})
        totals = Totals.of(batch, old.answer_mask)
        loss = loss + probability * method.loss(new, old, batch, credit, totals, config)[0]
        # By hand: the hybrid's probability of each trace is a constant of the sampler.
        p, q = log_p[index].exp(), log_q[index].exp()
        hybrid = ((n_prior * p + n_posterior * q) / size).detach()
        evidence = p * log_r[index].exp() ** config.evidence_power / hybrid
        bound = bound + probability * torch.log(floor + evidence.mean())
        weight = (evidence / (floor + evidence.mean())).detach()
        posterior_target = posterior_target + probability * (weight * log_q[index]).mean()
    return loss, bound, posterior_target


@pytest.mark.parametrize(("length", "n_prior", "n_posterior"), COUNTS + LONGER)
@pytest.mark.parametrize(("floor", "power"), [(0.0, 1.0), (0.5, 1.0), (1.0, 1.0), (0.5, 2.0), (1.0, 1.5)])
def test_the_gradient_is_that_of_the_bound_at_any_length(length, n_prior, n_posterior, floor, power):
    """Also with the baseline, for any fixed numbers of prior and posterior traces; float64 rounding."""
    world = World(length, answer_tokens=2 if length == 1 else 1)
    config = RunConfig(method="covrl", evidence_floor=floor, evidence_power=power, posterior_weight=0.0)
    loss, bound, _ = enumerate_groups(world, n_prior, n_posterior, config)
    found, truth = -world.gradient(loss), world.gradient(bound)
    assert truth.norm() > 0.05
    torch.testing.assert_close(found, truth, atol=1e-14, rtol=0)


@pytest.mark.parametrize(("length", "n_prior", "n_posterior"), [c for c in COUNTS if c[2]] + LONGER[::2])
def test_the_posterior_is_drawn_towards_the_true_posterior(length, n_prior, n_posterior):
    world = World(length)
    both, without = (RunConfig(method="covrl", posterior_weight=weight) for weight in (0.7, 0.0))
    loss, _, target = enumerate_groups(world, n_prior, n_posterior, both)
    plain = enumerate_groups(world, n_prior, n_posterior, without)[0]
    found = world.gradient(plain) - world.gradient(loss)
    torch.testing.assert_close(found, 0.7 * world.gradient(target), atol=1e-14, rtol=0)


def test_the_bound_rises_with_the_group_towards_the_evidence():
    """Jensen: more traces in the logarithm, a tighter bound, whatever prompts they came from."""
    world, config = World(1), RunConfig(method="covrl", evidence_floor=1.0)
    values = [float(enumerate_groups(world, n, n, config)[1].detach()) for n in (1, 2)] + [
        float(torch.log(math.exp(NO_TRACE) + world.log_evidence().exp()))
    ]
    assert values[0] < values[1] < values[2]
    assert values[2] - values[1] < 0.6 * (values[2] - values[0])


def test_source_weights_by_hand():
    """Two prior and two posterior traces: P/H = 2P/(P+Q); a prior-only group has weights of 1."""
    p, q = torch.tensor([0.5, 0.1, 0.2, 0.01]), torch.tensor([0.1, 0.3, 0.2, 0.5])
    mask = torch.ones(4, 1, dtype=torch.bool)
    logs = LogProbs(p.log()[:, None], q.log()[:, None], torch.zeros(4, 1), mask)
    rows = torch.ones(4, dtype=torch.bool)
    batch = TraceBatch(mask.long(), mask, torch.tensor([True, True, False, False]), rows, 4)
    prior, posterior = source_weights(logs, batch)
    np.testing.assert_allclose(prior, 2 * p / (p + q), rtol=1e-6)
    np.testing.assert_allclose(posterior, 2 * q / (p + q), rtol=1e-6)
    alone = TraceBatch(mask.long(), mask, torch.tensor([True] * 4), rows, 4)
    np.testing.assert_allclose(source_weights(logs, alone)[0], 1.0, rtol=1e-12)


def test_group_credit_by_hand():
    """c = 0.1, e = (0.4, 0, 0, 0): s = (0.4 / 0.2, 0, 0, 0); a baseline leaves one trace of each source out."""
    evidence = torch.tensor([[0.4, 0.0, 0.0, 0.0]], dtype=torch.float64)
    from_prior = torch.tensor([[True, True, False, False]])
    credit, baseline = group_credit(evidence, torch.tensor([[0.1]], dtype=torch.float64), from_prior)
    np.testing.assert_allclose(credit, [[2.0, 0, 0, 0]])
    # Left for trace 0: one prior and one posterior trace of no evidence. For trace 1: trace 0 and a posterior one.
    # For posterior traces: half the time trace 0 stays, and then the estimate is (2 x 0.4 + 2 x 0) / 4 = 0.2.
    np.testing.assert_allclose(baseline, [[0, 0.2 / 0.3, 0.1 / 0.3, 0.1 / 0.3]])


def test_unfinished_traces_earn_nothing_and_a_group_without_evidence_is_left_alone():
    world = World(1)
    index, from_prior = torch.tensor([0, 1, 2, 0]), torch.tensor([True, True, False, False])
    _, old, batch = group(world, index, from_prior)
    batch = TraceBatch(batch.ids, batch.mask, from_prior, torch.tensor([False, True, True, False]), 4)
    credit = covrl_credit(batch, old, RunConfig(method="covrl"), {})
    assert credit.reward[[0, 3]].tolist() == [0, 0] and (credit.advantage[[0, 3]] <= 0).all()
    none = TraceBatch(batch.ids, batch.mask, from_prior, torch.zeros(4, dtype=torch.bool), 4)
    credit = covrl_credit(none, old, RunConfig(method="covrl"), {})
    assert not credit.advantage.any() and not credit.answer_weight.any()
    # Also where c is too small for a number.
    tiny = RunConfig(method="covrl", evidence_floor=1e5)
    credit = covrl_credit(none, old, tiny, {})
    assert not credit.advantage.any() and not credit.answer_weight.any()
    alone = TraceBatch(batch.ids, batch.mask, from_prior, torch.tensor([False, True, False, False]), 4)
    credit = covrl_credit(alone, old, tiny, {})
    assert credit.advantage.isfinite().all() and credit.answer_weight.tolist() == pytest.approx(
        [0, 4, 0, 0]
    )  # e / mean e


def guess_or_reason(
    share: torch.Tensor, floor: float, group: int = 4, right: float = 0.2
) -> tuple[torch.Tensor, torch.Tensor]:
    """(published bound, group bound with this evidence_floor) where a share of the traces reason, others being empty.

    An empty trace leaves the answer at e^-5, a right one at 0.95, a wrong one, which the model trusts, at e^-12.
    """
    probability = torch.stack([1 - share, share * right, share * (1 - right)])
    likelihood = torch.tensor([math.exp(-5), 0.95, math.exp(-12)], dtype=torch.float64)
    published = (probability * likelihood.log()).sum()
    bound = 0.0
    c = math.exp(floor * -5)
    for kinds in itertools.product(range(3), repeat=group):
        index = torch.tensor(kinds)
        bound = bound + probability[index].prod() * torch.log(c + likelihood[index].mean())
    return published, bound


@pytest.mark.parametrize("floor", [0.0, 0.5])
def test_the_published_bound_prefers_not_to_reason_and_the_group_bound_reasons(floor):
    shares = [torch.tensor(s, dtype=torch.float64) for s in (0.01, 0.25, 0.5, 0.75, 0.99)]
    published, bound = zip(*(map(float, guess_or_reason(s, floor)) for s in shares), strict=True)
    assert np.all(np.diff(published) < 0), "one trace in the logarithm: being wrong costs more than guessing"
    assert np.all(np.diff(bound) > 0)


@pytest.mark.parametrize("floor", [0.0, 0.5])
def test_value_by_use_is_that_of_the_world(floor):
    """Every group of four traces of which a quarter is right, against the world's own enumeration."""
    shares, logs = np.array([0.0, 0.3, 1.0]), [math.log(0.95), -12.0, -12.0, -12.0]
    traces = [
        {"step": 1, "example_id": number, "answer_logp": [log], "reward": math.exp(log), "no_trace_logp": -5.0}
        for number, group in enumerate(itertools.product(logs, repeat=4))
        for log in group
    ]
    found = value_by_use(pd.DataFrame(traces), shares, floor)
    exact = np.array([guess_or_reason(torch.tensor(s), floor, right=0.25) for s in shares], dtype=float)
    np.testing.assert_allclose(found[["published", "group"]], exact, rtol=1e-9)


def group_value(likelihoods: dict[float, float], floor: float, power: float, group: int = 4) -> float:
    """The group bound where each of the prior's traces leaves the answer at a likelihood with a chance."""
    return sum(
        math.prod(likelihoods[p] for p in drawn) * math.log(floor + np.mean(np.power(drawn, power)))
        for drawn in itertools.product(likelihoods, repeat=group)
    )


@pytest.mark.parametrize("floor", [1.0, 0.08])
@pytest.mark.parametrize("share", [0.05, 0.15, 0.4])
def test_being_right_at_times_beats_guessing_as_often_if_the_power_is_above_one(floor, share):
    """A share of the traces right for certain, or every trace right with that probability: the same accuracy."""
    worth = {
        k: group_value({1.0: share, 0.0: 1 - share}, floor, k) - group_value({share: 1.0}, floor, k) for k in (1, 2)
    }
    assert worth[1] < 0 < worth[2]


@pytest.mark.parametrize(("floor", "reasons"), [(0.0, True), (0.5, True), (1.0, False)])
def test_a_floor_at_the_level_of_a_guess_pays_for_guessing(floor, reasons):
    """Credit of an empty trace beside wrong ones: small unless c is no more than the probability of a guess."""
    guess = torch.tensor([[-5.0]], dtype=torch.float64)
    evidence = torch.tensor([[math.exp(-5), math.exp(-12), math.exp(-12), math.exp(-12)]], dtype=torch.float64)
    credit, _ = group_credit(evidence, (floor * guess).exp(), torch.tensor([[True] * 4]))
    assert (float(credit[0, 0]) < 0.1) == reasons


def alpha_after(worth, p, q, **state) -> float:
    """alpha after a step of one-token traces with these credits and probabilities, at a rate of a half."""
    mask = torch.ones(len(p), 1, dtype=torch.bool)
    prior, posterior = (torch.tensor(v).log().double()[:, None] for v in (p, q))
    old = LogProbs(prior, posterior, prior, mask)
    batch = TraceBatch(mask.long(), mask, mask[:, 0], mask[:, 0], len(p))
    credit = Credit(prior[:, 0], prior[:, 0], torch.tensor(worth).double(), state)
    return adapt_alpha(batch, old, credit, RunConfig(method="covrl", alpha_rate=0.5))["alpha"]


def test_alpha_follows_the_evidence_upwards_only():
    """Two traces, one likelier under each prompt: the best alpha by hand."""
    p, q = [0.8, 0.2], [0.2, 0.8]
    # d/da of .6 log(.2 + .6 a) + .4 log(.8 - .6 a) + .1 log a = 0: .36 a (.8 - .6 a) - .24 a (.2 + .6 a)
    # + .1 (.2 + .6 a)(.8 - .6 a) = 0: .396 a^2 - .276 a - .016 = 0
    best = (0.276 + math.sqrt(0.276**2 + 4 * 0.396 * 0.016)) / (2 * 0.396)
    assert alpha_after([1.2, 0.8], p, q) == pytest.approx(0.5 + 0.5 * (best - 0.5), abs=0.005 / 2)  # its grid
    assert alpha_after([1.2, 0.8], p, q, alpha=0.9) == pytest.approx(0.9 + 0.5 * (best - 0.9), abs=0.005 / 2)
    assert alpha_after([0.12, 0.08], p, q) == alpha_after([1.2, 0.8], p, q), "however much credit there is"
    assert alpha_after([1.0, 0.0], p, q, alpha=0.85) == MAX_ALPHA
    assert alpha_after([0.0, 1.0], p, q, alpha=0.6) == 0.5  # never below its setting
    assert alpha_after([1.0, 1.0], p, p, alpha=0.7) == pytest.approx(0.85)  # equal prompts: the prior will do
    assert alpha_after([0.0, 0.0], p, q, alpha=0.7) == 0.7  # nothing measured


def test_the_best_alpha_is_the_nearest_to_the_true_posterior():
    """All 27 traces of a world, each with its share of the evidence, against a search over KL - log(alpha) / 10."""
    world = World(3, answer_tokens=2, seed=6)
    p, q = (world.trace_logprobs(t).sum(1).detach().exp() for t in (world.prior, world.posterior))
    answer = world.answer_logprobs().sum(1).detach().exp() ** 2  # sharp enough for both prompts to be needed
    truth = p * answer / (p * answer).sum()
    distance = lambda a: float((truth * (truth / (a * p + (1 - a) * q)).log()).sum()) - np.log(a) / 10  # noqa: E731
    best = min(np.linspace(0.001, 0.999, 999), key=distance)
    assert 0.5 < best < 0.9  # neither limit decides
    found = alpha_after(truth.tolist(), p.tolist(), q.tolist(), alpha=0.5)
    assert found == pytest.approx(0.5 + 0.5 * (best - 0.5), abs=0.005 / 2)  # its grid


def published_policy_gradient(world: World, baseline: str, from_prior: torch.Tensor, joint: bool) -> torch.Tensor:
    """Expected gradient of the published policy term over all groups with these fixed sources."""
    config = RunConfig(
        method="covrl_published",
        baseline=baseline,
        advantage_scale="none",
        clip="none",
        kl_weight=0,
        nll_weight=0,
        loss_aggregation="trace_sum",
    )
    log_p, log_q = (world.trace_logprobs(t).sum(1) for t in (world.prior, world.posterior))
    loss = 0.0
    for members in itertools.product(range(len(world.traces)), repeat=len(from_prior)):
        index = torch.tensor(members)
        probability = torch.where(from_prior, log_p[index], log_q[index]).sum().exp().detach()
        new, old, batch = group(world, index, from_prior)
        # "joint" hides the sources from the baseline, as a plain mean of the others does.
        seen = dataclasses.replace(batch, from_prior=torch.ones_like(from_prior)) if joint else batch
        credit = METHODS["covrl_published"].credit(seen, old, config, {})
        totals = Totals.of(batch, old.answer_mask)
        loss = loss + probability * METHODS["covrl_published"].loss(new, old, batch, credit, totals, config)[0]
    return world.gradient(loss)


def test_a_baseline_that_tells_the_source_biases_the_published_method():
    """Two prior and two posterior traces: the mean of the others is off by percents, that by sources is exact."""
    world, from_prior = World(1), torch.tensor([True, True, False, False])
    truth = published_policy_gradient(world, "none", from_prior, joint=False)
    balanced = published_policy_gradient(world, "leave_one_out", from_prior, joint=False)
    joint = published_policy_gradient(world, "leave_one_out", from_prior, joint=True)
    torch.testing.assert_close(balanced, truth, atol=1e-14, rtol=0)
    assert 0.02 < float((joint - truth).norm() / truth.norm()) < 0.2


def test_credit_of_both_prompts_by_hand():
    """Two prior traces and two posterior ones of one token; the numbers are worked out beside them."""
    p = np.array([0.5, 0.5, 0.1, 0.1])
    q = np.array([0.1, 0.1, 0.5, 0.5])
    answer = np.array([0.4, 0.0001, 0.8, 0.0001])
    mask = torch.ones(4, 1, dtype=torch.bool)
    prior, posterior, likelihood = (torch.tensor(np.log(v))[:, None] for v in (p, q, answer))
    old = LogProbs(prior, posterior, likelihood, mask, no_trace=torch.full((4, 1), 2 * math.log(0.1)).double())
    from_prior = torch.tensor([True, True, False, False])
    batch = TraceBatch(mask.long(), mask, from_prior, torch.ones(4, dtype=torch.bool), 4)
    credit = covrl_credit(batch, old, RunConfig(method="covrl", posterior_weight=1.0), {})

    h = 0.5 * p + 0.5 * q  # 0.3 everywhere: P/H = 5/3 or 1/3, Q/H the other way round
    evidence = answer * p / h
    s = evidence / (0.1 + evidence.mean())
    # Without a trace: its source's other trace and one of the other source, each standing for two.
    b = np.zeros(4)
    for i, (same, others) in enumerate([(1, (2, 3)), (0, (2, 3)), (3, (0, 1)), (2, (0, 1))]):
        left = [(evidence[same] + evidence[other]) / 2 for other in others]
        b[i] = np.mean([value / (0.1 + value) for value in left])
    np.testing.assert_allclose(credit.advantage, s - b * p / h, rtol=1e-6)
    np.testing.assert_allclose(credit.posterior_advantage, s - b * q / h, rtol=1e-6)
