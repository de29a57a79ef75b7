"""Small pictures of the monitor and the prompt bench: coherence curves and sparklines; no torch."""

from __future__ import annotations

import html
from collections.abc import Sequence

import numpy as np
import pandas as pd
import plotly.graph_objects as go

from .figures import GREY, SOURCE_COLOURS, TEMPLATE, _label, visible


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
        chosen = [last[frame["source"] == s].idxmax() for s in frame["source"].unique()]
    longest = max(len(tokens) for tokens in frame["tokens"])
    for label, row in frame.sort_values("source", kind="stable", ascending=False).iterrows():
        bold, colour = label in chosen, SOURCE_COLOURS[row["source"]]
        read = [
            "no trace yet",
            *(_label("".join(row["tokens"][max(0, t - 11) : t + 1])) for t in range(len(row["tokens"]))),
        ]
        figure.add_scatter(
            x=list(range(len(read))),
            y=list(row["coherence"]),
            mode="lines+markers" if bold else "lines",
            name=f"{row['source']}, tokens on the axis" if bold else row["source"],
            legendgroup=f"{row['source']} {bold}",
            showlegend=bold,
            opacity=1 if bold else 0.4,
            line={"color": colour, "width": 3 if bold else 1.2},
            marker={"size": 6},
            customdata=read,
            hovertemplate="%{customdata}<br><b>%{y:.2f} nats</b> after %{x} tokens"
            f"<extra>{row['source']}</extra>",
        )
    shared = {"range": [-0.4, longest + 0.4], "showgrid": False, "zeroline": False, "tickangle": -90}
    axes = {"posterior": "xaxis", "prior": "xaxis2"}
    for label in chosen:
        row = frame.loc[label]
        axis = {
            "tickvals": list(range(len(row["tokens"]) + 1)),
            "ticktext": ["–", *(_label(token, spaces=True) for token in row["tokens"])],
            "tickfont": {
                "family": "monospace",
                "size": 12 if longest <= 64 else 9,
                "color": SOURCE_COLOURS[row["source"]],
            },
            "title": {"text": f"last token read of the bold {row['source']} trace (· space, ↵ end of line)"},
        }
        figure.update_layout({axes[row["source"]]: shared | axis})
    figure.update_layout(xaxis2={"side": "top", "overlaying": "x"} | shared)
    if any(frame.loc[label, "source"] == "prior" for label in chosen):
        # An axis is drawn only where a trace lies on it.
        figure.add_scatter(x=[None], y=[None], xaxis="x2", showlegend=False, hoverinfo="skip")
    figure.update_yaxes(title_text="log p(y | x, z up to here), nats")
    return figure.update_layout(
        height=470,
        margin={"t": 110, "b": 100},
        width=None if longest <= 90 else 11 * longest,
        legend={"y": 0, "yanchor": "bottom", "x": 1},
    )


def sparkline(values: Sequence[float | None], colour: str = GREY, width: int = 130, height: int = 22) -> str:
    """An SVG line of the values that are there, scaled to their range; empty below two of them."""
    y = np.asarray(pd.Series(values, dtype=float))
    x = np.linspace(3, width - 3, len(y)) if len(y) > 1 else np.zeros(len(y))
    there = np.isfinite(y)
    if there.sum() < 2:
        return ""
    low, high = y[there].min(), y[there].max()
    scaled = height / 2 if high == low else height - 3 - (y - low) / ((high - low) or 1) * (height - 6)
    points = [
        f"{a:.1f},{b:.1f}" for a, b in zip(x[there], np.broadcast_to(scaled, y.shape)[there], strict=True)
    ]
    end_x, end_y = points[-1].split(",")
    title = html.escape(visible(f"from {low:.4g} to {high:.4g}"))
    return (
        f'<svg width="{width}" height="{height}" role="img" aria-label="{title}"><title>{title}</title>'
        f'<polyline points="{" ".join(points)}" fill="none" stroke="{colour}" stroke-width="1.5"/>'
        f'<circle cx="{end_x}" cy="{end_y}" r="2.5" fill="{colour}"/></svg>'
    )
