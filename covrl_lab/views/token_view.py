"""Traces as rows of coloured tokens: a notebook widget, and the same as plain HTML for where no kernel runs.

Colours are semi-transparent, so that they fit light and dark grounds: blue to orange where the quantity
tells prior from posterior, purple to green where it tells less from more. Both pairs stay apart with the
common colour-vision deficiencies.
"""

import codecs
import difflib
import html
import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

import ipywidgets as widgets
import numpy as np
import pandas as pd
import traitlets

from ..runs import reweight
from ..runs.reweight import answer_logprob
from ..types import ConfigError, did_you_mean
from .html import html_mark, html_number, html_source, visible
from .widgets import Scripted, field, in_turn, script, static_text

_PRIOR, _POSTERIOR, _LESS, _MORE = (31, 119, 180), (213, 94, 0), (129, 76, 176), (0, 140, 70)
_BYTES = re.compile("(⟨[0-9A-F]{2}⟩)+$")  # as ``spelled`` writes them
FEW_TOKENS = 8  # of an answer, whose log-probabilities stand beside their sum
LONG = 1000  # tokens: all numbers of more would make files of tens of megabytes
_STRONGEST = 0.65  # opacity at the end of a scale, as in token_view.js


def _scale(title: str, limit: float, low: Any, high: Any, less: str = "", more: str = "", **kind: Any) -> dict:
    """``low`` and ``high``: colours at centre -+ limit, with ``log`` of the logarithm; ``less``, ``more``: in words."""
    scale = {"title": title, "limit": limit, "low": low, "high": high, "less": less, "more": more}
    scale |= {"centre": 0.0, "log": False} | kind
    ends = [scale["centre"] - limit * bool(low), scale["centre"] + limit * bool(high)]
    signed = "+" if low and high and not (scale["centre"] or scale["log"]) else ""
    numbers = [html_number(math.exp(end) if scale["log"] else end, f"{signed}.2g") for end in ends]
    return scale | {"low_text": f"{numbers[0]} {less}".strip(), "high_text": f"{more} {numbers[1]}".strip()}


SCALES: dict[str, dict[str, Any]] = {
    "log_gap": _scale("log q − log p, nats", 4.0, _PRIOR, _POSTERIOR, "the prior wanted it", "the posterior did"),
    "logp": _scale("log p, nats", 8.0, _LESS, None, "unlikely"),
    "logq": _scale("log q, nats", 8.0, _LESS, None, "unlikely"),
    "responsibility": _scale(
        "responsibility ρ of the prior", 0.5, _POSTERIOR, _PRIOR, "moves the posterior", "moves the prior", centre=0.5
    ),
    "ratio": _scale("importance ratio p′/h", math.log(2), _LESS, _MORE, log=True),
    "kl": _scale("KL contribution, nats", 1.0, None, _MORE),
    "difference": _scale(
        "log p here − in the other trace, nats", 4.0, _LESS, _MORE, "less likely here", "more likely"
    ),
    "gradient_weight": _scale("gradient weight A·f′(r)·r", 2.0, _LESS, _MORE, "made less likely", "more likely"),
}


