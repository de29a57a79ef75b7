"""Sampling and evaluation, against transformers' own decoding, exact distributions and hand calculation."""

import math
from contextlib import contextmanager
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import torch
from helpers import TINIES

from covrl_lab.config import RunConfig
from covrl_lab.runs.alarms import alarms
from covrl_lab.runs.stats import bootstrap_interval, share_interval
from covrl_lab.train import evaluation, sampling
from covrl_lab.train.evaluation import EvalSet, evaluate, predict, summarise
from covrl_lab.train.models import load_policy, load_tokenizer
from covrl_lab.train.prompts import Prompter
from covrl_lab.train.sampling import PackedRows, _pick, draw_sources, generate, sample_traces, waves
from covrl_lab.train.scoring import trace_logprobs
from covrl_lab.train.step import verifier_rewards
from covrl_lab.types import Example

EXAMPLES = [
    Example("a", "the hat?", "seven"),
    Example("b", "what is it that the cat sat on?", "mat"),
    Example("c", "4+4?", "8"),
]


@pytest.fixture(scope="module")
def prompter():
    return Prompter(load_tokenizer("tiny"), style="few_shot")


@pytest.fixture(scope="module")
def prompts(prompter):
    return [prompter(e) for e in EXAMPLES]


@pytest.fixture
def bias():
    """Make single tokens likelier, in this library and in transformers alike, until the test ends."""
    changed = []

    def set_bias(policy, **tokens):
        values = torch.zeros(policy.head.weight.shape[0], device=policy.device, dtype=policy.dtype)
        for token, value in tokens.items():
            values[token_id(policy, token)] = value
        changed.append(policy.head)
        policy.head.bias = torch.nn.Parameter(values, requires_grad=False)

    yield set_bias
    for head in changed:
        head.bias = None


def token_id(policy, token):
    if token == "end_of_text":
        return policy.tokenizer.eos_token_id
    (newline,) = policy.tokenizer.encode("\n", add_special_tokens=False)
    return {"newline": newline}[token]


def holds_newline(policy, token):
    """True of the newline, and of tokens that hold one next to other text."""
    return "\n" in policy.tokenizer.decode([token])


@torch.no_grad()
def transformers_greedy(policy, context, max_tokens):
    """What ``transformers`` decodes greedily after one context, to its own end-of-text token."""
    ids = torch.tensor([list(context)], device=policy.device)
    out = policy.causal_lm.generate(
        input_ids=ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=max_tokens
    )
    return out[0, ids.shape[1] :].tolist()


def to_newline(policy, ids):
    """ids up to and with the first token that holds a newline, if there is one."""
    for i, token in enumerate(ids):
        if holds_newline(policy, token):
            return ids[: i + 1]
    return ids


def never(ids):
    return False


# --- what a draw is
def test_pick_is_the_inverse_of_the_distribution():
    """n equally spaced uniforms give each token its probability to within 1/n."""
    n = 20_000
    probs = torch.tensor([0.05, 0.0, 0.3, 0.15, 0.4, 0.1, 0.0], dtype=torch.float64)
    uniforms = (torch.arange(n, dtype=torch.float64) + 0.5) / n
    tokens = _pick(probs.log().expand(n, -1), uniforms, top_p=1.0)
    share = torch.bincount(tokens, minlength=7) / n
    assert float((share - probs).abs().max()) <= 1 / n
    assert not share[1] and not share[6]


def test_random_uniforms_give_the_distribution():
    n, generator = 20_000, torch.Generator().manual_seed(0)
    probs = torch.softmax(torch.randn(9, generator=generator, dtype=torch.float64), 0)
    uniforms = torch.rand(n, generator=generator, dtype=torch.float64)
    share = torch.bincount(_pick(probs.log().expand(n, -1), uniforms, 1.0), minlength=9) / n
    standard_error = (probs * (1 - probs) / n).sqrt()
    assert bool(((share - probs).abs() < 4 * standard_error).all())


@pytest.mark.parametrize("top_p", [0.05, 0.35, 0.45, 0.65, 0.75, 0.89, 0.99])
def test_top_p_keeps_the_smallest_set_that_reaches_it(top_p):
    probs = [0.1, 0.0, 0.2, 0.05, 0.4, 0.15, 0.1 + 1e-6, 0.0]
    probs[4] -= 1e-6
    kept, mass = [], 0.0
    for token in sorted(range(8), key=lambda k: -probs[k]):
        if mass >= top_p:
            break
        kept.append(token)
        mass += probs[token]
    n = 20_000
    uniforms = (torch.arange(n, dtype=torch.float64) + 0.5) / n
    logp = torch.tensor(probs, dtype=torch.float64).log()
    share = torch.bincount(_pick(logp.expand(n, -1), uniforms, top_p), minlength=8) / n
    assert share.nonzero()[:, 0].tolist() == sorted(kept)
    for token in kept:
        assert abs(float(share[token]) - probs[token] / mass) <= 1 / n


