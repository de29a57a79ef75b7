"""Plotly figures of tokens: one trace along its tokens, coherence curves, and the mixture of p and q."""

import html
import textwrap
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd
import plotly.graph_objects as go
from plotly.colors import hex_to_rgb
from plotly.subplots import make_subplots

from .html import figure_text, verdict
from .style import BOTH, GREY, POSTERIOR, PRIOR, SOURCE_COLOURS, TEMPLATE, add_line

SHOWN_BEFORE = 12  # tokens that the hover box shows up to its own
FEW = 64  # tokens whose text fits along an axis; of some hundreds plotly.js takes seconds to write them
LONG = 200  # tokens that can be told apart in a line; of a longer trace these are shown, around the selected one


def _token_axis(texts: Sequence[str], start: int = 1) -> dict[str, Any]:
    """An axis with the tokens' text at ``start``, ``start`` + 1, ..."""
    shown = [figure_text(text, 12, 1, spaces=True) for text in texts]
    fits = len(texts) * max(map(len, texts), default=0) <= 90
    return {
        "tickvals": list(range(start, start + len(texts))),
        "ticktext": shown,
        "tickangle": 0 if fits else -90,
        "tickfont": {"family": "monospace", "size": 13 if len(texts) <= FEW else 9},
        "showgrid": False,
        "zeroline": False,
    }


def plot_token_comparison(row: Any) -> go.Figure:
    """One trace (a row of ``Run.traces``): log p and log q in nats of every token, over the tokens' text."""
    texts = list(row["tokens"])
    figure = plot_token_lines(texts, {name: row[name] for name in ("logp", "logq") if row[name] is not None})
    if len(texts) <= LONG:
        figure.update_xaxes(title_text="trace token (· space, ↵ end of line)", **_token_axis(texts))
    figure.update_yaxes(title_text="log-probability, nats a token")
    return figure.update_layout(
        title_text=f"A {html.escape(row['source'])} trace, log p(y|x,z) = {np.sum(row['answer_logp']):.2f} nats "
        f"{verdict(row.get('right'))}",
        hovermode="x unified",
        margin={"t": 80},
        height=400,
        width=12 * len(texts) if 80 < len(texts) <= LONG else None,  # pixels; None: as wide as the notebook
    )


