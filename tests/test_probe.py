"""The probe and the coherence curve equal plain forwards of single rows."""

import dataclasses

import numpy as np
import pytest
import torch
from helpers import ASK, DEMONSTRATIONS, unpacked

from covrl_lab.train import scoring
from covrl_lab.train.probe import alternatives, coherence, probe_question
from covrl_lab.train.prompts import Prompter
from covrl_lab.train.scoring import trace_logprobs
from covrl_lab.types import Example, TraceBatch

TOLERANCE = 1e-4  # nats a token or an answer: float32 sums in another order


@pytest.fixture
def prompter(tiny_policy):
    return Prompter(tiny_policy.tokenizer, DEMONSTRATIONS)


def test_probe_equals_plain_rows(tiny_policy, prompter):
    frame = probe_question(tiny_policy, prompter, **ASK, k=3, max_tokens=9, temperature=0.7, seed=4)
    assert frame["source"].tolist() == ["prior"] * 3 + ["posterior"] * 3
    width = max(map(len, frame["token_ids"]))
    ids = torch.tensor([[*z, *[0] * (width - len(z))] for z in frame["token_ids"]])
    mask = torch.arange(width) < torch.tensor([[len(z)] for z in frame["token_ids"]])
    batch = TraceBatch(ids, mask, torch.tensor([True] * 3 + [False] * 3), torch.tensor(frame["finished"]), 6)
    with torch.no_grad():
        plain = trace_logprobs(unpacked(tiny_policy), [prompter(Example("x", **ASK))], batch, temperature=0.7)
    for i, row in frame.iterrows():
        np.testing.assert_allclose(row["logp"], plain.prior[i][mask[i]], atol=TOLERANCE)
        np.testing.assert_allclose(row["logq"], plain.posterior[i][mask[i]], atol=TOLERANCE)
        np.testing.assert_allclose(row["answer_logp"], plain.answer[i], atol=TOLERANCE)
        assert row["reward"] == pytest.approx(float(plain.answer[i].sum()), abs=TOLERANCE)
        assert row["coherence"][-1] == pytest.approx(row["reward"], abs=TOLERANCE)
        assert len(row["coherence"]) == len(row["tokens"]) + 1
        assert len(row["alternatives"]) == len(row["tokens"])
    assert frame["advantage"].mean() == pytest.approx(0, abs=1e-9)
    assert frame["advantage"].std(ddof=0) == pytest.approx(1)


def test_alternatives_are_the_most_probable_tokens_of_each_prompt(tiny_policy, prompter):
    prompt = prompter(Example("x", **ASK))
    trace = tiny_policy.tokenizer(" 14 and 9", add_special_tokens=False)["input_ids"]
    found = alternatives(tiny_policy, prompt, trace, temperature=0.5, top=3)
    for name, context in (("prior", prompt.prior), ("posterior", prompt.posterior)):
        assert len(found) == len(trace)
        for t, shown in enumerate(token[name] for token in found):
            with torch.no_grad():
                row = torch.tensor([[*context, *trace[:t]]])
                logits = tiny_policy.causal_lm(input_ids=row, use_cache=False).logits[0, -1]
            logprobs, ids = (logits / 0.5).log_softmax(-1).topk(3)
            assert [text for text, _ in shown] == [tiny_policy.tokenizer.decode([i]) for i in ids]
            np.testing.assert_allclose([p for _, p in shown], logprobs, atol=TOLERANCE)


def test_the_seed_decides_the_traces_and_a_tick_can_end_them(tiny_policy, prompter):
    def traces(**settings):
        return probe_question(tiny_policy, prompter, **ASK, k=2, max_tokens=6, **settings)["token_ids"].tolist()

    assert traces(seed=1) == traces(seed=1) != traces(seed=2)
    calls = []

    def tick(done):
        calls.append(done)
        if len(calls) == 3:
            raise KeyError("enough")

    with pytest.raises(KeyError, match="enough"):
        traces(seed=1, tick=tick)
    assert calls == [1, 1, 1]


def setup(policy, style):
    """A prompter, one prompt, and a finished trace that holds the style's end marker."""
    prompter = Prompter(policy.tokenizer, DEMONSTRATIONS, style)
    text = " 14 and 9 more,\tthat is 23." + prompter.style.trace_end
    return (
        prompter,
        prompter(Example("a", **ASK)),
        policy.tokenizer(text, add_special_tokens=False)["input_ids"],
    )


def plain(policy, context, answer):
    """log p(answer | context) from a plain forward of that one row."""
    ids = torch.tensor([[*context, *answer]], device=policy.device)
    with torch.no_grad():
        logits = policy.causal_lm(input_ids=ids, use_cache=False).logits[0].float()
    logprobs = logits.log_softmax(-1)
    return sum(float(logprobs[len(context) + k - 1, token]) for k, token in enumerate(answer))


