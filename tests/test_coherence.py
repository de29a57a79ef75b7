"""The coherence curve equals one plain forward for each prefix."""

import numpy as np
import pandas as pd
import pytest
import torch

from covrl_lab.train import scoring
from covrl_lab.train.probe import coherence
from covrl_lab.train.prompts import Prompter
from covrl_lab.train.scoring import trace_logprobs
from covrl_lab.types import Demonstration, Example, TraceBatch
from covrl_lab.views.token_figures import plot_coherence

TOLERANCE = 1e-4  # nats an answer: float32 sums in another order
DEMONSTRATIONS = [Demonstration("2 plus 3?", "2 and 3 more is 5.", "5")]
EXAMPLE = Example("a", "What is 14 plus 9?", "23")


def setup(policy, style):
    """A prompter, one prompt, and a finished trace that holds the style's end marker."""
    prompter = Prompter(policy.tokenizer, DEMONSTRATIONS, style)
    text = " 14 and 9 more,\tthat is 23." + prompter.style.trace_end
    return prompter, prompter(EXAMPLE), policy.tokenizer(text, add_special_tokens=False)["input_ids"]


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
    found = coherence(policy, prompter, prompt, trace)
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


def test_one_forward_unless_the_budget_cuts_it(tiny_policy, monkeypatch):
    prompter, prompt, trace = setup(tiny_policy, "few_shot")
    sizes, run_tree = [], scoring.run_tree
    monkeypatch.setattr(scoring, "run_tree", lambda p, tree: sizes.append(len(tree)) or run_tree(p, tree))
    whole = coherence(tiny_policy, prompter, prompt, trace)
    assert len(sizes) == 1
    budget = sizes.pop() * 2 // 3
    np.testing.assert_allclose(coherence(tiny_policy, prompter, prompt, trace, budget), whole, atol=TOLERANCE)
    assert len(sizes) > 1 and max(sizes) <= budget
    np.testing.assert_allclose(coherence(tiny_policy, prompter, prompt, trace, 1), whole, atol=TOLERANCE)


def test_a_model_that_runs_no_tree_gets_plain_rows(tiny_policy, monkeypatch):
    prompter, prompt, trace = setup(tiny_policy, "few_shot")
    packed = coherence(tiny_policy, prompter, prompt, trace)
    monkeypatch.setattr(tiny_policy, "packs", False)
    monkeypatch.delattr(scoring, "run_tree")
    for budget in (4096, 300):
        rows = coherence(tiny_policy, prompter, prompt, trace, budget)
        np.testing.assert_allclose(rows, packed, atol=TOLERANCE)


@pytest.mark.parametrize("name", ["tiny", "tiny-gemma3"])
def test_later_tokens_change_nothing_before_them(tiny_policies, name):
    policy = tiny_policies(name)
    prompter, prompt, trace = setup(policy, "few_shot")
    whole, k = coherence(policy, prompter, prompt, trace), len(trace) // 2
    poisoned = coherence(policy, prompter, prompt, [*trace[:k], *[7] * (len(trace) - k)])
    np.testing.assert_allclose(poisoned[: k + 1], whole[: k + 1], atol=TOLERANCE)
    assert np.abs(poisoned[k + 1 :] - whole[k + 1 :]).min() > 100 * TOLERANCE


def test_the_last_value_is_the_scored_answer_of_every_rollout(tiny_policy):
    prompter, prompt, trace = setup(tiny_policy, "few_shot")
    other = prompter(Example("b", "Which letter ends dog?", "g"))
    ids = torch.tensor([trace, [*trace[:5], *[0] * (len(trace) - 5)]])  # the second is truncated
    mask = torch.arange(len(trace)) < torch.tensor([[len(trace)], [5]])
    batch = TraceBatch(ids, mask, torch.tensor([True, False]), torch.tensor([True, False]), group_size=1)
    curves = [coherence(tiny_policy, prompter, own, batch.trace(i)) for i, own in enumerate([prompt, other])]
    answers = trace_logprobs(tiny_policy, [prompt, other], batch).answer.sum(1)
    assert [len(curve) for curve in curves] == [len(trace) + 1, 6]
    np.testing.assert_allclose([curve[-1] for curve in curves], answers.detach(), atol=TOLERANCE)


def test_the_figure_has_a_line_a_trace_and_the_best_traces_tokens_on_its_axes():
    hostile = "<script>alert(1)</script>$x$"
    rows = [("prior", [-3.0, -2.0, -9.0]), ("prior", [-3.0, -2.5, -1.0]), ("posterior", [-3.0, -4.0, -0.5])]
    frame = pd.DataFrame(
        [
            {
                "source": source,
                "tokens": [f" {i}", hostile if i == 2 else "\n"],
                "coherence": np.array(values),
            }
            for i, (source, values) in enumerate(rows)
        ],
        index=[10, 11, 12],
    )
    figure = plot_coherence(frame)
    lines = [line for line in figure.data if line.y[0] is not None]
    assert sorted(list(line.y) for line in lines) == sorted(values for _, values in rows)
    assert [list(line.x) for line in lines] == [[0, 1, 2]] * 3
    bold = [list(line.y) for line in lines if line.showlegend]
    assert bold == [rows[1][1], rows[2][1]], "the traces that end best"
    assert figure.layout.xaxis2.ticktext == ("–", "·1", "↵")
    assert figure.layout.xaxis.ticktext[1] == "·2"
    assert "<script" not in str(figure) and "$x$" not in str(figure) and "&lt;script&gt;" in str(figure)
    other = plot_coherence(frame, chosen=[10, 12])
    assert other.layout.xaxis2.ticktext == ("–", "·0", "↵")
    alone = plot_coherence(frame[frame["source"] == "posterior"])
    assert "xaxis2" not in alone.layout and len(plot_coherence(frame.head(0)).data) == 0
