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
from .html import visible
from .style import SOURCE_COLOURS
from .widgets import STATIC

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


def payload(
    frame: pd.DataFrame,
    settings: reweight.Settings,
    alternatives: Sequence[Any] | None = None,
) -> list[dict[str, Any]]:
    """What the widget draws of each row: texts made visible, numbers rounded, None for unknown."""
    traces = reweight.Traces.of(frame)
    found = reweight.quantities(traces, settings)
    drawn = []
    for i, (row, total) in enumerate(zip(frame.to_dict("records"), answer_logprob(frame), strict=True)):
        length = len(row["tokens"])
        values = {name: _plain(found[name][i, :length]) for name in reweight.LABELS if name in found}
        note = f"answer at {total:.1f} nats".replace("-", "−")
        drawn.append(
            {
                "title": f"{row['source']} trace",
                "subtitle": note + ("" if row["finished"] else ", unfinished"),
                "source": row["source"],
                "tokens": [visible(token, spaces=True) or "∅" for token in row["tokens"]],
                "values": {name: known for name, known in values.items() if known is not None},
                "alternatives": _visible_alternatives(alternatives[i]) if alternatives else None,
            }
        )
    return drawn


def _plain(values: np.ndarray) -> list[float | None] | None:
    """Numbers for JSON; None where there is not one."""
    known = np.isfinite(values)
    if not known.any():
        return None
    return [round(v, 6) if k else None for v, k in zip(values.tolist(), known, strict=True)]


def _visible_alternatives(places: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    return [
        {
            prompt: [[visible(text, spaces=True), round(float(x), 6)] for text, x in choices]
            for prompt, choices in token.items()
        }
        for token in places
    ]


class TokenView(anywidget.AnyWidget):
    """One or two traces token by token; click a token, or focus one and use the arrow keys, Home and End.

    frame: rows of ``Run.traces`` or ``trace_frame``. alternatives: for each row a list with a
    dictionary a token, prompt name -> [(token text, log-probability in nats), ...].
    ``selected`` is [row, token] (empty: none) and ``colour`` a name of ``SCALES``; both follow the
    widget and can be set. ``show`` puts other traces in their place.
    """

    _esm = (STATIC / "token_view.js").read_text(encoding="utf-8")
    _css = (STATIC / "token_view.css").read_text(encoding="utf-8")
    traces = traitlets.List().tag(sync=True)
    labels = traitlets.Dict(reweight.LABELS).tag(sync=True)
    scales = traitlets.Dict(SCALES).tag(sync=True)
    colour = traitlets.Unicode("log_gap").tag(sync=True)
    selected = traitlets.List().tag(sync=True)

    def __init__(
        self,
        frame: pd.DataFrame | None = None,
        settings: reweight.Settings | None = None,
        colour: str = "log_gap",
        alternatives: Sequence[Any] | None = None,
    ):
        super().__init__(colour=colour)
        if frame is not None:
            self.show(frame, settings, alternatives)

    def show(
        self,
        frame: pd.DataFrame,
        settings: reweight.Settings | None = None,
        alternatives: Sequence[Any] | None = None,
    ) -> None:
        """Draw the rows of ``frame``; nothing stays selected."""
        with self.hold_sync():
            self.selected = []
            self.traces = payload(frame, settings or reweight.Settings(), alternatives)

    @traitlets.validate("colour")
    def _known_colour(self, proposal: Any) -> str:
        if proposal["value"] not in SCALES:
            raise ConfigError(f"unknown colour {proposal['value']!r}{did_you_mean(proposal['value'], SCALES)}")
        return proposal["value"]


def _fill(value: float | None, scale: Mapping[str, Any]) -> str:
    """CSS background of a token, or nothing."""
    if value is None:
        return ""
    place = ((math.log(value) if scale["log"] else value) - scale["centre"]) / scale["limit"]
    r, g, b = scale["low" if place < 0 else "high"] or (0, 0, 0)
    return f"background: rgba({r}, {g}, {b}, {_STRONGEST * min(1, abs(place)):.2f})"


def token_html(frame: pd.DataFrame, settings: reweight.Settings | None = None, colour: str = "log_gap") -> str:
    """The rows of ``frame`` as plain HTML: escaped, no script, numbers in each token's title."""
    if colour not in SCALES:
        raise ConfigError(f"unknown colour {colour!r}{did_you_mean(colour, SCALES)}")
    scale, boxes = SCALES[colour], []
    for trace in payload(frame, settings or reweight.Settings()):
        values, spans = trace["values"], []
        for t, text in enumerate(trace["tokens"]):
            shown = [
                f"{label} {values[name][t]:.3f} {unit}".strip()
                for name, (label, unit) in reweight.LABELS.items()
                if name in values and values[name][t] is not None and name != "clipped"
            ]
            style = _fill(values[colour][t] if colour in values else None, scale)
            clipped = bool("clipped" in values and values["clipped"][t])
            style += "; border-bottom: 2px dashed" if clipped else ""
            title = html.escape("\n".join([text, *shown, *(["held back by the clip"] if clipped else [])]))
            spans.append(f'<span style="{style}" title="{title}">{html.escape(text)}</span>')
            spans += ["<br>"] if text.endswith("↵") else []
        tint = SOURCE_COLOURS.get(trace["source"], "inherit")
        boxes.append(
            '<div style="flex: 1 1 300px; min-width: 0; margin: 0 16px 8px 0">'
            f'<b style="color: {tint}">{html.escape(trace["title"])}</b> {html.escape(trace["subtitle"])}<br>'
            # <code>: no page's formula renderer looks for dollars in it.
            '<code style="overflow-wrap: anywhere; line-height: 1.8; background: transparent">'
            f"{''.join(spans)}</code></div>"
        )
    legend = (
        f"<p><b>{html.escape(scale['title'])}</b>: {_swatch(scale['low'])} {html.escape(scale['low_text'])}"
        f" … {html.escape(scale['high_text'])} {_swatch(scale['high'])}</p>"
    )
    return f'{legend}<div style="display: flex; flex-wrap: wrap">{"".join(boxes)}</div>'


def _swatch(colour: Sequence[int] | None) -> str:
    r, g, b = colour or (0, 0, 0)
    opacity = _STRONGEST if colour else 0
    return f'<span style="background: rgba({r}, {g}, {b}, {opacity})">&emsp;</span>'