@pytest.mark.parametrize("style", ["few_shot", "chat"])
@pytest.mark.parametrize("name", ["tiny", "tiny-gemma3"])
def test_each_value_is_that_of_a_plain_forward(tiny_policies, name, style):
    policy = tiny_policies(name)
    prompter, prompt, trace = setup(policy, style)
    found = coherence(policy, prompt, trace)
    end = policy.tokenizer("\n" if style == "few_shot" else "</think>", add_special_tokens=False)["input_ids"]
    expected = [
        plain(
            policy,
            [*prompt.prior, *trace[:t], *(end if t < len(trace) else []), *prompt.seam],
            prompt.answer,
        )
        for t in range(len(trace) + 1)
    ]
    assert found.shape == (len(trace) + 1,) and np.ptp(expected) > 0.5, "a flat curve would show nothing"
    np.testing.assert_allclose(found, expected, atol=TOLERANCE)


def test_a_cut_trace_ends_as_traces_end_in_the_prompts(tiny_policy):
    """Some tokenizers encode an end marker alone in other tokens than within a text."""
    _, prompt, trace = setup(tiny_policy, "few_shot")
    prompt = dataclasses.replace(prompt, empty_trace=(11, 12))
    value = coherence(tiny_policy, prompt, trace)[1]
    assert value == pytest.approx(
        plain(tiny_policy, [*prompt.prior, trace[0], 11, 12, *prompt.seam], prompt.answer), abs=TOLERANCE
    )


def test_one_forward_unless_the_budget_cuts_it(tiny_policy, monkeypatch):
    prompter, prompt, trace = setup(tiny_policy, "few_shot")
    sizes, run_tree = [], scoring.run_tree
    monkeypatch.setattr(scoring, "run_tree", lambda p, tree: sizes.append(len(tree)) or run_tree(p, tree))
    whole = coherence(tiny_policy, prompt, trace)
    assert len(sizes) == 1
    budget = sizes.pop() * 2 // 3
    np.testing.assert_allclose(coherence(tiny_policy, prompt, trace, budget), whole, atol=TOLERANCE)
    assert len(sizes) > 1 and max(sizes) <= budget
    np.testing.assert_allclose(coherence(tiny_policy, prompt, trace, 1), whole, atol=TOLERANCE)


def test_a_model_that_runs_no_tree_gets_plain_rows(tiny_policy, monkeypatch):
    prompter, prompt, trace = setup(tiny_policy, "few_shot")
    packed = coherence(tiny_policy, prompt, trace)
    monkeypatch.setattr(tiny_policy, "packs", False)
    monkeypatch.delattr(scoring, "run_tree")
    for budget in (4096, 300):
        rows = coherence(tiny_policy, prompt, trace, budget)
        np.testing.assert_allclose(rows, packed, atol=TOLERANCE)


@pytest.mark.parametrize("name", ["tiny", "tiny-gemma3"])
def test_later_tokens_change_nothing_before_them(tiny_policies, name):
    policy = tiny_policies(name)
    prompter, prompt, trace = setup(policy, "few_shot")
    whole, k = coherence(policy, prompt, trace), len(trace) // 2
    poisoned = coherence(policy, prompt, [*trace[:k], *[7] * (len(trace) - k)])
    np.testing.assert_allclose(poisoned[: k + 1], whole[: k + 1], atol=TOLERANCE)
    assert np.abs(poisoned[k + 1 :] - whole[k + 1 :]).min() > 100 * TOLERANCE


def test_the_last_value_is_the_scored_answer_of_every_rollout(tiny_policy):
    prompter, prompt, trace = setup(tiny_policy, "few_shot")
    other = prompter(Example("b", "Which letter ends dog?", "g"))
    ids = torch.tensor([trace, [*trace[:5], *[0] * (len(trace) - 5)]])  # the second is truncated
    mask = torch.arange(len(trace)) < torch.tensor([[len(trace)], [5]])
    batch = TraceBatch(ids, mask, torch.tensor([True, False]), torch.tensor([True, False]), group_size=1)
    curves = [coherence(tiny_policy, own, batch.trace(i)) for i, own in enumerate([prompt, other])]
    answers = trace_logprobs(tiny_policy, [prompt, other], batch).answer.sum(1)
    assert [len(curve) for curve in curves] == [len(trace) + 1, 6]
    np.testing.assert_allclose([curve[-1] for curve in curves], answers.detach(), atol=TOLERANCE)