def test_the_ends_of_the_unit_interval_stay_inside_the_distribution():
    logp = torch.tensor([[0.0, 0.5, 0.5, 0.0]], dtype=torch.float64).log()
    assert _pick(logp, torch.tensor([0.0]), 1.0).item() == 1
    assert _pick(logp, torch.tensor([0.5], dtype=torch.float64), 1.0).item() == 2
    assert _pick(logp, torch.tensor([1 - 2.0**-53], dtype=torch.float64), 1.0).item() == 2


def test_no_uniform_is_greedy():
    logp = torch.tensor([[0.2, 0.5, 0.3], [0.6, 0.3, 0.1]]).log()
    assert _pick(logp, None, 0.1).tolist() == [1, 0]


@pytest.mark.parametrize("temperature", [1.0, 1.5])
@torch.no_grad()
def test_first_tokens_follow_the_models_distribution(tiny_policies, prompts, temperature):
    policy, n = tiny_policies("tiny"), 1000
    uniforms = ((torch.arange(n, dtype=torch.float64) + 0.5) / n)[:, None]
    ids, _, _ = generate(
        policy,
        [prompts[0].prior] * n,
        max_tokens=1,
        ended=never,
        temperature=temperature,
        uniforms=uniforms,
    )
    logits = policy.causal_lm(torch.tensor([prompts[0].prior], device=policy.device)).logits[0, -1].cpu()
    probs = torch.softmax(logits.double() / temperature, 0)
    share = torch.bincount(torch.tensor(ids)[:, 0], minlength=len(probs)) / n
    assert float((share - probs).abs().max()) <= 1.001 / n


# --- decoding with the tree cache
@pytest.mark.parametrize("name", TINIES)
def test_greedy_equals_transformers(tiny_policies, prompts, name):
    """Shared prefixes, repeated contexts and rows of all lengths; 24 tokens pass the window of 16."""
    policy = tiny_policies(name)
    contexts = [p.prior for p in prompts] + [p.posterior for p in prompts] + [prompts[0].prior]
    ids, done, _ = generate(policy, contexts, max_tokens=24, ended=never)
    assert ids == [transformers_greedy(policy, c, 24) for c in contexts]
    assert not any(done) and len({tuple(row) for row in ids}) == 6


@pytest.mark.parametrize("waste", [0, 1.2, 100], ids=["a block a row", "some blocks", "one block"])
@pytest.mark.parametrize("name", TINIES)
def test_greedy_equals_transformers_where_rows_stop_early(tiny_policies, prompts, bias, monkeypatch, name, waste):
    policy, blocks, share = tiny_policies(name), [], PackedRows._share

    def spy(rows, paths):
        nodes = share(rows, paths)
        blocks.append(len(nodes))
        return nodes

    monkeypatch.setattr(PackedRows, "_share", spy)
    monkeypatch.setattr(sampling, "MAX_NODES_PER_PATH", waste)
    bias(policy, end_of_text=4.0)
    contexts = [(*p.prior, *suffix) for p in prompts for suffix in ((), (40,), (50, 51), (60,))]
    ids, done, _ = generate(policy, contexts, max_tokens=24, ended=never)
    expected = [transformers_greedy(policy, c, 24) for c in contexts]
    assert ids == expected
    assert len({len(row) for row in ids}) > 2  # some stop, at different lengths
    assert not any(done)  # an end-of-text token is not the end marker
    assert len(blocks) > 1  # finished rows were dropped
    assert blocks[0] == {0: 12, 100: 1}.get(waste, blocks[0]) and (waste != 1.2 or 1 < blocks[0] < 12)


def test_end_of_text_may_be_a_list(tiny_policies, prompts, monkeypatch):
    policy = tiny_policies("tiny")
    full = transformers_greedy(policy, prompts[0].prior, 8)
    stop = full[3]
    monkeypatch.setattr(policy.causal_lm.generation_config, "eos_token_id", [policy.tokenizer.eos_token_id, stop])
    ids, done, _ = generate(policy, [prompts[0].prior], max_tokens=8, ended=never)
    assert ids[0] == full[: full.index(stop) + 1] and done == [False]


@pytest.mark.parametrize("name", TINIES)
def test_rows_do_not_depend_on_their_neighbours(tiny_policies, prompts, bias, name):
    policy = tiny_policies(name)
    bias(policy, end_of_text=3.0)
    contexts = [c for p in prompts for c in (p.prior, p.posterior, p.prior)]
    uniforms = torch.rand(9, 12, generator=torch.Generator().manual_seed(4), dtype=torch.float64)
    settings = {"max_tokens": 12, "ended": never, "temperature": 1.2}
    ids, _, logprobs = generate(policy, contexts, uniforms=uniforms, **settings)
    assert len({len(row) for row in ids}) > 2
    for i, context in enumerate(contexts):
        own_ids, _, own_logprobs = generate(policy, [context], uniforms=uniforms[i : i + 1], **settings)
        assert own_ids[0] == ids[i]
        assert np.allclose(own_logprobs[0], logprobs[i], atol=1e-4)
    order = torch.randperm(9, generator=torch.Generator().manual_seed(1)).tolist()
    shuffled, _, _ = generate(policy, [contexts[i] for i in order], uniforms=uniforms[order], **settings)
    assert shuffled == [ids[i] for i in order]


