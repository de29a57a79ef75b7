"""Prompts: contexts are joined ids, spelled out here literally, and the answer never leaks into the prior."""

import re

import pytest
import torch

from covrl_lab.train.models import load_tokenizer
from covrl_lab.train.prompts import Prompter
from covrl_lab.types import ConfigError, Demonstration, Example, Prompt

DEMONSTRATIONS = (
    Demonstration("2 + 3?", "two and three make five", "5"),
    Demonstration("the other one?", "it is the one on the left", "left"),
)
EXAMPLE = Example("e1", "which word hides here?", "quixotry")
INSTRUCTION = (
    "Answer the question. Reason step by step between <think> and </think>, "
    "then give only the final answer between <answer> and </answer>.\n\n"
)
HINT = "The answer is quixotry. I now write the reasoning that leads to it.\n"
# As Qwen's reasoning models: the generation prompt opens the thinking itself.
OPENS_THINKING = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n<think>\n{% endif %}"
)
# As Gemma: starts with BOS, calls the assistant "model", refuses a system message.
NO_SYSTEM = (
    "{{ bos_token }}{% for m in messages %}"
    "{% if m['role'] == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}"
    "<turn>{{ 'model' if m['role'] == 'assistant' else m['role'] }}\n{{ m['content'] | trim }}</turn>\n"
    "{% endfor %}{% if add_generation_prompt %}<turn>model\n{% endif %}"
)


@pytest.fixture
def tokenizer():
    return load_tokenizer("tiny")


@pytest.fixture(scope="module")
def real_tokenizer():
    """The embedded model's; skipped only where it cannot be had."""
    try:
        return load_tokenizer("smollm2-135m")
    except ConfigError as error:
        if "could not fetch" not in str(error):
            raise
        pytest.skip("no network: the embedded model's tokenizer could not be fetched")


def joined(tokenizer, *pieces):
    """The ids of each piece on its own, one after the other."""
    ids = []
    for piece in pieces:
        ids.extend(tokenizer.encode(piece, add_special_tokens=False))
    return tuple(ids)


# --- few-shot
def test_few_shot_contexts_are_the_pieces_ids(tokenizer):
    prompt = Prompter(tokenizer, DEMONSTRATIONS, "few_shot")(EXAMPLE)
    demos = [
        ("2 + 3?", "two and three make five", "5"),
        ("the other one?", "it is the one on the left", "left"),
    ]
    prior, posterior = [], []
    for question, trace, answer in demos:
        rest = ["Reasoning:", f" {trace}\n", "Answer:", f" {answer}\n"]
        prior += [f"Question: {question}\n", *rest]
        posterior += [f"Question: {question}\n", f"The answer is {answer}.\n", *rest]
    prior += ["Question: which word hides here?\n", "Reasoning:"]
    posterior += ["Question: which word hides here?\n", "The answer is quixotry.\n", "Reasoning:"]
    assert prompt.prior == joined(tokenizer, *prior)
    assert prompt.posterior == joined(tokenizer, *posterior)
    assert prompt.seam == joined(tokenizer, "Answer:")
    assert prompt.answer == joined(tokenizer, " quixotry\n")


def test_few_shot_text_reads_as_written(tokenizer):
    prompt = Prompter(tokenizer, DEMONSTRATIONS[:1], "few_shot")(EXAMPLE)
    trace = joined(tokenizer, " it is odd\n")
    assert tokenizer.decode([*prompt.prior, *trace, *prompt.seam, *prompt.answer]) == (
        "Question: 2 + 3?\nReasoning: two and three make five\nAnswer: 5\n"
        "Question: which word hides here?\nReasoning: it is odd\nAnswer: quixotry\n"
    )
    assert tokenizer.decode([*prompt.posterior, *trace]) == (
        "Question: 2 + 3?\nThe answer is 5.\nReasoning: two and three make five\nAnswer: 5\n"
        "Question: which word hides here?\nThe answer is quixotry.\nReasoning: it is odd\n"
    )


def test_few_shot_question_becomes_one_line_and_the_answer_is_stripped(tokenizer):
    prompter = Prompter(tokenizer, style="few_shot")
    assert prompter(Example("a", "one\ntwo", " 7 ")) == prompter(Example("b", "one two", "7"))


