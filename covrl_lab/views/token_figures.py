"""Plotly figures of tokens: one trace along its tokens, coherence curves, and the mixture of p and q."""

from __future__ import annotations

import html
import textwrap
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd
import plotly.graph_objects as go
from plotly.subplots import make_subplots

from .html import figure_text, visible
from .style import BOTH, GREY, POSTERIOR, PRIOR, SOURCE_COLOURS, TEMPLATE

SHOWN_BEFORE = 12  # tokens that the hover box shows up to its own


def plot_token_comparison(row: Any) -> go.Figure:
    """One trace (a row of ``Run.traces``): log p and log q in nats of every token, over the tokens' text."""
    tokens = [figure_text(token, spaces=True) for token in row["tokens"]]
    places, logp, logq = list(range(len(tokens))), list(row["logp"]), row["logq"]
    figure = go.Figure(layout={"template": TEMPLATE})
    lines = [("log p, prior prompt", logp, PRIOR)]
    if logq is not None:
        lines.append(("log q, posterior prompt", list(logq), POSTERIOR))
    for name, values, colour in lines:
        figure.add_scatter(
            x=places,
            y=values,
            mode="lines+markers",
            name=name,
            line={"color": colour, "width": 2},
            marker={"size": 6},
            customdata=tokens,
            hovertemplate="%{y:.2f} nats at <b>%{customdata}</b>",
        )
    fits = len(tokens) * max((len(visible(t)) for t in row["tokens"]), default=0) <= 100
    total = float(np.sum(row["answer_logp"]))
    figure.update_xaxes(
        title_text="trace token (· space, ↵ end of line)",
        tickvals=places,
        ticktext=tokens,
        tickangle=0 if fits else -90,
        tickfont={"family": "monospace", "size": 13 if len(tokens) <= 64 else 10},
        showgrid=False,
    )
    figure.update_yaxes(title_text="log-probability, nats a token")
    return figure.update_layout(
        title_text=f"A {html.escape(row['source'])} trace, log p(y|x,z) = {total:.2f} nats",
        hovermode="x unified",
        legend={"x": 0, "xanchor": "left"},
        margin={"t": 80},
        height=400,
        width=None if len(tokens) <= 80 else 12 * len(tokens),  # pixels; None: as wide as the notebook
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
    stands at token ``selected`` (from 0).
    """
    below = name in values and name not in ("logp", "logq")
    figure = make_subplots(2 if below else 1, 1, shared_xaxes=True, vertical_spacing=0.06)
    hover = [f"{t}: {figure_text(text, spaces=True)}" for t, text in enumerate(texts, 1)]
    lines = [("log p", "logp", PRIOR, "circle", 1), ("log q", "logq", POSTERIOR, "diamond", 1)]
    lines += [(label, name, BOTH, "square", 2)] if below else []
    for title, key, colour, symbol, row in lines:
        if key in values:
            figure.add_scatter(
                y=list(values[key]),
                mode="lines+markers" if len(texts) <= 200 else "lines",
                name=title,
                showlegend=row == 1,
                line={"color": colour, "width": 2},
                marker={"size": 6, "symbol": symbol},
                customdata=hover,
                hovertemplate="%{y:.3f} at %{customdata}",
                row=row,
                col=1,
            )
    if selected is not None:
        figure.add_vline(x=selected, line={"color": GREY, "width": 2, "dash": "dot"})
    few = len(texts) <= 64
    figure.update_xaxes(showgrid=False, zeroline=False)
    figure.update_xaxes(
        title_text="trace token (· space, ↵ end of line)" if few else "trace token, from 0",
        tickvals=list(range(len(texts))) if few else None,
        ticktext=[figure_text(text, 12, 1, spaces=True) for text in texts] if few else None,
        tickangle=0 if sum(map(len, texts)) <= 70 else -90,
        tickfont={"family": "monospace"},
        row=2 if below else 1,
        col=1,
    )
    figure.update_yaxes(title_text="nats a token", row=1, col=1)
    if below:
        figure.update_yaxes(title_text=textwrap.fill(label, 18).replace("\n", "<br>"), row=2, col=1)
    return figure.update_layout(
        template=TEMPLATE,
        hovermode="x",
        height=340 if below else 240,
        margin={"t": 30, "b": 40},
        legend={"x": 0, "xanchor": "left"},
    )


def plot_mixing(
    settings: Mapping[str, str],
    densities: Sequence[Mapping[str, tuple[np.ndarray, np.ndarray]]],
    bounds: Sequence[tuple[float, float] | None],
    gradient_weights: Sequence[Mapping[tuple[str, str], float]],
) -> go.Figure:
    """One column for each setting: token densities, ratios with the clip's bounds, gradient weights.

    settings: name -> description of it; densities and gradient_weights as the functions of ``runs.reweight``
    with these names; bounds: least and largest ratio inside the clip, or None.
    """
    columns, wide = len(densities), len(densities) > 1
    layout: dict[str, Any] = {"template": TEMPLATE, "height": 560, "barmode": "stack", "bargap": 0.4}
    layout |= {
        "margin": {"t": 60, "l": 70, "r": 30, "b": 45},
        "legend": {"y": 1.03, "x": 0, "xanchor": "left", "traceorder": "normal"},
    }
    data: list[dict[str, Any]] = []
    annotations, shapes = [], []
    # Plain dictionaries, checked once by go.Figure: built by subplot calls this takes five times as long.
    for column, (title, density, bound, weight) in enumerate(
        zip(settings.items(), densities, bounds, gradient_weights, strict=True)
    ):
        left, right = (
            column / columns + 0.05 * (column > 0),
            (column + 1) / columns - 0.05 * (column + 1 < columns),
        )
        axes = [str(3 * column + row + 1) if column or row else "" for row in range(3)]
        for row, (bottom, top) in enumerate(((0.72, 1.0), (0.33, 0.59), (0.0, 0.16))):
            layout[f"xaxis{axes[row]}"] = {"domain": [left, right], "anchor": f"y{axes[row]}"}
            layout[f"yaxis{axes[row]}"] = {"domain": [bottom, top], "anchor": f"x{axes[row]}"}
        if wide:
            text = f"<b>{figure_text(title[0])}</b>  {figure_text(title[1])}"
            place = {"x": left, "y": 1.13, "xref": "paper", "yref": "paper", "xanchor": "left"}
            annotations.append({"text": text, "showarrow": False, **place})
        first = column == 0
        for name, colour, dash in (
            ("log p", PRIOR, "solid"),
            ("log q", POSTERIOR, "dot"),
            ("log h", BOTH, "solid"),
        ):
            edges, share = density.get(name, ([], []))
            data.append(
                _steps(edges, share, axes[0], name, colour, first)
                | {
                    "line": {
                        "shape": "hv",
                        "color": colour,
                        "dash": dash,
                        "width": 3 if name == "log h" else 1.5,
                    }
                }
            )
        for source, colour in SOURCE_COLOURS.items():
            edges, share = density.get(f"ratio {source}", ([], []))
            data.append(
                _steps(np.exp(edges), share, axes[1], f"{source} traces", colour, first)
                | {
                    "fill": "tozeroy",
                    "fillcolor": _faint(colour),
                    "line": {"shape": "hv", "color": colour, "width": 1.5},
                }
            )
        if bound is not None:
            box = {"type": "rect", "xref": f"x{axes[1]}", "yref": f"y{axes[1]} domain", "y0": 0, "y1": 1}
            shapes.append(
                box
                | {"x0": max(0.2, bound[0]), "x1": min(5, bound[1]), "fillcolor": BOTH, "opacity": 0.15}
                | {"line": {"width": 0}}
            )
        for source, colour in SOURCE_COLOURS.items():
            data.append(
                {
                    "type": "bar",
                    "orientation": "h",
                    "x": [weight.get((moved, source), 0.0) for moved in ("prior", "posterior")],
                    "y": ["on log p", "on log q"],
                    "xaxis": f"x{axes[2]}",
                    "yaxis": f"y{axes[2]}",
                    "marker": {"color": colour},
                    "showlegend": False,
                    "hovertemplate": f"%{{x:.3f}} %{{y}} from {source} traces<extra></extra>",
                }
            )
        log = {"type": "log", "range": [-4, 0], "dtick": 1, "tickformat": ".2~%", "ticklabelstandoff": 4}
        layout[f"xaxis{axes[0]}"] |= {
            "title": {"text": "nats a token"},
            "range": [-12, 0],
            "tickvals": [-10, -8, -6, -4, -2, 0],
        }
        layout[f"yaxis{axes[0]}"] |= log | {"title": {"text": "tokens" if first else ""}}
        layout[f"xaxis{axes[1]}"] |= {
            "type": "log",
            "range": [np.log10(0.2), np.log10(5)],
            "tickvals": [0.3, 0.5, 0.7, 1, 1.3, 2, 4],
            "title": {"text": "importance ratio p′/h (shaded: inside the clip)"},
        }
        layout[f"yaxis{axes[1]}"] |= log | {"title": {"text": "tokens" if first else ""}}
        layout[f"xaxis{axes[2]}"] |= {
            "title": {"text": "mean |gradient weight| a token"},
            "rangemode": "tozero",
        }
        layout[f"yaxis{axes[2]}"] |= {"autorange": "reversed", "ticklabelstandoff": 4}
    totals = [
        sum(v for (moved, _), v in weight.items() if moved == m) for weight in gradient_weights for m in SOURCE_COLOURS
    ]
    for column in range(columns):  # one scale, so that the settings compare
        axis = str(3 * column + 3)
        layout[f"xaxis{axis}"]["range"] = [0, 1.05 * max(totals, default=1.0) or 1.0]
    return go.Figure({"data": data, "layout": layout | {"annotations": annotations, "shapes": shapes}})


def _faint(colour: str) -> str:
    """A colour as "#1f77b4", a quarter opaque."""
    r, g, b = (int(colour[k : k + 2], 16) for k in (1, 3, 5))
    return f"rgba({r}, {g}, {b}, 0.25)"


def _steps(x: Any, share: Any, axis: str, name: str, colour: str, legend: bool) -> dict[str, Any]:
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
        "showlegend": legend,
        "hovertemplate": "from %{x:.3g}: %{y:.2%} of tokens",
    }


def plot_coherence(frame: pd.DataFrame, chosen: Sequence[int] | None = None) -> go.Figure:
    """log p(y | x, z up to t) in nats along the traces of one question, a line a trace.

    frame has the columns of ``trace_frame`` and ``coherence`` (T + 1 nats, see ``coherence``), as
    ``probe`` gives. ``chosen`` are index labels of rows to draw bold, one of each source; without it the
    traces that end best. Their tokens stand on the axes: prior above, posterior below.
    """
    figure = go.Figure(layout={"template": TEMPLATE})
    if frame.empty:
        return figure.update_layout(title_text="no traces")
    if chosen is None:
        last = frame["coherence"].map(lambda values: values[-1])
        chosen = [own.idxmax() for _, own in last.groupby(frame["source"], sort=False)]
    longest = int(frame["tokens"].map(len).max())
    # source -> (axis, where it stands, width: where two lines coincide both show)
    drawn = {"prior": ("x2", "above", 6), "posterior": ("x", "below", 2.5)}
    for label, row in frame.sort_values("source", ascending=False, kind="stable").iterrows():
        bold, (_, side, width) = label in chosen, drawn[row["source"]]
        tokens = list(row["tokens"])
        parts = [tokens[max(0, t - SHOWN_BEFORE) : t] for t in range(1, len(tokens) + 1)]
        figure.add_scatter(
            x=list(range(len(tokens) + 1)),
            y=list(row["coherence"]),
            mode="lines+markers" if bold else "lines",
            name=f"{row['source']} trace, its tokens {side}",
            showlegend=bold,
            opacity=1 if bold else 0.4,
            line={"color": SOURCE_COLOURS[row["source"]], "width": width if bold else 1.2},
            marker={"size": width + 3},
            customdata=["no token yet", *(figure_text("".join(part)) for part in parts)],
            hovertemplate="%{customdata}<br><b>%{y:.2f} nats</b> after %{x} tokens"
            f"<extra>{row['source']}</extra>",
        )
    for label in chosen:
        row = frame.loc[label]
        axis, side, _ = drawn[row["source"]]
        tokens = [visible(token, spaces=True) for token in row["tokens"]]
        fits = len(tokens) * max(map(len, tokens)) <= 90
        # An axis is drawn only where a trace lies on it.
        figure.add_scatter(x=[None], y=[None], xaxis=axis, showlegend=False, hoverinfo="skip")
        figure.layout["xaxis2" if axis == "x2" else "xaxis"] = {
            "range": [-0.4, longest + 0.4],
            "showgrid": False,
            "zeroline": False,
            "tickvals": list(range(len(tokens) + 1)),
            "ticktext": ["–", *(figure_text(token) for token in tokens)],
            "tickangle": 0 if fits else -90,
            "tickfont": {
                "family": "monospace",
                "size": 13 if longest <= 64 else 9,
                "color": SOURCE_COLOURS[row["source"]],
            },
            "side": "top" if side == "above" else "bottom",
            "overlaying": "x" if axis == "x2" else None,
        }
    figure.update_layout(xaxis_title_text="last token read (· space, ↵ end of line, – none yet)")
    figure.update_yaxes(title_text="log p(y | x, z up to here), nats")
    return figure.update_layout(
        height=430,
        margin={"t": 90},
        width=None if longest <= 90 else 11 * longest,
        legend={"x": 0, "xanchor": "left", "y": 1.12},
    )
