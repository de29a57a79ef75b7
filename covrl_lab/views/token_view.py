"""Traces as rows of coloured tokens: a notebook widget, and the same as plain HTML for where no kernel runs.

Colours are semi-transparent, so that they fit light and dark grounds: blue to orange where the quantity
tells prior from posterior, purple to green where it tells less from more. Both pairs stay apart with the
common colour-vision deficiencies.
"""

from __future__ import annotations

import html
import math
from collections.abc import Mapping, Sequence
from typing import Any

import anywidget
import numpy as np
import pandas as pd
import traitlets

from ..runs import reweight
from ..runs.reweight import answer_logprob
from ..types import ConfigError, did_you_mean
from .html import html_source, visible
from .widgets import static_text

_PRIOR, _POSTERIOR, _LESS, _MORE = (31, 119, 180), (213, 94, 0), (129, 76, 176), (0, 140, 70)
_STRONGEST = 0.65  # opacity at the end of a scale, as in token_view.js


def _scale(title: str, limit: float, low: Any, high: Any, low_text: str, high_text: str, **more: Any) -> dict:
    """``low`` and ``high``: colours at centre - limit and centre + limit; with ``log`` of the logarithm."""
    given = {"title": title, "limit": limit, "low": low, "high": high}
    return given | {"low_text": low_text, "high_text": high_text, "centre": 0.0, "log": False} | more


SCALES: dict[str, dict[str, Any]] = {
    "log_gap": _scale(
        "log q − log p, nats", 4.0, _PRIOR, _POSTERIOR, "−4 the prior wanted it", "the posterior did +4"
    ),
    "logp": _scale("log p, nats", 8.0, _LESS, None, "−8 unlikely", "0"),
    "logq": _scale("log q, nats", 8.0, _LESS, None, "−8 unlikely", "0"),
    "responsibility": _scale(
        "responsibility ρ of the prior",
        0.5,
        _POSTERIOR,
        _PRIOR,
        "0 moves the posterior",
        "moves the prior 1",
        centre=0.5,
    ),
    "ratio": _scale("importance ratio p′/h", math.log(2), _LESS, _MORE, "½", "2", log=True),
    "kl": _scale("KL contribution, nats", 1.0, None, _MORE, "0", "1"),
    "gradient_weight": _scale("gradient weight A·f′(r)·r", 2.0, _LESS, _MORE, "−2 made less likely", "more likely +2"),
}


def colours() -> dict[str, str]:
    """Title -> name of everything that tokens can be coloured by."""
    return {scale["title"]: name for name, scale in SCALES.items()}


def payload(frame: pd.DataFrame, settings: reweight.Settings, alternatives: Sequence[Any] | None = None) -> list[dict]:
    """What the widget draws of each row: texts made visible, numbers rounded, None for unknown."""
    found = reweight.quantities(reweight.Traces.of(frame), settings)
    drawn = []
    for i, (row, total) in enumerate(zip(frame.to_dict("records"), answer_logprob(frame), strict=True)):
        values = {name: found[name][i, : len(row["tokens"])] for name in reweight.LABELS if name in found}
        note = f"answer at {total:.1f} nats".replace("-", "−")
        drawn.append(
            {
                "title": f"{row['source']} trace",
                "subtitle": note + ("" if row["finished"] else ", unfinished"),
                "source": row["source"],
                "tokens": [visible(token, spaces=True) or "∅" for token in row["tokens"]],
                "values": {name: _plain(numbers) for name, numbers in values.items() if np.isfinite(numbers).any()},
                "alternatives": alternatives and [_visible_alternatives(token) for token in alternatives[i]],
            }
        )
    return drawn


def _plain(numbers: np.ndarray) -> list[float | None]:
    """Numbers for JSON."""
    return [round(x, 6) if math.isfinite(x) else None for x in numbers.tolist()]


def _visible_alternatives(token: Mapping[str, Any]) -> dict[str, Any]:
    return {
        prompt: [[visible(text, spaces=True), round(float(x), 6)] for text, x in choices]
        for prompt, choices in token.items()
    }