class Replayed:
    """Stands in for a CUDA graph: the same tensors in and out at every call."""

    made = 0

    def __init__(self, function):
        self.function, self.output = function, function().clone()
        Replayed.made += 1

    def replay(self):
        self.output.copy_(self.function())


@pytest.mark.parametrize("seats", [1, pytest.param(4, marks=pytest.mark.slow), 9])
@pytest.mark.parametrize("static", [False, True], ids=["as on a CPU", "as on CUDA"])
@pytest.mark.parametrize("name", TINIES)
def test_waves_buckets_and_recorded_steps_change_nothing(
    tiny_policies, prompts, bias, monkeypatch, name, static, seats
):
    """Ragged contexts, rows that end early, others in their seats, a ring that is written over, late looks."""
    policy = tiny_policies(name)
    bias(policy, end_of_text=2.5, newline=0.5)
    contexts = [(*c, *more) for p in prompts for c in (p.prior, p.posterior) for more in ((), (40,), (50, 51, 60))]
    uniforms = torch.rand(18, 20, generator=torch.Generator().manual_seed(4), dtype=torch.float64)
    settings = {"max_tokens": 20, "uniforms": uniforms, "ended": lambda ids: holds_newline(policy, ids[-1])}
    expected_ids, expected_done, expected = generate(policy, contexts, **settings)
    lengths = [len(row) for row in expected_ids]
    assert min(lengths) <= 2 and max(lengths) > 13 and 0 < sum(expected_done) < 18
    monkeypatch.setattr(policy, "rows_at_once", seats)
    monkeypatch.setattr(sampling, "BUCKET", 3)
    Replayed.made, moves, move = 0, [], PackedRows._move
    monkeypatch.setattr(PackedRows, "_move", lambda rows, kept, to: moves.append(to) or move(rows, kept, to))
    if static:
        monkeypatch.setattr(policy, "graphs", True)
        monkeypatch.setattr(sampling, "record", lambda function: ((graph := Replayed(function)), graph.output))
        monkeypatch.setitem(sampling.LOOK_EVERY, "cpu", 8)
        monkeypatch.setitem(sampling.CROWDED, "cpu", 0.5)
    ids, done, logprobs = generate(policy, contexts, **settings)
    assert (ids, done) == (expected_ids, expected_done)
    for row, wanted in zip(logprobs, expected, strict=True):
        assert np.allclose(row, wanted, atol=1e-4)
    assert set(moves) == {0, 3, 6, 12, 20} and len(moves) > 6  # grown, and seats given to others
    assert bool(Replayed.made) == static and Replayed.made <= len(moves)


def test_a_fault_of_the_device_is_no_refused_recording(tiny_policies, prompts, monkeypatch, caplog):
    """Only a refused capture makes decoding plain, and says so once; memory and the card's errors end the run."""
    policy, contexts = tiny_policies("tiny"), [prompts[0].prior, prompts[1].prior]
    expected, _, _ = generate(policy, contexts, max_tokens=3, ended=never)

    def error(kind, code=None, behind=None):
        found = kind("of a test")
        if code:  # CUDA's, as torch passes it on
            found.error_code = code
        found.__context__ = behind
        return found

    def decode(fault):
        def refused(function):
            raise fault

        monkeypatch.setattr(sampling, "record", refused)
        return generate(policy, contexts, max_tokens=3, ended=never)[0]

    memory = error(torch.OutOfMemoryError)
    monkeypatch.setattr(policy, "graphs", True)
    for fault in (memory, error(torch.AcceleratorError, 700), error(torch.AcceleratorError, 901, behind=memory)):
        with pytest.raises(type(fault), match="of a test"):
            decode(fault)
        assert policy.graphs and not caplog.records
    for fault in (error(RuntimeError), error(torch.AcceleratorError, 900)):
        policy.graphs = True
        caplog.clear()
        assert decode(fault) == decode(fault) == expected
        (record,) = caplog.records
        assert "not recorded as a CUDA graph" in record.message and "of a test" in record.message


@contextmanager
def forwards(policy):
    """The tokens of each forward inside, padding counted."""
    sizes = []
    spy = policy.decoder.register_forward_pre_hook(
        lambda module, args, given: sizes.append(given["input_ids"].numel()), with_kwargs=True
    )
    try:
        yield sizes
    finally:
        spy.remove()


