"""Text and data frames as HTML: model text is escaped, and its invisible characters are shown by a sign."""

import html
import math
import re
import textwrap
import unicodedata
from collections.abc import Iterable, Mapping, Sequence
from functools import lru_cache
from typing import Any

import pandas as pd

from ..runs.folder import by_set
from ..runs.reweight import answer_logprob
from .style import GREY, POSTERIOR, SOURCE_COLOURS, text_colour

_JOINERS = "\u200c\u200d"  # inside Persian words and emoji, which would fall apart without
_BESIDE_ASCII = re.compile(f"(?<=[\0-\x7f])[{_JOINERS}]|[{_JOINERS}](?=[\0-\x7f])")
_BLANK = re.compile("[\u034f\u115f\u1160\u17b4\u17b5\u2800\u3164\uffa0\U000e0000-\U000e0fff]")  # and no space
LONG = 400  # characters; a longer text is folded
HELP = {  # symbol or word -> what it stands for
    "α": "share of the traces that the prior prompt draws; the posterior prompt draws the others",
    "w": "weight of the prior p in the composite p′ = w p + (1 − w) q",
    "clip": "limits of the importance ratio beyond which a token teaches nothing more",
    "KL": "Kullback-Leibler divergence: how far one distribution is from another, in nats",
    "NLL": "negative log-likelihood of the reference answer after the trace, −log p(y|x,z)",
    "ρ": "responsibility of the prior, w p / p′: the share of a token's gradient that moves the prior",
}


def visible(text: str, spaces: bool = False) -> str:
    """The same text with control, direction and other invisible characters shown by a sign.

    New lines become ↵, tabs ⇥, an escape ␛, U+202E ⟨U+202E⟩, and with ``spaces`` a space becomes ·. Joiners
    stay as they are, except beside ASCII and in a text of nothing else.
    """
    text = re.sub(_BESIDE_ASCII, lambda found: f"⟨U+{ord(found[0]):04X}⟩", str(text))
    joiners = _JOINERS if text.strip(_JOINERS) else ""
    signs = {"\n": "↵", "\t": "⇥"} | ({" ": "·"} if spaces else {})

    def sign(character: str) -> str:
        if character in signs:
            return signs[character]
        hidden = unicodedata.category(character) in ("Cc", "Cf", "Cs", "Zl", "Zp") or _BLANK.match(character)
        if character in joiners or not hidden:
            return character
        code = ord(character)
        return chr(0x2400 + code) if code < 0x20 else f"⟨U+{code:04X}⟩"

    return text.translate({ord(character): sign(character) for character in set(text)})


@lru_cache(maxsize=10_000)  # tokens and answers come again and again
def figure_text(text: str, width: int = 60, lines: int = 8, spaces: bool = False) -> str:
    """Text for plotly, which reads a little HTML and TeX: visible, wrapped, cut after ``lines``, escaped."""
    start = str(text)[: 20 * width * lines]  # more than is kept, unless it is nearly all spaces
    wrapped = textwrap.wrap(visible(start, spaces), width, max_lines=lines, placeholder=" …")
    # Quotes stay: plotly knows no entity for them, and text never becomes an attribute.
    return "<br>".join(html.escape(line, quote=False).replace("$", "&#36;") for line in wrapped)


def html_text(value: Any, spaces: bool = False) -> str:
    """Text as HTML: invisible characters shown by a sign, the rest escaped."""
    return html.escape(visible(value, spaces))


def help_on(label: str) -> str:
    """What the first symbol of ``HELP`` in a label stands for; empty where there is none."""
    return next((said for symbol, said in HELP.items() if re.search(rf"\b{symbol}\b", label)), "")


def helped(label: str) -> str:
    """A label, HTML already, with the help on its symbol as its title."""
    return f'<span title="{said}">{label}</span>' if (said := help_on(label)) else label


def html_passage(text: str) -> str:
    """A text of several lines as HTML: its lines and spaces are kept, a long one is folded behind its beginning."""
    lines = str(text).split("\n")
    look = "white-space: pre-wrap; overflow-wrap: anywhere; background: none; font: inherit"
    # <code>: no page's formula renderer looks for dollars in it.
    shown = "\n".join(map(html_text, lines))
    whole = f'<code dir="auto" style="display: block; {look}">{shown}</code>'
    if len(text) <= LONG and len(lines) <= 8:
        return whole
    start = f"<code><bdi>{html_text(text[:80])}</bdi></code>"
    return f"<details><summary>{start} … ({len(text):,} characters)</summary>{whole}</details>"


def verdict(right: Any) -> str:
    """``✓ right`` or ``✗ wrong``, of the model's own answer after a trace; nothing where it is not known."""
    return "" if right is None or right != right else "✓ right" if right else "✗ wrong"


def html_mark(right: Any, prediction: Any = None) -> str:
    """✓ or ✗ with its meaning for screen readers, and what the model answered; nothing where it is not known."""
    if not verdict(right):
        return ""
    sign, said = verdict(right).split()
    answer = "" if prediction is None else f" <code><bdi>{html_text(prediction)}</bdi></code>"
    return f'<span role="img" aria-label="{said}" title="the model\'s own answer is {said}">{sign}</span>{answer}'


def reward_unit(config: Mapping[str, Any]) -> str:
    """What the rewards of a run with this configuration are counted in."""
    reward = config.get("reward") or ""
    return "probability" if "probability" in reward else "share" if reward == "verdict" else "nats"


def html_number(value: Any, form: str) -> str:
    """A table's cell as HTML: a number in the format ``form``, yes or no, – for what is not known, or text."""
    if value is None or value != value:
        return "–"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, str):
        return html_text(value)
    text = "∞" if value == math.inf else f"{value:{form}}"
    return (text if text.strip("-0.%") else text.lstrip("-")).replace("-", "−")  # never −0.0