class TokenView(anywidget.AnyWidget):
    """One or two traces token by token; click a token, or focus one and use the arrow keys, Home and End.

    ``show`` draws traces. ``selected`` is [row, token] (empty: none) and ``colour`` a name of ``SCALES``; both
    follow the widget and can be set.
    """

    _esm = static_text("token_view.js")
    _css = static_text("token_view.css")
    traces = traitlets.List().tag(sync=True)
    labels = traitlets.Dict(reweight.LABELS).tag(sync=True)
    scales = traitlets.Dict(SCALES).tag(sync=True)
    colour = traitlets.Unicode("log_gap").tag(sync=True)
    selected = traitlets.List().tag(sync=True)

    def show(
        self, frame: pd.DataFrame, settings: reweight.Settings | None = None, alternatives: Sequence[Any] | None = None
    ) -> None:
        """Draw the rows of ``frame``, as ``Run.traces`` or ``trace_frame`` give them; nothing stays selected.

        alternatives: for each row a list with a dictionary a token, prompt name -> [(token text,
        log-probability in nats), ...].
        """
        with self.hold_sync():
            self.selected = []
            self.traces = payload(frame, settings or reweight.Settings(), alternatives)

    @traitlets.validate("colour")
    def _check_colour(self, proposal: Any) -> str:
        return _known_colour(proposal["value"])


def _known_colour(name: str) -> str:
    if name not in SCALES:
        raise ConfigError(f"unknown colour {name!r}{did_you_mean(name, SCALES)}")
    return name


def token_html(frame: pd.DataFrame, settings: reweight.Settings | None = None, colour: str = "log_gap") -> str:
    """The rows of ``frame`` as plain HTML: escaped, no script, numbers in each token's title."""
    scale, boxes = SCALES[_known_colour(colour)], []
    for trace in payload(frame, settings or reweight.Settings()):
        spans = []
        for t, text in enumerate(trace["tokens"]):
            numbers = {name: row[t] for name, row in trace["values"].items() if row[t] is not None}
            clipped = numbers.pop("clipped", 0)
            title, style = [text], _fill(numbers.get(colour), scale)
            for name, value in numbers.items():
                label, unit = reweight.LABELS[name]
                title.append(f"{label} {value:.3f} {unit}".strip())
            if clipped:
                title.append("held back by the clip")
                style += "; border-bottom: 2px dashed"
            lines = html.escape("\n".join(title))
            spans.append(f'<span style="{style}" title="{lines}">{html.escape(text)}</span>')
            spans += ["<br>"] if text.endswith("↵") else []
        boxes.append(
            '<div style="flex: 1 1 300px; min-width: 0; margin: 0 16px 8px 0">'
            f"{html_source(trace['source'], trace['title'])} {html.escape(trace['subtitle'])}<br>"
            # <code>: no page's formula renderer looks for dollars in it.
            '<code style="overflow-wrap: anywhere; line-height: 1.8; background: transparent">'
            f"{''.join(spans)}</code></div>"
        )
    low, high = (f'<span style="{_background(scale[end], _STRONGEST)}">&emsp;</span>' for end in ("low", "high"))
    legend = (
        f"<p><b>{html.escape(scale['title'])}</b>: {low} {html.escape(scale['low_text'])}"
        f" … {html.escape(scale['high_text'])} {high}</p>"
    )
    return f'{legend}<div style="display: flex; flex-wrap: wrap">{"".join(boxes)}</div>'


def _fill(value: float | None, scale: Mapping[str, Any]) -> str:
    """CSS background of a token, or nothing."""
    if value is None:
        return ""
    place = ((math.log(value) if scale["log"] else value) - scale["centre"]) / scale["limit"]
    return _background(scale["low" if place < 0 else "high"], _STRONGEST * min(1, abs(place)))


def _background(colour: Sequence[int] | None, opacity: float) -> str:
    """CSS background; transparent at the end of a scale that has no colour."""
    r, g, b = colour or (0, 0, 0)
    return f"background: rgba({r}, {g}, {b}, {opacity if colour else 0:.2f})"