def test_few_shot_shows_a_trace_of_several_lines_on_one(tokenizer):
    """As GSM8K's worked solutions: a newline inside would teach traces to end early."""
    lines = Prompter(tokenizer, [Demonstration("2 + 3?", "two and\nthree  make\nfive", "5\n")])
    flat = Prompter(tokenizer, [Demonstration("2 + 3?", "two and three make five", "5")])
    assert lines(EXAMPLE) == flat(EXAMPLE)


def test_few_shot_starts_with_bos_only_where_the_tokenizer_adds_it(tokenizer):
    plain = Prompter(tokenizer, DEMONSTRATIONS)(EXAMPLE)

    class AddsBos:
        """A tokenizer that, as Llama's, puts BOS before any text unless told not to."""

        bos_token_id, chat_template = tokenizer.bos_token_id, None

        def __call__(self, text, add_special_tokens=True):
            ids = tokenizer(text)["input_ids"]
            return {"input_ids": [self.bos_token_id, *ids] if add_special_tokens else ids}

        def decode(self, ids):
            return tokenizer.decode(ids)

    with_bos = Prompter(AddsBos(), DEMONSTRATIONS)(EXAMPLE)
    assert with_bos.prior == (tokenizer.bos_token_id, *plain.prior)
    assert with_bos.posterior == (tokenizer.bos_token_id, *plain.posterior)
    assert (with_bos.seam, with_bos.answer) == (plain.seam, plain.answer)
    assert tokenizer.bos_token_id not in plain.prior


# --- chat
def test_chat_contexts_are_the_pieces_ids(tokenizer):
    prompt = Prompter(tokenizer, style="chat")(EXAMPLE)
    root = f"<|im_start|>user\n{INSTRUCTION}which word hides here?<|im_end|>\n<|im_start|>assistant\n"
    assert prompt.prior == joined(tokenizer, root, "<think>\n")
    assert prompt.posterior == joined(tokenizer, root, HINT, "<think>\n")
    assert prompt.seam == joined(tokenizer, "\n<answer")
    assert prompt.answer == joined(tokenizer, "> quixotry </answer>")
    # The template's markers are single special tokens, not spelled-out text.
    assert prompt.prior[0] == tokenizer.bos_token_id and prompt.prior.count(tokenizer.eos_token_id) == 1


def test_chat_shows_demonstrations_in_the_users_message(tokenizer):
    prompt = Prompter(tokenizer, DEMONSTRATIONS, "chat")(EXAMPLE)
    shown = (
        "2 + 3?\n<think>\ntwo and three make five\n</think>\n<answer> 5 </answer>\n\n"
        "the other one?\n<think>\nit is the one on the left\n</think>\n<answer> left </answer>\n\n"
    )
    root = f"<|im_start|>user\n{INSTRUCTION}{shown}which word hides here?<|im_end|>\n<|im_start|>assistant\n"
    assert prompt.prior == joined(tokenizer, root, "<think>\n")
    assert prompt.posterior == joined(tokenizer, root, HINT, "<think>\n")


def test_a_template_that_opens_the_thinking_opens_it_once_in_each_context(tokenizer):
    tokenizer.chat_template = OPENS_THINKING
    prompt = Prompter(tokenizer, style="chat")(EXAMPLE)
    prior, posterior = tokenizer.decode(prompt.prior), tokenizer.decode(prompt.posterior)
    assert prior.endswith("<|im_end|>\n<|im_start|>assistant\n<think>\n")
    assert posterior.endswith(f"<|im_end|>\n<|im_start|>assistant\n{HINT}<think>\n")
    assert prior.split("assistant\n")[1].count("<think>") == 1
    assert posterior.split("assistant\n")[1].count("<think>") == 1


def test_a_template_without_system_role(tokenizer):
    tokenizer.chat_template = NO_SYSTEM
    prompt = Prompter(tokenizer, style="chat")(EXAMPLE)
    root = f"<|im_start|><turn>user\n{INSTRUCTION}which word hides here?</turn>\n<turn>model\n"
    assert prompt.prior == joined(tokenizer, root, "<think>\n")
    assert prompt.prior.count(tokenizer.bos_token_id) == 1


def test_auto_style(tokenizer):
    assert Prompter(tokenizer, DEMONSTRATIONS).style.name == "few_shot"
    assert Prompter(tokenizer).style.name == "chat"
    tokenizer.chat_template = None
    assert Prompter(tokenizer).style.name == "few_shot"
    assert Prompter(tokenizer, DEMONSTRATIONS).style.name == "few_shot"