def fitted(name: str, traces: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """The scale ``name`` of ``SCALES`` with its ends at the largest distance from its centre in what is drawn."""
    scale = {key: value for key, value in SCALES[name].items() if not key.endswith("_text")}
    places = [_place(value, scale) for trace in traces for value in trace["values"].get(name, ()) if value is not None]
    limit = scale["limit"] * max(map(abs, places), default=1.0)
    return _scale(**scale | {"limit": limit or scale["limit"]})


def _place(value: float, scale: Mapping[str, Any]) -> float:
    """Where a value stands: -1 and 1 are the ends of the scale."""
    return ((math.log(value) if scale["log"] else value) - scale["centre"]) / scale["limit"]


def spelled(tokens: Sequence[str], text: str) -> list[str]:
    """Tokens with each character that spans several of them on the last one, and bytes such as ⟨C3⟩ before it.

    tokens: each decoded alone, which makes U+FFFD of a part of a character; text: all of them decoded together,
    without spaces at its ends and what ends a trace. From where they do not agree tokens stay as they are.
    """
    shown, joined = list(tokens), "".join(tokens)
    text = joined[: len(joined) - len(joined.lstrip())] + text.lstrip()
    raw = text.encode(errors="replace").replace("\ufffd".encode(), b"\xff")  # one byte of no character each
    starts: list[dict[int, int]] = []  # of each token: where it may end -> where it then starts
    reached, decoder = [0], codecs.getincrementaldecoder("utf-8")("replace")
    for token in tokens:
        longest = 4 * len(token) if "\ufffd" in token else len(token.encode(errors="replace"))
        shortest = 1 if "\ufffd" in token else longest
        spans = [(at, end) for at in reached for end in range(at + shortest, min(at + longest + 1, len(raw)) + 1)]
        said = (token, f" {token}")  # some tokenizers drop the space before a token that they decode alone
        ends = {end: at for at, end in spans if raw[at:end].decode(errors="replace") in said}
        if not ends:
            break
        starts.append(ends)
        reached = list(ends)
    pieces, end = [], max(reached)
    for ends in reversed(starts):
        pieces.append(raw[ends[end] : end])
        end = ends[end]
    for i, piece in enumerate(reversed(pieces)):
        whole = decoder.decode(piece)
        if "\ufffd" in shown[i]:
            shown[i] = whole + "".join(f"⟨{byte:02X}⟩" for byte in decoder.getstate()[0][-len(piece) :])
    return shown


LABELS = reweight.LABELS | {"difference": ("log p here − in the other trace", "nats")}


def align(a: dict[str, Any], b: dict[str, Any]) -> int:
    """Add ``difference`` to two traces of ``payload``, in place; how many tokens they have in common.

    Tokens are matched in order by their text (``difflib``). A token's difference is its log p minus that of its match,
    and None where it has none: such tokens are marked as standing in one trace only.
    """
    matches = difflib.SequenceMatcher(None, a["tokens"], b["tokens"], autojunk=False).get_matching_blocks()
    pairs = [(block.a + k, block.b + k) for block in matches for k in range(block.size)]
    for trace, other, mine in ((a, b, 0), (b, a, 1)):
        found: list[float | None] = [None] * len(trace["tokens"])
        for pair in pairs:
            here, there = trace["values"]["logp"][pair[mine]], other["values"]["logp"][pair[1 - mine]]
            found[pair[mine]] = None if here is None or there is None else round(here - there, 6)
        trace["values"] = trace["values"] | {"difference": found}
    return len(pairs)


def _aligned(traces: Sequence[Mapping[str, Any]], colour: str) -> list[dict[str, Any]]:
    """The same traces; two with their ``difference``, where it is the colour."""
    found = [dict(trace) for trace in traces]
    if colour == "difference" and len(found) == 2 and not all(colour in trace["values"] for trace in found):
        align(*found)
    return found


def payload(frame: pd.DataFrame, settings: reweight.Settings, alternatives: Sequence[Any] | None = None) -> list[dict]:
    """What the widget draws of each row: texts made visible, numbers rounded, None for unknown."""
    found = reweight.quantities(reweight.Traces.of(frame), settings)
    drawn = []
    for i, (row, total) in enumerate(zip(frame.to_dict("records"), answer_logprob(frame), strict=True)):
        tokens = row["tokens"]
        values = {name: found[name][i, : len(tokens)] for name in reweight.LABELS if name in found}
        texts = spelled(tokens, row.get("trace", ""))
        note, right = f"answer at {html_number(total, '.1f')} nats{_by_token(row)}", row.get("right")
        drawn.append(
            {
                "title": f"{row['source']} trace",
                "subtitle": note + ("" if row["finished"] else ", unfinished"),
                "source": row["source"],
                "right": None if right is None or right != right else bool(right),
                "prediction": None if row.get("prediction") is None else visible(row["prediction"]),
                "note": "★ " * bool(row.get("starred")) + visible(row.get("note") or ""),
                "tokens": [visible(t, spaces=True) or "∅" for t in texts],
                "texts": [_copied(t, t != token) for t, token in zip(texts, tokens, strict=True)],
                "values": {name: _plain(numbers) for name, numbers in values.items() if np.isfinite(numbers).any()},
                "alternatives": alternatives and [_visible_alternatives(token) for token in alternatives[i]],
            }
        )
    return drawn


def _copied(text: str, spelt: bool) -> str:
    """A token as it is copied: with its spaces and line ends; what could harm where it is pasted stays a sign."""
    text = _BYTES.sub("", text) if spelt else text  # their character stands on a later token
    return re.sub("[^\n\t]+", lambda part: visible(part[0]), text)


def _by_token(row: Mapping[str, Any]) -> str:
    """The log-probability of each of a few answer tokens, where their texts are stored."""
    texts = row.get("answer_tokens")
    if not np.ndim(texts) or not 1 < len(texts) <= FEW_TOKENS:
        return ""
    pairs = zip(texts, row["answer_logp"], strict=True)
    listed = [f"{visible(text, spaces=True)} {html_number(nats, '.1f')}" for text, nats in pairs]
    return f" ({', '.join(listed)})"


def _plain(numbers: np.ndarray) -> list[float | None]:
    """Numbers for JSON."""
    return [round(x, 6) if math.isfinite(x) else None for x in numbers.tolist()]


def _visible_alternatives(token: Mapping[str, Any]) -> dict[str, Any]:
    return {
        prompt: [[visible(text, spaces=True), round(float(x), 6)] for text, x in choices]
        for prompt, choices in token.items()
    }


class TokenView(Scripted):
    """One or two traces token by token; click a token, or focus one and use the arrow keys, Home and End.

    ``show`` draws traces. ``selected`` is [row, token from 0] (empty: none) and ``colour`` a name of ``SCALES``;
    both follow the widget and can be set. With ``fitted`` the colours span what the traces hold. ``notes``: of rows
    with ``starred`` and ``note`` (see ``runs.notes``) what a reader sees and changes, a dictionary each.
    """

    _esm = script("token_view.js")
    _css = static_text("token_view.css")
    traces = traitlets.List().tag(sync=True)
    labels = traitlets.Dict(LABELS).tag(sync=True)
    scales = traitlets.Dict(SCALES).tag(sync=True)
    colour = traitlets.Unicode("log_gap").tag(sync=True)
    fitted = traitlets.Bool(False).tag(sync=True)
    selected = traitlets.List().tag(sync=True)
    notes = traitlets.List().tag(sync=True)

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
            rows = frame.itertuples() if "starred" in frame else ()
            self.notes = [{"id": f"{r.step}/{r.rollout}", "starred": r.starred, "note": r.note} for r in rows]

    def chooser(self) -> widgets.Dropdown:
        """A choice of ``colour`` by its title, which stands above the tokens."""
        titles = {scale["title"]: name for name, scale in SCALES.items()}
        chosen = field(widgets.Dropdown, "colour", self.colour, "330px", "50px", options=titles)
        widgets.link((chosen, "value"), (self, "colour"))
        return chosen

    @traitlets.observe("traces", "colour", "fitted")
    @in_turn
    def _fit(self, change: Any) -> None:
        self.traces = _aligned(self.traces, self.colour)
        self.scales = SCALES | ({self.colour: fitted(self.colour, self.traces)} if self.fitted else {})

    @traitlets.validate("colour")
    def _check_colour(self, proposal: Any) -> str:
        return _known_colour(proposal["value"])


def _known_colour(name: str) -> str:
    if name not in SCALES:
        raise ConfigError(f"unknown colour {name!r}{did_you_mean(name, SCALES)}")
    return name


def token_html(frame: pd.DataFrame, settings: reweight.Settings | None = None, colour: str = "log_gap") -> str:
    """The rows of ``frame`` as plain HTML: escaped, no script, numbers in each token's title."""
    return traces_html(payload(frame, settings or reweight.Settings()), colour)


def traces_html(traces: Sequence[Mapping[str, Any]], colour: str) -> str:
    """What ``payload`` gives as plain HTML; tokens of a trace of more than ``LONG`` have the coloured number alone."""
    scale, boxes = SCALES[_known_colour(colour)], []
    for trace in _aligned(traces, colour):
        spans = []
        for t, text in enumerate(trace["tokens"]):
            numbers = {name: row[t] for name, row in trace["values"].items() if row[t] is not None}
            clipped = numbers.pop("clipped", 0)
            if len(trace["tokens"]) > LONG:
                numbers = {name: value for name, value in numbers.items() if name == colour}
            title, style = [text], _fill(numbers.get(colour), scale)
            if colour == "difference" and colour not in numbers:
                style = "text-decoration: underline dotted"
            for name, value in numbers.items():
                label, unit = LABELS[name]
                title.append(f"{label} {html_number(value, '.3f')} {unit}".strip())
            if clipped:
                title.append("held back by the clip")
                style += "; border-bottom: 2px dashed"
            lines = html.escape("\n".join(title))
            spans.append(f'<span style="{style}" title="{lines}">{html.escape(text)}</span>')
            spans += ["<br>"] if text.endswith("↵") else []
        boxes.append(
            '<div style="flex: 1 1 300px; min-width: 0; margin: 0 16px 8px 0; max-height: 480px; overflow: auto">'
            f"{html_source(trace['source'], trace['title'])} {html_mark(trace['right'], trace['prediction'])} "
            f"{html.escape(trace['subtitle'])}<br><i>{html.escape(trace['note'])}</i>{'<br>' * bool(trace['note'])}"
            # <code>: no page's formula renderer looks for dollars in it.
            '<code dir="auto" style="overflow-wrap: anywhere; line-height: 1.8; background: transparent">'
            f"{''.join(spans)}</code></div>"
        )
    low, high = (f'<span style="{_background(scale[end], _STRONGEST)}">&emsp;</span>' for end in ("low", "high"))
    legend = (
        f"<p><b>{html.escape(scale['title'])}</b>: {low} {html.escape(scale['low_text'])}"
        f" … {html.escape(scale['high_text'])} {high}"
        f"{'; dotted: in this trace only' * (colour == 'difference')}</p>"
    )
    return f'{legend}<div style="display: flex; flex-wrap: wrap">{"".join(boxes)}</div>'


def _fill(value: float | None, scale: Mapping[str, Any]) -> str:
    """CSS background of a token, or nothing."""
    if value is None:
        return ""
    place = _place(value, scale)
    return _background(scale["low" if place < 0 else "high"], _STRONGEST * min(1, abs(place)))


def _background(colour: Sequence[int] | None, opacity: float) -> str:
    """CSS background; transparent at the end of a scale that has no colour."""
    r, g, b = colour or (0, 0, 0)
    return f"background: rgba({r}, {g}, {b}, {opacity if colour else 0:.2f})"