def plot_token_lines(
    texts: Sequence[str],
    values: Mapping[str, Sequence[float]],
    name: str = "",
    label: str = "",
    selected: int | None = None,
) -> go.Figure:
    """One trace along its tokens: log p and log q in nats, below them the quantity ``name`` of ``values``.

    values: name -> one number a token, as in ``reweight.quantities``; label: its axis title. The dotted line
    stands at token ``selected`` (from 0); readers see tokens counted from 1. Of a trace of more than ``LONG`` tokens a
    part is shown, with the whole below it, where it can be moved and widened.
    """
    below = name in values and name not in ("logp", "logq")
    figure = make_subplots(2 if below else 1, 1, shared_xaxes=True, vertical_spacing=0.06)
    lines = [
        ("logp", "log p, prior prompt", "nats", PRIOR, "circle", 1),
        ("logq", "log q, posterior prompt", "nats", POSTERIOR, "diamond", 1),
    ]
    lines += [(name, label, "", BOTH, "square", 2)] if below else []
    look = {"mode": "lines+markers" if len(texts) <= LONG else "lines", "col": 1}
    # Arrays, as plotly looks at each item of a list.
    look["customdata"] = np.array([f"{t}: {figure_text(text, spaces=True)}" for t, text in enumerate(texts, 1)])
    for key, title, unit, colour, symbol, row in lines:
        if key in values:
            look |= {"row": row, "showlegend": row == 1, "marker": {"size": 6, "symbol": symbol}}
            look["hovertemplate"] = f"%{{y:.3f}} {unit} at <b>%{{customdata}}</b>"
            add_line(figure, np.arange(1, len(texts) + 1), np.asarray(values[key], float), title, colour, **look)
    if selected is not None:
        figure.add_vline(x=selected + 1, line={"color": GREY, "width": 2, "dash": "dot"})
    figure.update_xaxes(showgrid=False, zeroline=False)
    few = len(texts) <= FEW
    title = "trace token (· space, ↵ end of line)" if few else "trace token"
    figure.update_xaxes(title_text=title, row=2 if below else 1, col=1, **(_token_axis(texts) if few else {}))
    figure.update_yaxes(title_text="nats a token", row=1, col=1)
    if below:
        figure.update_yaxes(title_text=textwrap.fill(label, 18).replace("\n", "<br>"), row=2, col=1)
    if long := len(texts) > LONG:
        start = min(max((selected or 0) - LONG // 2, 0), len(texts) - LONG) + 0.5
        whole = {"visible": True, "thickness": 0.14, "range": [0.5, len(texts) + 0.5]}
        figure.update_xaxes(range=[start, start + LONG])
        figure.update_xaxes(rangeslider=whole, row=2 if below else 1, col=1)
    return figure.update_layout(
        template=TEMPLATE,
        hovermode="x",
        height=(340 if below else 240) + 80 * long,
        margin={"t": 30, "b": 40},
        legend={"x": 0, "xanchor": "left"},
    )


# The three rows of plot_mixing: where each stands on the page, and its axes.
_SHARE = {"type": "log", "range": [-4, 0], "dtick": 1, "tickformat": ".2~%", "ticklabelstandoff": 4}
_RATIO = {"title_text": "importance ratio p′/h", "type": "log"}
_RATIO |= {"range": [np.log10(0.2), np.log10(5)], "tickvals": [0.3, 0.5, 0.7, 1, 1.3, 2, 4]}
_ROWS = [
    ([0.72, 1.0], {"title_text": "nats a token", "range": [-12, 0], "tickvals": [-10, -8, -6, -4, -2, 0]}, _SHARE),
    ([0.33, 0.59], _RATIO, _SHARE),
    ([0.0, 0.16], {"title_text": "mean |gradient weight| a token"}, {"autorange": "reversed", "ticklabelstandoff": 4}),
]


def plot_mixing(settings: Mapping[str, str], parts: Sequence[tuple[Any, Any, Any]]) -> go.Figure:
    """One column for each setting: token densities, ratios with the clip's bounds, gradient weights.

    settings: name -> description of it. parts, for each setting: ``reweight.densities``, the least and largest
    ratio inside the clip (None without one), and ``reweight.gradient_weights``.
    """
    # Plain dictionaries, checked once by go.Figure: built by subplot calls this takes five times as long.
    layout: dict[str, Any] = {"template": TEMPLATE, "height": 560, "barmode": "stack", "bargap": 0.4}
    layout["margin"] = {"t": 60, "l": 70, "r": 30, "b": 45}
    layout["legend"] = {"y": 1.03, "x": 0, "xanchor": "left", "traceorder": "normal"}
    data, annotations, shapes, columns = [], [], [], len(parts)
    # One scale for all settings, so that they compare.
    most = max(sum(w for (m, _), w in part[2].items() if m == moved) for part in parts for moved in SOURCE_COLOURS)
    for column, ((name, about), (density, bounds, weights)) in enumerate(zip(settings.items(), parts, strict=True)):
        first, last = column == 0, column + 1 == columns
        left, right = column / columns + 0.05 * (not first), (column + 1) / columns - 0.05 * (not last)
        axes = [str(3 * column + row + 1) if column or row else "" for row in range(3)]
        for axis, (domain, x, y) in zip(axes, _ROWS, strict=True):
            title = "tokens" if first and y is _SHARE else ""
            layout[f"xaxis{axis}"] = x | {"domain": [left, right], "anchor": f"y{axis}"}
            layout[f"yaxis{axis}"] = y | {"domain": domain, "anchor": f"x{axis}", "title_text": title}
        layout[f"xaxis{axes[2]}"]["range"] = [0, 1.05 * most or 1.0]
        place = {"x": left, "y": 1.13, "xref": "paper", "yref": "paper", "xanchor": "left", "showarrow": False}
        annotations.append({"text": f"<b>{figure_text(name)}</b>  {figure_text(about)}"} | place)
        for key, colour, dash, width in (
            ("log p", PRIOR, "solid", 1.5),
            ("log q", POSTERIOR, "dot", 1.5),
            ("log h", BOTH, "solid", 3),
        ):
            line = {"color": colour, "dash": dash, "width": width}
            data.append(_steps(*density.get(key, ([], [])), axes[0], key, line, first))
        for source, colour in SOURCE_COLOURS.items():
            edges, share = density.get(f"ratio {source}", ([], []))
            steps = _steps(np.exp(edges), share, axes[1], f"{source} traces", {"color": colour, "width": 1.5}, first)
            data.append(steps | {"fill": "tozeroy", "fillcolor": f"rgba{(*hex_to_rgb(colour), 0.25)}"})
            data.append(
                {
                    "type": "bar",
                    "orientation": "h",
                    "x": [weights.get((moved, source), 0.0) for moved in SOURCE_COLOURS],
                    "y": ["on log p", "on log q"],
                    "xaxis": f"x{axes[2]}",
                    "yaxis": f"y{axes[2]}",
                    "marker": {"color": colour},
                    "showlegend": False,
                    "hovertemplate": f"%{{x:.3f}} %{{y}} from {source} traces<extra></extra>",
                }
            )
        if bounds is not None:
            layout[f"xaxis{axes[1]}"]["title_text"] += " (shaded: inside the clip)"
            box = {"type": "rect", "xref": f"x{axes[1]}", "x0": max(0.2, bounds[0]), "x1": min(5, bounds[1])}
            box |= {"yref": f"y{axes[1]} domain", "y0": 0, "y1": 1}
            shapes.append(box | {"fillcolor": BOTH, "opacity": 0.15, "line": {"width": 0}})
    return go.Figure({"data": data, "layout": layout | {"annotations": annotations, "shapes": shapes}})


def _steps(x: Any, share: Any, axis: str, name: str, line: dict[str, Any], legend: bool) -> dict[str, Any]:
    """A histogram as one stepped line, which draws faster than its bars."""
    share = np.append(share, share[-1:])  # the last bin's right edge
    return {
        "type": "scatter",
        "mode": "lines",
        "x": x,
        "y": np.where(share > 0, share, 1e-5),  # below the axis: a logarithm has no zero
        "xaxis": f"x{axis}",
        "yaxis": f"y{axis}",
        "name": name,
        "line": {"shape": "hv", **line},
        "showlegend": legend,
        "hovertemplate": "from %{x:.3g}: %{y:.2%} of tokens",
    }


def plot_coherence(frame: pd.DataFrame, chosen: Sequence[int] | None = None) -> go.Figure:
    """log p(y | x, z up to t) in nats along the traces of one question, a line a trace.

    frame has the columns of ``trace_frame`` and ``coherence`` (T + 1 nats, see ``coherence``), as
    ``probe`` gives. ``chosen`` are index labels of rows to draw bold, one of each source; without it the
    traces that end best. Their tokens stand on the axes, prior above and posterior below, where no trace has more
    than ``FEW``.
    """
    figure = go.Figure(layout={"template": TEMPLATE})
    if frame.empty:
        return figure.update_layout(title_text="no traces")
    if chosen is None:
        last = frame["coherence"].map(lambda values: values[-1])
        chosen = [own.idxmax() for _, own in last.groupby(frame["source"], sort=False)]
    longest = int(frame["tokens"].map(len).max())
    few = longest <= FEW
    for label, row in frame.sort_values("source", ascending=False, kind="stable").iterrows():
        tokens, source, bold = list(row["tokens"]), row["source"], label in chosen
        axis, side, where = ("xaxis2", "top", "above") if source == "prior" else ("xaxis", "bottom", "below")
        width = 6 if source == "prior" else 2.5  # where two lines coincide both show
        read = (tokens[max(0, t - SHOWN_BEFORE) : t] for t in range(1, len(tokens) + 1))
        add_line(
            figure,
            list(range(len(tokens) + 1)),
            list(row["coherence"]),
            f"{source} trace, its tokens {where}" if few else f"{source} trace",
            SOURCE_COLOURS[source],
            width if bold else 1.2,
            mode="lines+markers" if bold and longest <= LONG else "lines",
            marker={"size": width + 3},
            opacity=1 if bold else 0.4,
            showlegend=bold,
            customdata=["no token yet", *(figure_text("".join(part)) for part in read)],
            hovertemplate=f"%{{customdata}}<br><b>%{{y:.2f}} nats</b> after %{{x}} tokens<extra>{source}</extra>",
        )
        if bold and few:  # an axis is drawn only where a trace lies on it
            figure.add_scatter(x=[None], y=[None], xaxis=axis.replace("axis", ""), showlegend=False, hoverinfo="skip")
            look = {"range": [-0.4, longest + 0.4], "tickfont_color": SOURCE_COLOURS[source], "side": side}
            figure.layout[axis] = _token_axis(["–", *tokens], 0) | look
            figure.layout[axis].overlaying = "x" if source == "prior" else None
    title = "last token read (· space, ↵ end of line, – none yet)" if few else "tokens read"
    figure.update_layout(xaxis_title_text=title)
    figure.update_yaxes(title_text="log p(y | x, z up to here), nats")
    # The longest tokens above the plot, and the legend above them.
    room = {"margin_t": 125, "legend_y": 1.38} if few else {}
    return figure.update_layout(height=460, legend={"x": 0, "xanchor": "left"}, **room)