# --- no leak, no re-encoding
@pytest.mark.parametrize("style", ["few_shot", "chat"])
@pytest.mark.parametrize("demonstrations", [(), DEMONSTRATIONS])
def test_the_reference_is_in_the_posterior_and_not_in_the_prior(tokenizer, style, demonstrations):
    prompter = Prompter(tokenizer, demonstrations, style)
    prompt, other = prompter(EXAMPLE), prompter(Example("e2", EXAMPLE.question, "something else"))
    assert "quixotry" in tokenizer.decode(prompt.posterior)
    assert "quixotry" not in tokenizer.decode([*prompt.prior, *prompt.seam])
    # Whatever the answer is, prior context and seam are the same.
    assert (prompt.prior, prompt.seam) == (other.prior, other.seam)
    assert prompt.posterior != other.posterior and prompt.answer != other.answer


def test_reencoding_would_change_ids(tokenizer):
    """Why nothing is re-encoded: sampled ids need not be what their own text encodes to.

    That scoring keeps them is shown where traces are scored.
    """
    generator = torch.Generator().manual_seed(0)
    trace = torch.randint(3, len(tokenizer), (40,), generator=generator).tolist()
    assert joined(tokenizer, tokenizer.decode(trace)) != tuple(trace)
    th = joined(tokenizer, "t", "h")  # a trace may hold these two tokens, whose text is one
    assert len(th) == 2 and len(joined(tokenizer, tokenizer.decode(th))) == 1


def test_pieces_stay_apart_where_a_tokenizer_would_merge_them():
    class Merges:
        """Characters, but a newline or a colon is one token with what follows it."""

        bos_token_id, chat_template = None, None

        def __call__(self, text, add_special_tokens=True):
            return {"input_ids": self.encode(text)}

        def encode(self, text, add_special_tokens=True):
            return [sum(ord(c) << 8 * k for k, c in enumerate(t)) for t in re.findall(r"[\n:]?.|[\n:]", text)]

        def decode(self, ids):
            return "".join(chr(i & 255) + (chr(i >> 8) if i >> 8 else "") for i in ids)

    tokenizer = Merges()
    prompt = Prompter(tokenizer, DEMONSTRATIONS[:1])(EXAMPLE)
    pieces = ["Question: 2 + 3?\n", "Reasoning:", " two and three make five\n", "Answer:", " 5\n"]
    pieces += ["Question: which word hides here?\n", "Reasoning:"]
    assert prompt.prior == joined(tokenizer, *pieces)
    assert prompt.prior != joined(tokenizer, "".join(pieces))


# --- errors
def test_few_shot_refuses_an_answer_of_two_lines(tokenizer):
    with pytest.raises(ConfigError, match=r"'e3'.*'\\n'.*use 'chat'"):
        Prompter(tokenizer, style="few_shot")(Example("e3", "x?", "one\ntwo"))
    prompt = Prompter(tokenizer, style="chat")(Example("e3", "x?", "one\ntwo"))
    assert tokenizer.decode(prompt.answer) == "> one\ntwo </answer>"


def test_chat_refuses_an_answer_with_the_closing_tag(tokenizer):
    with pytest.raises(ConfigError, match="'e4'.*</answer>.*rewrite"):
        Prompter(tokenizer, style="chat")(Example("e4", "x?", "one </answer> two"))


def test_chat_needs_a_template(tokenizer):
    tokenizer.chat_template = None
    with pytest.raises(ConfigError, match="chat template.*few_shot"):
        Prompter(tokenizer, style="chat")


def test_a_prompt_needs_an_answer():
    with pytest.raises(ConfigError, match="no answer tokens"):
        Prompt(prior=(1,), posterior=(1, 2), seam=(3,), answer=())
    with pytest.raises(ConfigError, match="empty answer"):
        Example("e", "x?", "  ")


@pytest.mark.parametrize(
    "prompt, longest",
    [
        (Prompt(prior=(1,) * 10, posterior=(1,) * 30, seam=(2,), answer=(3, 3)), 30),
        (Prompt(prior=(1,) * 28, posterior=(1,) * 30, seam=(2,), answer=(3, 3)), 31),
    ],
)
def test_the_length_that_fits_is_exact(tokenizer, prompt, longest, monkeypatch):
    monkeypatch.setattr(Prompter, "__call__", lambda self, example: prompt)
    prompter, example = Prompter(tokenizer), Example("e5", "x?", "y")
    assert prompter.fitting(example, max_trace_tokens=20, max_context=longest + 20) is prompt
    with pytest.raises(ConfigError, match=rf"'e5' needs {longest} .*20.*context of {longest + 19}"):
        prompter.fitting(example, max_trace_tokens=20, max_context=longest + 19)
    # An evaluation's own answer may be longer than the reference: prompt, seam and 9 tokens, then.
    longer = max(len(prompt.posterior), len(prompt.prior) + 1 + 9)
    prompter.fitting(example, 20, longer + 20, max_answer_tokens=9)
    with pytest.raises(ConfigError, match=f"needs {longer} "):
        prompter.fitting(example, 20, longer + 19, max_answer_tokens=9)