def html_source(source: str, text: str = "") -> str:
    """The name of a source, or another text, in the source's colour."""
    return f'<b style="color: {text_colour(SOURCE_COLOURS.get(source, GREY))}">{html_text(text or source)}</b>'


def html_table(header: Sequence[str], rows: Iterable[Sequence[str] | str]) -> str:
    """A table of cells that are HTML; a row that is one text is a heading across all columns."""
    cell = "text-align: left; padding: 2px 12px 2px 0"
    heads = "".join(f'<th style="{cell}">{name}</th>' for name in header)
    lines = []
    for row in rows:
        if isinstance(row, str):
            inside = f'<th colspan="{len(header)}" style="text-align: left; padding: 10px 0 2px 0">{row}</th>'
        else:
            inside = "".join(f'<td style="{cell}; vertical-align: top">{text}</td>' for text in row)
        lines.append(f"<tr>{inside}</tr>")
    style = "border-collapse: collapse; background: transparent"
    return f'<table style="{style}"><thead><tr>{heads}</tr></thead><tbody>{"".join(lines)}</tbody></table>'


def trace_table(frame: pd.DataFrame) -> str:
    """HTML table of traces by question: source, trace, log p(y|x,z) in nats, finished, the own answer if judged."""
    if frame.empty:
        return "<p>no traces</p>"
    rows: list[Sequence[str] | str] = []
    judged = "right" in frame and bool(frame["right"].notna().any())
    for _, group in frame.assign(total=answer_logprob(frame)).groupby("example_id", sort=False):
        question, answer = html_passage(group["question"].iloc[0]), html_text(group["answer"].iloc[0])
        rows.append(f'<div style="font-weight: normal">{question}reference answer <b><code>{answer}</code></b></div>')
        for row in group.itertuples():
            cells = [html_number(row.total, ".2f"), html_number(bool(row.finished), "")]
            cells = [html_source(row.source), html_passage(row.trace), *cells]
            rows.append([*cells, html_mark(row.right, row.prediction)] if judged else cells)
    return html_table(["source", "trace", "log p(y|x,z), nats", "finished", *["its answer"] * judged], rows)


def accuracy_table(evaluations: pd.DataFrame) -> str:
    """HTML table of ``Run.evaluations``, one row an evaluation, with 95% intervals; the average, then each set.

    "by guessing" is what the same answers score on other questions, and the bound is that of log p(y|x), which needs no
    scorer; older runs lack both.
    """
    names = ("avg_at_k", "guess_accuracy", "bound_k")
    sampled, guessed, bounded = (any(name in column for column in evaluations) for name in names)
    header = ["after step", "accuracy (95% interval)", *["by guessing"] * guessed]
    header += ["finished traces", "trace length, tokens", "questions"]
    rows, sets = [], by_set(evaluations)
    for name, frame in sets.items():
        if len(sets) > 1:
            rows.append(html_text(name or f"average over {len(sets) - 1} sets"))
        for row in frame.itertuples():
            accuracy = f"<b>{row.accuracy:.0%}</b> ({row.accuracy_low:.0%} to {row.accuracy_high:.0%})"
            finished, length = f"{row.eval_finished_share:.0%}", f"{row.eval_trace_tokens:.1f}"
            guess = html_number(getattr(row, "guess_accuracy", None), ".0%")
            cells = [f"{row.step:.0f}", accuracy, *[guess] * guessed]
            cells += [finished, length, f"{row.eval_questions:.0f}"]
            known = getattr(row, "avg_at_k", math.nan) >= 0
            own = f"{row.avg_at_k:.0%} ({row.avg_at_k_low:.0%} to {row.avg_at_k_high:.0%})" if known else "–"
            bound = html_number(getattr(row, "bound_k", None), ".2f")
            rows.append([*cells, *[own] * sampled, *[bound] * bounded])
    return html_table([*header, *["avg@k (95% interval)"] * sampled, *["bound at k, nats"] * bounded], rows)


# key of reweight.summarise_traces -> (label, format)
_SUMMARY = {
    "clipped_share": ("tokens held back by the clip", ".1%"),
    "effective_sample_size": ("effective traces, (ΣW)² / ΣW²", ".1f"),
    "effective_sample_share": ("effective traces, share of all", ".1%"),
    "ratio_low": ("least ratio p′/h of a token", ".3f"),
    "ratio_high": ("largest ratio p′/h of a token", ".3f"),
    "kl": ("KL(p′‖p), nats a token", ".4f"),
    "reward": ("expected reward", ".2f"),
    "reward_prior": ("mean reward of prior traces", ".2f"),
    "reward_posterior": ("mean reward of posterior traces", ".2f"),
    "gradient_weight_prior": ("gradient weight on log p, a token", ".4f"),
    "gradient_weight_posterior": ("gradient weight on log q, a token", ".4f"),
    "gradient_weight_prior_share": ("share of the gradient weight that reaches the prior", ".1%"),
}


def summary_table(header: Sequence[str], summaries: Sequence[Mapping[str, float]]) -> str:
    """HTML table of what ``reweight.summarise_traces`` gives, a column each."""
    rows = [
        [helped(label), *(html_number(s[key], form) for s in summaries)] for key, (label, form) in _SUMMARY.items()
    ]
    return html_table(header, rows)


def alarms_html(alarms: Mapping[str, str]) -> str:
    """Signs that a run goes wrong, a line each; nothing where there is none."""
    lines = (f'<div data-alarm="{html.escape(kind)}">⚠ {html_text(text)}</div>' for kind, text in alarms.items())
    return f'<div style="color: {text_colour(POSTERIOR)}; margin: 4px 0">{"".join(lines)}</div>' if alarms else ""
