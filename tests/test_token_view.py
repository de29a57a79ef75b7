"""Traces as coloured tokens: the widget's data and the plain HTML."""

import numpy as np
import pytest
from helpers import EXAMPLE_RUN

from covrl_lab import load_run, reweight, token_html
from covrl_lab.types import ConfigError
from covrl_lab.views.token_view import TokenView, spelled


@pytest.fixture(scope="module")
def example():
    return load_run(EXAMPLE_RUN)


def test_token_html_gives_every_token_its_number(example):
    pair = example.traces(1).iloc[:2]
    page = token_html(pair, reweight.Settings(), "log_gap")
    assert page.count("<span style=") == pair["tokens"].map(len).sum() + 2  # two swatches
    gap = pair["logq"].iloc[0][3] - pair["logp"].iloc[0][3]
    assert f"log q − log p {gap:.3f} nats" in page
    with pytest.raises(ConfigError, match="did you mean 'logp'"):
        token_html(pair, colour="logp_")


@pytest.mark.parametrize(("length", "numbers"), [(1000, True), (1001, False)])
def test_tokens_of_a_long_trace_have_the_coloured_number_alone(example, length, numbers):
    row = example.traces(1).iloc[:1].copy()
    for name in ("tokens", "token_ids", "logp", "logq"):
        row[name] = [np.resize(row[name].iloc[0], length).tolist()]
    page = token_html(row)
    assert page.count("\nlog q − log p ") == length
    assert page.count("\nlog p ") == length * numbers


def test_clipped_tokens_are_underlined_in_the_copy(example):
    frame = example.traces(1)
    settings = reweight.Settings(0.1, 0.5)
    clipped = np.nansum(reweight.quantities(reweight.Traces.of(frame), settings)["clipped"])
    assert clipped > 0
    assert token_html(frame, settings).count("border-bottom: 2px dashed") == clipped


def test_the_view_reports_alternatives_and_refuses_unknown_colours(example):
    pair = example.traces(1).iloc[:1]
    choices = [{"prior": [("\n", -0.1), ("<b>", -2.0)]}] * len(pair["tokens"].iloc[0])
    view = TokenView()
    view.show(pair, alternatives=[choices])
    assert view.traces[0]["alternatives"][0] == {"prior": [["↵", -0.1], ["<b>", -2.0]]}
    with pytest.raises(ConfigError, match="unknown colour"):
        TokenView(colour="red")


def cut(text, *places):
    """Tokens of a text cut at these bytes, each decoded on its own as a tokenizer does."""
    raw, edges = text.encode(), [0, *places, len(text.encode())]
    return [raw[a:b].decode(errors="replace") for a, b in zip(edges, edges[1:], strict=False)]


def test_a_character_of_several_tokens_stands_on_its_last():
    assert cut("a ÷ b", 1, 3) == ["a", " \ufffd", "\ufffd b"]
    assert spelled(cut("a ÷ b", 1, 3), "a ÷ b") == ["a", " ⟨C3⟩", "÷ b"]
    text = " √2 = 你好 👩\u200d👧 x²"
    single = spelled(cut(text, *range(1, len(text.encode()))), text.strip())
    assert single[:6] == [" ", "⟨E2⟩", "⟨88⟩", "√", "2", " "]
    assert "".join(token for token in single if not token.startswith("⟨")) == text
    # The end of one character and the beginning of the next in one token; an end marker that the text lacks.
    assert spelled([*cut("√²", 2, 4), "\n"], "√²") == ["⟨E2⟩⟨88⟩", "√⟨C2⟩", "²", "\n"]
    assert spelled(cut("√x", 1), "√x") == ["⟨E2⟩", "√x"]
    assert spelled(["½", "\ufffd", "\ufffd", "</think>"], "½ x") == ["½", "\ufffd", "\ufffd", "</think>"]
    assert spelled(["the", "sum", "\ufffd", "\ufffd"], "the sum÷") == ["the", "sum", "⟨C3⟩", "÷"]
    # The model wrote no character there, and text that does not agree.
    assert spelled(["a", "\ufffd", "b"], "a\ufffdb") == ["a", "\ufffd", "b"]
    assert spelled(["a", "\ufffd"], "") == ["a", "\ufffd"]


def test_the_view_spells_characters_and_keeps_unseen_ones_apart(example):
    row = example.traces(1).iloc[:1].copy()
    tokens = ["5", " \ufffd", "\ufffd", "\u200d", "\n"]
    for name in ("logp", "logq", "log_ratio"):
        row[name] = [row[name].iloc[0][:5]]
    row["tokens"], row["trace"] = [tokens], "5 ÷\u200d"
    view = TokenView()
    view.show(row)
    assert view.traces[0]["tokens"] == ["5", "·⟨C3⟩", "÷", "⟨U+200D⟩", "↵"]
    assert view.traces[0]["texts"] == ["5", " ", "÷", "⟨U+200D⟩", "\n"], "what is copied"
    assert "÷" in token_html(row) and "\ufffd" not in token_html(row)


def test_an_answer_of_a_few_tokens_shows_each_of_them(example):
    """So that -4.5 nats says which digit was not expected; long answers and older runs show the sum alone."""
    pair = example.traces(1).iloc[:2]
    assert "answer at" in token_html(pair) and "(·1" not in token_html(pair)
    few = pair.assign(answer_tokens=[[" 1", "<b>"]] * len(pair), answer_logp=[[-0.25, -4.25]] * len(pair))
    page = token_html(few)
    assert "answer at −4.5 nats (·1 −0.2, &lt;b&gt; −4.2)" in page and "<b> " not in page
    many = pair.assign(answer_tokens=[["1"] * 9] * len(pair), answer_logp=[[-0.5] * 9] * len(pair))
    assert "answer at −4.5 nats<" in token_html(many) or "answer at −4.5 nats," in token_html(many)