# --- reading traces and answers back
@pytest.mark.parametrize("style, trace_end", [("few_shot", "\n"), ("chat", "\n</think>")])
@pytest.mark.parametrize("answer", ["42", "-3", "> 5", ">", "<", "x > y", "left and right", "\\frac{1}{2}"])
def test_texts_round_trip(tokenizer, style, trace_end, answer):
    prompter = Prompter(tokenizer, style=style)
    prompt = prompter(Example("e", "x?", answer))
    assert prompter.answer_text(prompt.answer) == answer
    trace = joined(tokenizer, " first this, then that" + trace_end)
    assert prompter.trace_text(trace) == "first this, then that"
    # What follows the end marker, within its last token or after it, is not part of the text.
    assert prompter.trace_text([*trace, *joined(tokenizer, "Answer: 9")]) == "first this, then that"
    assert prompter.answer_text([*prompt.answer, *joined(tokenizer, "Question: 9")]) == answer


@pytest.mark.parametrize("style, end", [("few_shot", "\n"), ("chat", "</think>")])
def test_the_end_is_seen_with_its_last_token_and_not_before(tokenizer, style, end):
    prompter = Prompter(tokenizer, style=style)
    ids = joined(tokenizer, " a rather long trace that goes on <b> and on" + end)
    seen = [prompter.ends(ids[: i + 1], prompter.style.trace_end) for i in range(len(ids))]
    assert seen == [False] * (len(ids) - 1) + [True]


# --- the embedded model's own tokenizer
@pytest.mark.parametrize("answer", [".5", "\\frac{1}{2}", "-3", "$5", "(a)"])
@pytest.mark.parametrize("style, text", [("chat", "\n<answer> {} </answer>"), ("few_shot", "Answer: {}\n")])
def test_no_token_merges_across_the_seam(real_tokenizer, answer, style, text):
    prompt = Prompter(real_tokenizer, style=style)(Example("e", "x?", answer))
    assert real_tokenizer.decode([*prompt.seam, *prompt.answer]) == text.format(answer)
    # Encoding the joint text cuts it at the seam too, so the model sees the answer as it always does.
    assert joined(real_tokenizer, text.format(answer)) == (*prompt.seam, *prompt.answer)


def test_a_seam_after_the_tag_would_merge(real_tokenizer):
    """The check above can fail: cut behind the whole tag, some answers merge with its bracket."""
    pairs = [("<answer>", answer) for answer in (".5", "\\frac{1}{2}")]
    assert all(joined(real_tokenizer, a + b) != joined(real_tokenizer, a, b) for a, b in pairs)


def test_the_embedded_model_speaks_its_own_template(real_tokenizer):
    prompt = Prompter(real_tokenizer)(EXAMPLE)
    text = real_tokenizer.decode(prompt.prior)
    assert text.startswith("<|im_start|>system\n") and text.endswith("<|im_start|>assistant\n<think>\n")
    assert "quixotry" not in text and "quixotry" in real_tokenizer.decode(prompt.posterior)


@pytest.mark.parametrize("style", ["few_shot", "chat"])
@pytest.mark.parametrize("answer", ["42", "Tuesday", r"\frac{1}{2}", ".5", "x. y"])
def test_the_core_of_an_answer_is_its_own_text(style, answer):
    """Its tokens hold the whole answer, and none of the wrapper but what a token shares with it."""
    tokenizer = load_tokenizer("tiny")
    prompt = Prompter(tokenizer, (), style)(Example("x", "Which one?", answer))
    core = [token for token, own in zip(prompt.answer, prompt.answer_core, strict=True) if own]
    assert tokenizer.decode(core).strip(" >") == answer
    assert not prompt.answer_core[-1] and tokenizer.decode(list(prompt.empty_trace)).strip() in (
        "",
        "</think>",
    )