@pytest.mark.slow
@pytest.mark.parametrize(
    "name, packs, seats", [("tiny", True, None), ("tiny-qwen3", True, 3), ("tiny-gemma3", True, 3), ("tiny", False, 3)]
)
def test_a_bound_on_the_tokens_of_a_forward_changes_nothing_else(
    tiny_policies, prompter, bias, monkeypatch, name, packs, seats
):
    """Sampled traces, then answers after contexts that hold them, which are longer than most prompts."""
    policy, task = tiny_policies(name), SimpleNamespace(score=lambda answer, example: float(len(answer)))
    monkeypatch.setattr(policy, "packs", packs)
    bias(policy, end_of_text=2.0, newline=1.0)
    examples = [Example(str(k), f"{k} or {3 * k}, and why?", str(k)) for k in range(4)]
    prompts = [prompter(example) for example in examples]

    def drawn():
        batch = sampled(policy, prompter, prompts, max_tokens=16)
        config = RunConfig(alpha=1.0, max_trace_tokens=16, max_answer_tokens=4)
        frame = evaluate(policy, prompter, EvalSet("", ALWAYS_RIGHT, examples, 1), config, progress=False)
        return batch, frame, verifier_rewards(policy, prompter, task, examples, prompts, batch, 4)

    with forwards(policy) as free:
        batch, frame, judged = drawn()
    bound = 1 + max(len(p.posterior) for p in prompts) + 16
    assert max(free) > 2 * bound
    monkeypatch.setattr(policy, "tokens_at_once", bound)
    monkeypatch.setattr(policy, "room", 6 * bound)
    monkeypatch.setattr(policy, "rows_at_once", seats)
    with forwards(policy) as cut:
        batch_cut, frame_cut, judged_cut = drawn()
    assert max(cut) <= bound and len(cut) > len(free)
    assert torch.equal(batch_cut.ids, batch.ids) and torch.equal(batch_cut.finished, batch.finished)
    assert torch.allclose(batch_cut.sampler_logprobs, batch.sampler_logprobs, atol=1e-4)
    pd.testing.assert_frame_equal(frame_cut, frame, rtol=0, atol=1e-3)
    assert judged_cut[0] == judged[0] and torch.equal(judged_cut[1], judged[1])


