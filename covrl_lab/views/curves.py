"""Small pictures of the monitor and the prompt bench: coherence curves and sparklines; no torch."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pandas as pd
import plotly.graph_objects as go

from .figures import GREY, SOURCE_COLOURS, TEMPLATE, _label, visible

SHOWN_BEFORE = 12  # tokens that the hover box shows up to its own


def coherence_curve(frame: pd.DataFrame, chosen: Sequence[int] | None = None) -> go.Figure:
    """log p(y | x, z up to t) in nats along the traces of one question, a line a trace.

    frame has the columns of ``traces.trace_frame`` and ``coherence`` (T + 1 nats, see ``coherence``), as
    ``live.probe`` gives. ``chosen`` are index labels of rows to draw bold, one of each source; without it
    the traces that end best. Their tokens stand on the axes: prior above, posterior below.
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
            customdata=["no token yet", *(_label("".join(part)) for part in parts)],
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
            "ticktext": ["–", *(_label(token) for token in tokens)],
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


def sparkline(values: Sequence[float | None], colour: str = GREY, width: int = 130, height: int = 22) -> str:
    """An SVG line of the values that are there, scaled to their range; empty below two of them."""
    y = np.array(values, dtype=float)
    x, there = np.linspace(3, width - 3, len(y)), np.isfinite(y)
    if there.sum() < 2:
        return ""
    x, y = x[there], y[there]
    low, high = y.min(), y.max()
    place = (y - low) / (high - low) if high > low else np.full(len(y), 0.5)
    points = [f"{a:.1f},{b:.1f}" for a, b in zip(x, height - 3 - place * (height - 6), strict=True)]
    last_x, last_y = points[-1].split(",")
    title = f"from {low:.4g} to {high:.4g}"
    return (
        f'<svg width="{width}" height="{height}" role="img" aria-label="{title}"><title>{title}</title>'
        f'<polyline points="{" ".join(points)}" fill="none" stroke="{colour}" stroke-width="1.5"/>'
        f'<circle cx="{last_x}" cy="{last_y}" r="2.5" fill="{colour}"/></svg>'
    )
