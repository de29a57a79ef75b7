"""Text and data frames as HTML: model text is escaped, and its invisible characters are shown by a sign."""

from __future__ import annotations

import html
import textwrap
import unicodedata
from collections.abc import Mapping, Sequence
from typing import Any

import pandas as pd

from ..runs.reweight import answer_logprob
from .style import GREY, POSTERIOR, SOURCE_COLOURS


def visible(text: str, spaces: bool = False) -> str:
    """The same text with control, direction and other invisible characters shown by a sign.

    New lines become ↵, tabs ⇥, an escape ␛, U+202E ⟨U+202E⟩, and with ``spaces`` a space becomes ·.
    """
    signs = {"\n": "↵", "\t": "⇥"} | ({" ": "·"} if spaces else {})

    def sign(character: str) -> str:
        if character in signs:
            return signs[character]
        if unicodedata.category(character) not in ("Cc", "Cf", "Cs", "Zl", "Zp"):
            return character
        code = ord(character)
        return chr(0x2400 + code) if code < 0x20 else f"⟨U+{code:04X}⟩"

    return "".join(map(sign, str(text)))


def figure_text(text: str, width: int = 60, lines: int = 8, spaces: bool = False) -> str:
    """Text for plotly, which reads a little HTML and TeX: visible, wrapped, cut after ``lines``, escaped."""
    wrapped = textwrap.wrap(visible(text, spaces), width, max_lines=lines, placeholder=" …")
    # Quotes stay: plotly knows no entity for them, and text never becomes an attribute.
    return "<br>".join(html.escape(line, quote=False).replace("$", "&#36;") for line in wrapped)


def html_text(value: Any) -> str:
    """Text as HTML: invisible characters shown by a sign, the rest escaped."""
    return html.escape(visible(value))


def html_number(value: Any, digits: int) -> str:
    """A table's cell as HTML."""
    if value is None or isinstance(value, bool):
        return {None: "–", True: "yes", False: "no"}[value]
    text = f"{value:.{digits}f}".replace("-", "−") if isinstance(value, (int, float)) else str(value)
    return html.escape(text)


def html_table(header: Sequence[str], rows: Sequence[str]) -> str:
    style = "border-collapse: collapse; background: transparent"
    heads = "".join(f'<th style="text-align: left; padding: 2px 12px 2px 0">{name}</th>' for name in header)
    return f'<table style="{style}"><thead><tr>{heads}</tr></thead><tbody>{"".join(rows)}</tbody></table>'


def html_row(cells: Sequence[str]) -> str:
    style = "text-align: left; vertical-align: top; padding: 2px 12px 2px 0"
    return "<tr>" + "".join(f'<td style="{style}">{cell}</td>' for cell in cells) + "</tr>"


def trace_table(frame: pd.DataFrame) -> str:
    """HTML table of traces, grouped by question: source, trace, log p(y|x,z) in nats, finished."""
    if frame.empty:
        return "<p>no traces</p>"
    rows = []
    for _, group in frame.assign(total=answer_logprob(frame)).groupby("example_id", sort=False):
        question, answer = (html.escape(visible(group[name].iloc[0])) for name in ("question", "answer"))
        rows.append(
            '<tr><th colspan="4" style="text-align: left; padding: 10px 0 2px 0">'
            f'<code>{question}</code> <span style="font-weight: normal">reference answer</span> '
            f"<code>{answer}</code></th></tr>"
        )
        for row in group.itertuples():
            source = html.escape(row.source)
            colour = SOURCE_COLOURS.get(row.source, GREY)
            rows.append(
                html_row(
                    [
                        f'<b style="color: {colour}">{source}</b>',
                        # <code>: no page's formula renderer looks for dollars in it.
                        f'<code style="overflow-wrap: anywhere">{html.escape(visible(row.trace))}</code>',
                        f"{row.total:.2f}",
                        "yes" if row.finished else "no",
                    ]
                )
            )
    return html_table(["drawn from", "trace z", "log p(y|x,z), nats", "finished"], rows)


def accuracy_table(evaluations: pd.DataFrame) -> str:
    """HTML table of ``Run.evaluations``, one row an evaluation, with 95% intervals."""
    rows = [
        html_row(
            [
                f"{row.step:.0f}",
                f"<b>{row.accuracy:.0%}</b> ({row.accuracy_low:.0%} to {row.accuracy_high:.0%})",
                f"{row.eval_finished_share:.0%}",
                f"{row.eval_trace_tokens:.1f}",
                f"{row.eval_questions:.0f}",
            ]
        )
        for row in evaluations.itertuples()
    ]
    header = ["after step", "accuracy (95% interval)", "finished traces", "trace length, tokens", "questions"]
    return html_table(header, rows)


def alarms_html(alarms: Mapping[str, str]) -> str:
    """Signs that a run goes wrong, a line each; nothing where there is none."""
    lines = (f'<div data-alarm="{html.escape(kind)}">⚠ {html_text(text)}</div>' for kind, text in alarms.items())
    inside = "".join(lines)
    return f'<div style="color: {POSTERIOR}; margin: 4px 0">{inside}</div>' if inside else ""