@pytest.mark.parametrize("seats", [None, 4])
def test_keys_and_values_keep_within_the_room(tiny_policies, prompts, monkeypatch, seats):
    """Contexts of very different lengths, some of them the same: what is there at each change of seats is counted."""
    policy, kept, seat = tiny_policies("tiny"), [], PackedRows._seat

    def spy(rows, new=()):
        seat(rows, new)
        (keys, _), (blocks, _) = rows.layers[0], rows.prompts[0]  # of two heads
        kept.append(keys.shape[2] + len(blocks) // 2 * blocks.shape[1] + rows.rows * 6)

    monkeypatch.setattr(PackedRows, "_seat", spy)
    contexts = [(*p.prior, *range(40, 40 + n)) for p in prompts for n in (0, 0, 1, 9, 13, 160)]
    uniforms = torch.rand(18, 6, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    settings = {"max_tokens": 6, "uniforms": uniforms, "ended": lambda ids: len(ids) > ids[0] % 6}
    expected, _, _ = generate(policy, contexts, **settings)
    for room in (1000, 600, 1):
        kept.clear()
        monkeypatch.setattr(policy, "room", room)
        monkeypatch.setattr(policy, "rows_at_once", seats)
        assert generate(policy, contexts, **settings)[0] == expected
        parts = waves(policy, contexts, 6)
        assert sorted(row for part in parts for row in part) == list(range(18)) and len(kept) >= len(parts) > 1
        assert max(kept) <= room or room == 1
    assert len(parts) == 18  # one context is never too long


def test_a_look_waits_for_the_device_once_in_a_while(tiny_policies, prompts, monkeypatch):
    """Between two looks nothing is read from the device, and a row is shown to ``ended`` once a token."""
    policy, seen = tiny_policies("tiny"), []
    monkeypatch.setitem(sampling.LOOK_EVERY, "cpu", 5)
    looks, read = [], torch.Tensor.tolist
    monkeypatch.setattr(torch.Tensor, "tolist", lambda x: looks.append(x.shape) or read(x))
    ids, _, _ = generate(policy, [prompts[0].prior], max_tokens=20, ended=lambda z: seen.append(len(z)) or len(z) == 7)
    assert len(ids[0]) == 7 and seen == list(range(1, 8))
    assert [shape for shape in looks if len(shape) == 3] == [(2, 1, 5), (2, 1, 5)]


# --- the sampler's own log-probabilities
def sampled(policy, prompter, prompts, *, group=4, max_tokens=12, seed=0, **settings):
    sources = draw_sources(len(prompts), group, 0.5, "stratified", torch.Generator().manual_seed(seed))
    generator = torch.Generator().manual_seed(seed)
    return sample_traces(policy, prompter, prompts, sources, max_tokens=max_tokens, generator=generator, **settings)


def source_logprobs(policy, prompts, batch, temperature):
    with torch.no_grad():
        scores = trace_logprobs(policy, prompts, batch, temperature=temperature)
    return torch.where(batch.from_prior[:, None], scores.prior.cpu(), scores.posterior.cpu())


@pytest.mark.parametrize("temperature, top_p", [(1.0, 1.0), (0.7, 1.0), (1.5, 1.0), (1.0, 0.8)])
@pytest.mark.parametrize("name", TINIES)
def test_sampler_and_scores_agree(tiny_policies, prompter, prompts, bias, name, temperature, top_p):
    """To float32 rounding, also under a top-p cut, which log-probabilities leave out on purpose."""
    policy = tiny_policies(name)
    bias(policy, newline=3.0)
    batch = sampled(policy, prompter, prompts, temperature=temperature, top_p=top_p)
    assert bool(batch.from_prior.any()) and not bool(batch.from_prior.all())
    expected = source_logprobs(policy, prompts, batch, temperature)
    assert float((batch.sampler_logprobs - expected).abs().max()) < 1e-4
    assert bool((batch.sampler_logprobs[~batch.mask] == 0).all())
    assert bool((batch.ids[~batch.mask] == 0).all()) and not bool(batch.mask.all())
    # The other context would give other numbers.
    swapped = trace_logprobs(policy, prompts, batch, temperature=temperature)
    other = torch.where(batch.from_prior[:, None], swapped.posterior.cpu(), swapped.prior.cpu())
    assert float((batch.sampler_logprobs - other.detach()).abs().max()) > 0.1


@pytest.mark.parametrize("name", TINIES)
def test_sampler_and_scores_agree_in_4_bits(prompter, prompts, name):
    """bfloat16 keeps 8 bits: a logit of about 5 may be off by 0.02, and not alike for all matrix shapes."""
    policy = load_policy(name, quantization="nf4", dtype="bfloat16", lora_rank=4)
    batch = sampled(policy, prompter, prompts)
    gap = (batch.sampler_logprobs - source_logprobs(policy, prompts, batch, 1.0)).abs()[batch.mask]
    assert float(gap.max()) < 0.1 and float(gap.mean()) < 0.02


# --- traces
def test_draws_are_a_function_of_the_generator(tiny_policies, prompter, prompts):
    policy = tiny_policies("tiny")
    first, again, other = (sampled(policy, prompter, prompts, seed=s) for s in (3, 3, 4))
    assert torch.equal(first.ids, again.ids) and torch.equal(first.sampler_logprobs, again.sampler_logprobs)
    assert first.ids.shape != other.ids.shape or not torch.equal(first.ids, other.ids)
    assert first.group_size == 4 and len(first) == 12


def test_which_traces_count_as_finished(tiny_policies, prompter, prompts, bias):
    """Only a marker after some text: not a truncated, not an empty trace, not one that end-of-text ended."""
    policy = tiny_policies("tiny")
    bias(policy, newline=4.0, end_of_text=4.0)
    batch = sampled(policy, prompter, prompts, group=40, max_tokens=5)
    end_of_text = token_id(policy, "end_of_text")
    kinds = {"finished": 0, "empty": 0, "truncated": 0, "end_of_text": 0}
    for i in range(len(batch)):
        ids = batch.ids[i, : int(batch.mask[i].sum())].tolist()
        assert not any(holds_newline(policy, token) or token == end_of_text for token in ids[:-1])
        if holds_newline(policy, ids[-1]):
            kind = "finished" if policy.tokenizer.decode(ids).split("\n")[0].strip() else "empty"
        elif ids[-1] == end_of_text:
            kind = "end_of_text"
        else:
            assert len(ids) == 5
            kind = "truncated"
        kinds[kind] += 1
        assert bool(batch.finished[i]) == (kind == "finished"), (kind, ids)
    assert min(kinds.values()) >= 3, kinds


def test_chat_traces_end_with_the_closing_tag(tiny_policies, monkeypatch):
    """The tag is several tokens; the trace ends with the one that completes it."""
    policy = tiny_policies("tiny")
    prompter = Prompter(policy.tokenizer, style="chat")
    prompt = prompter(EXAMPLES[0])
    trace = policy.tokenizer.encode(" so it is</think> and on and on", add_special_tokens=False)
    end = len(policy.tokenizer.encode(" so it is</think>", add_special_tokens=False))
    step = iter(trace)

    def scripted(policy, hidden):
        return 100 * torch.nn.functional.one_hot(torch.tensor([next(step)]), len(policy.head.weight)).float()

    monkeypatch.setattr(sampling, "final_logits", scripted)
    batch = sample_traces(policy, prompter, [prompt], torch.tensor([True]), max_tokens=20)
    assert batch.ids.tolist() == [trace[:end]] and batch.finished.tolist() == [True]


# --- who draws
def test_stratified_groups_hold_floor_or_ceil_of_their_share():
    generator = torch.Generator().manual_seed(0)
    for alpha, group in [(0.3, 4), (0.5, 3), (0.05, 8), (0.9, 5), (0.25, 4), (0.7, 10)]:
        questions = 4000
        sources = draw_sources(questions, group, alpha, "stratified", generator).view(questions, group)
        count = sources.sum(1)
        wanted = round(alpha * group, 9)
        assert set(count.tolist()) == {math.floor(wanted), math.ceil(wanted)}
        fraction = wanted - math.floor(wanted)
        standard_error = math.sqrt(fraction * (1 - fraction) / questions) / group
        assert abs(float(sources.float().mean()) - alpha) <= 4 * standard_error + 1e-6
        # Prior traces come first in their group.
        assert torch.equal(sources, torch.arange(group) < count[:, None])


def test_bernoulli_draws_each_trace_on_its_own():
    n, group, alpha = 5000, 4, 0.3
    sources = draw_sources(n, group, alpha, "bernoulli", torch.Generator().manual_seed(0)).view(n, group)
    standard_error = math.sqrt(alpha * (1 - alpha) / (n * group))
    assert abs(float(sources.float().mean()) - alpha) < 4 * standard_error
    for k in range(group + 1):  # counts of a group are binomial
        p = math.comb(group, k) * alpha**k * (1 - alpha) ** (group - k)
        share = float((sources.sum(1) == k).float().mean())
        assert abs(share - p) < 4 * math.sqrt(p * (1 - p) / n)


@pytest.mark.parametrize("split", ["stratified", "bernoulli"])
def test_alpha_zero_and_one_are_exact(split):
    generator = torch.Generator().manual_seed(0)
    assert not draw_sources(5000, 4, 0.0, split, generator).any()
    assert draw_sources(5000, 4, 1.0, split, generator).all()


def test_each_source_draws_from_its_own_context(tiny_policies, prompter, prompts):
    """With almost no temperature each trace is the greedy one of the prompt that drew it."""
    policy = tiny_policies("tiny")
    sources = torch.tensor([True, False, False, True, True, False])
    batch = sample_traces(policy, prompter, prompts, sources, max_tokens=6, temperature=1e-4)
    for i, prior in enumerate(sources.tolist()):
        prompt = prompts[i // 2]
        greedy = transformers_greedy(policy, prompt.prior if prior else prompt.posterior, 6)
        assert batch.trace(i) == to_newline(policy, greedy)


# --- prediction
@pytest.mark.slow
@pytest.mark.parametrize("name", TINIES)
def test_predict_is_greedy_trace_seam_greedy_answer(tiny_policies, prompter, name):
    policy = tiny_policies(name)
    prompts = [prompter(Example(str(k), f"{k} or {3 * k}?", str(k))) for k in range(8)]
    decode, seen = policy.tokenizer.decode, []
    for budget in (2, 16):  # most traces are cut, most end
        results = predict(policy, prompter, prompts, max_trace_tokens=budget, max_answer_tokens=6)
        for prompt, result in zip(prompts, results, strict=True):
            trace = to_newline(policy, transformers_greedy(policy, prompt.prior, budget))
            context = [*prompt.prior, *trace, *policy.tokenizer.encode("Answer:", add_special_tokens=False)]
            answer = to_newline(policy, transformers_greedy(policy, context, 6))
            text = decode(trace).split("\n")[0].strip()
            assert result == {
                "trace": text,
                "trace_ids": trace,
                "prediction": decode(answer).split("\n")[0].strip(),
                "finished": holds_newline(policy, trace[-1]) and text != "",
                "trace_tokens": len(trace),
            }
        seen += results
    assert {r["finished"] for r in seen} == {True, False}
    assert len({r["prediction"] for r in seen}) > 3


ALWAYS_RIGHT = SimpleNamespace(score=lambda prediction, example: 1.0)


def evaluated(policy, prompter, task=ALWAYS_RIGHT, samples=2, **settings):
    config = RunConfig(**{"alpha": 1.0, "max_trace_tokens": 6, "max_answer_tokens": 4, "seed": 5} | settings)
    return evaluate(policy, prompter, EvalSet("", task, EXAMPLES, samples), config, progress=False)


def test_evaluate_says_how_much_answers_depend_on_traces(tiny_policies, prompter, bias):
    """Against one plain forward for each answer: after its own trace, the next question's, and an empty one."""
    policy = tiny_policies("tiny")
    bias(policy, newline=4.0)
    frame = evaluated(policy, prompter, alpha=0.5)
    greedy = frame[frame["sample"] < 0]
    prompts = [prompter(example) for example in EXAMPLES]
    results = predict(policy, prompter, prompts, max_trace_tokens=6, max_answer_tokens=4)
    traces = [result["trace_ids"] for result in results]
    kinds = {
        "answer_logp": traces,
        "other_trace_logp": [*traces[1:], traces[0]],
        "no_trace_logp": [policy.tokenizer.encode("\n", add_special_tokens=False)] * len(traces),
    }
    for name, used in kinds.items():
        for prompt, trace, value in zip(prompts, used, greedy[name], strict=True):
            ids = torch.tensor([[*prompt.prior, *trace, *prompt.seam, *prompt.answer]])
            with torch.no_grad():
                logprobs = policy.causal_lm(input_ids=ids).logits[0].double().log_softmax(-1)
            n = len(prompt.answer)
            assert value == pytest.approx(logprobs[-n - 1 : -1].gather(1, ids[0, -n:, None]).sum().item(), abs=1e-3)
    summary = summarise(frame)
    moved = (greedy["answer_logp"] - greedy["other_trace_logp"]).abs().mean()
    assert summary["trace_dependence"] == pytest.approx(moved) and moved > 0
    ends = predict(policy, prompter, prompts, max_trace_tokens=6, max_answer_tokens=4, posterior=True)
    assert summary["posterior_accuracy"] == np.mean([result["finished"] for result in ends])
    sampled = frame[frame["sample"] >= 0]
    assert (sampled["answer_logp"] < 0).all() and sampled[["no_trace_logp", "posterior_score"]].isna().all(axis=None)


def test_evaluate_scores_finished_generations_only(tiny_policies, prompter, prompts, bias):
    policy = tiny_policies("tiny")
    bias(policy, newline=4.0)
    seen = []
    task = SimpleNamespace(score=lambda prediction, example: seen.append((prediction, example.id)) or 0.5)
    frame = evaluated(policy, prompter, task, samples=6)
    assert frame["finished"].any() and not frame["finished"].all()
    assert (frame["score"] == np.where(frame["finished"], 0.5, 0.0)).all()
    finished = frame[frame["finished"]]
    # Greedy answers are also scored on the two other questions, which says what guessing would give.
    greedy = finished[finished["sample"] < 0]
    others = [
        (row.prediction, other)
        for row in greedy.itertuples()
        for other in "abcab"["abc".index(row.example_id) + 1 :][:2]
    ]
    own = list(zip(finished["prediction"], finished["example_id"], strict=True))
    assert seen == [*own[: len(greedy)], *others, *own[len(greedy) :]]
    assert list(frame["sample"]) == [s for s in range(-1, 6) for _ in EXAMPLES]
    assert list(frame["example_id"]) == ["a", "b", "c"] * 7
    assert list(frame["answer"]) == ["seven", "mat", "8"] * 7
    greedy = predict(policy, prompter, prompts, max_trace_tokens=6, max_answer_tokens=4)
    columns = ["trace", "prediction", "finished", "trace_tokens"]
    assert frame[columns].head(3).to_dict("records") == [{k: row[k] for k in columns} for row in greedy]


def test_what_the_answers_score_on_other_questions(tiny_policies, prompter, bias):
    """Three questions, an answer that is right for "a" alone: 1 of 2 others for b and for c, and none for a."""
    policy = tiny_policies("tiny")
    bias(policy, newline=4.0)
    task = SimpleNamespace(score=lambda prediction, example: float(example.id == "a"))
    frame = evaluated(policy, prompter, task, samples=0)
    assert list(frame["guess_score"]) == [
        0.5 * (name != "a" and done) for name, done in zip("abc", frame["finished"], strict=True)
    ]
    assert summarise(frame)["guess_accuracy"] == pytest.approx(frame["guess_score"].mean())
    assert summarise(frame)["guess_accuracy"] > 0


@pytest.mark.slow
def test_an_answer_that_the_scorer_cuts_is_marked_and_counted(tiny_policies, prompter, bias, monkeypatch):
    policy, calls = tiny_policies("tiny"), []
    bias(policy, newline=4.0)
    monkeypatch.setattr(evaluation.scorer, "seconds", 0.5)

    def score(prediction, example):
        calls.append(prediction)
        return evaluation.scorer("math_verify", "1+x^2" if calls[1:] else "9^{9^{9^{9}}}", {"answer": "x^2+1"})

    frame = evaluated(policy, prompter, SimpleNamespace(score=score), samples=1)
    finished = frame[frame["finished"]]
    assert finished["scoring_cut"].tolist() == [True] + [False] * (len(finished) - 1) and len(finished) > 1
    assert (finished["score"] == 1.0 - finished["scoring_cut"]).all() and not frame["scoring_cut"][3:].any()
    assert summarise(frame)["eval_scoring_cut"] == 1
    both = pd.concat([frame.assign(set="one"), frame.assign(set="two")])
    summary = evaluation.summarise_sets(both)
    assert summary["eval_scoring_cut"] == 2 and summary["two/eval_scoring_cut"] == 1
    assert "2 answers were cut" in alarms([], [summary])["scoring cut"]


def test_evaluate_is_a_function_of_its_seed_and_not_of_its_batches(tiny_policies, prompter, monkeypatch):
    policy = tiny_policies("tiny")
    frame = evaluated(policy, prompter)
    monkeypatch.setattr(evaluation, "ROWS", 2)
    pd.testing.assert_frame_equal(evaluated(policy, prompter), frame)
    other = evaluated(policy, prompter, seed=6)
    assert list(other["trace"][:3]) == list(frame["trace"][:3])  # greedy
    assert (other["trace"][3:] != frame["trace"][3:]).all()
    assert (frame["trace"][3:6].to_numpy() != frame["trace"][6:].to_numpy()).all()


# --- intervals
def test_interval_of_equal_scores_is_a_point():
    assert bootstrap_interval(np.ones(12)) == (1.0, 1.0, 1.0)
    assert bootstrap_interval(np.zeros(12)) == (0.0, 0.0, 0.0)
    assert bootstrap_interval(np.array([0.25])) == (0.25, 0.25, 0.25)
    with pytest.raises(ValueError, match="no scores"):
        bootstrap_interval(np.array([]))


def binomial_quantile(n, p, q):
    total = 0.0
    for k in range(n + 1):
        total += math.comb(n, k) * p**k * (1 - p) ** (n - k)
        if total >= q:
            return k
    return n


@pytest.mark.parametrize("right, n", [(12, 40), (90, 300), (3, 50)])
def test_interval_of_right_and_wrong_is_binomial(right, n):
    """A resample's number of right answers is binomial, so the exact quantiles are known: +-1 answer."""
    mean, low, high = bootstrap_interval(np.array([1.0] * right + [0.0] * (n - right)))
    assert mean == pytest.approx(right / n)
    tail = 0.025
    assert low * n == pytest.approx(binomial_quantile(n, right / n, tail), abs=1)
    assert high * n == pytest.approx(binomial_quantile(n, right / n, 1 - tail), abs=1)


def test_interval_agrees_with_the_normal_approximation():
    n, p = 2000, 0.3
    mean, low, high = bootstrap_interval(np.arange(n) < n * p, resamples=4000)
    half = 1.959964 * math.sqrt(p * (1 - p) / n)
    assert (mean, low, high) == pytest.approx((p, p - half, p + half), abs=0.1 * half)


def test_interval_covers_the_truth():
    """Percentile intervals of 60 answers at 95% hold the truth in about 94% of data sets."""
    draw, p, trials = np.random.default_rng(0), 0.4, 400
    covered = 0
    for seed in range(trials):
        _, low, high = bootstrap_interval(draw.random(60) < p, resamples=400, seed=seed)
        covered += low <= p <= high
    assert 0.90 <= covered / trials <= 0.98


def test_interval_is_seeded():
    scores = np.random.default_rng(0).random(50)
    assert bootstrap_interval(scores) == bootstrap_interval(scores)
    assert bootstrap_interval(scores) != bootstrap_interval(scores, seed=1)


def test_samples_of_a_question_are_averaged_before_resampling():
    """Eight samples of one question are not eight questions."""
    per_question = np.repeat(np.arange(30) % 3 == 0, 8).reshape(30, 8).astype(float)
    assert bootstrap_interval(per_question) == bootstrap_interval(per_question.mean(1))
    _, low, high = bootstrap_interval(per_question)
    _, flat_low, flat_high = bootstrap_interval(per_question.ravel())
    assert (high - low) == pytest.approx((flat_high - flat_low) * math.sqrt(8), rel=0.15)


def test_summarise_by_hand():
    rows = []
    for question, scores in {"a": (1, 1, 0), "b": (0, 1, 1), "c": (0, 0, 0), "d": (1, 1, 0)}.items():
        for sample, value in zip((-1, 0, 1), scores, strict=True):
            tokens = {"a": 3, "b": 5, "c": 7, "d": 9}[question] if sample < 0 else 100
            finished = question != "c" or sample >= 0
            rows.append((question, sample, float(value), finished, tokens))
    frame = pd.DataFrame(rows, columns=["example_id", "sample", "score", "finished", "trace_tokens"])
    summary = summarise(frame.sample(frac=1, random_state=0))
    assert (summary["accuracy"], summary["eval_questions"]) == (0.5, 4)
    assert (summary["eval_finished_share"], summary["eval_trace_tokens"]) == (0.75, 6.0)
    assert (summary["avg_at_k"], summary["k"]) == (pytest.approx((0.5 + 1 + 0 + 0.5) / 4), 2)
    _, low, high = bootstrap_interval(np.array([0.5, 1, 0, 0.5]))
    assert (summary["avg_at_k_low"], summary["avg_at_k_high"]) == (low, high)
    assert (summary["accuracy_low"], summary["accuracy_high"]) == share_interval(2, 4)[1:]
    greedy_only = summarise(frame[frame["sample"] < 0])
    assert "avg_at_k" not in greedy_only and greedy_only["accuracy"] == 0.5
