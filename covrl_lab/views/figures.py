"""Plotly figures of a run: training curves, held-out accuracy, log-probabilities of answers.

Frames come from a run folder (``Run``) or from ``trace_frame``. Text that a model or a data set wrote is
made visible and escaped wherever it enters hover text or tick labels. Backgrounds are transparent and lines
mid-grey, so that figures fit light and dark themes.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import pandas as pd
import plotly.graph_objects as go
from plotly.subplots import make_subplots

from ..runs.reweight import answer_logprob
from .html import figure_text
from .style import BOTH, PALETTE, PRIOR, SOURCE_COLOURS, TEMPLATE


def plot_answer_logprobs(frame: pd.DataFrame, questions: int = 8) -> go.Figure:
    """log p(y|x,z) in nats of prior against posterior traces, one row for each of the first questions.

    A point is a trace (hollow: unfinished), a bar the mean of a question's traces from one source.
    """
    frame = frame.assign(total=answer_logprob(frame))
    groups = [group for _, group in frame.groupby("example_id", sort=False)][:questions]
    figure = go.Figure(layout={"template": TEMPLATE})
    for source, colour in SOURCE_COLOURS.items():
        offset = -0.17 if source == "prior" else 0.17
        parts = []
        for i, group in enumerate(groups):
            part = group[group["source"] == source]
            stagger = np.linspace(-0.1, 0.1, len(part) + 2)[1:-1]  # equal traces stay apart
            parts += [part.assign(row=i + offset, place=i + offset + stagger)] if len(part) else []
        if not parts:
            continue
        # Finished first: the legend shows the first point's symbol.
        rows = pd.concat(parts).sort_values("finished", ascending=False, kind="stable")
        figure.add_scatter(
            x=rows["total"],
            y=rows["place"],
            mode="markers",
            name=source,
            legendgroup=source,
            marker={
                "color": colour,
                "size": 9,
                "opacity": 0.8,
                "symbol": ["circle" if done else "circle-open" for done in rows["finished"]],
            },
            customdata=[
                [figure_text(trace), np.exp(total), "" if done else "<br>unfinished"]
                for trace, total, done in zip(rows["trace"], rows["total"], rows["finished"], strict=True)
            ],
            hovertemplate="%{customdata[0]}<br>log p(y|x,z) = %{x:.2f} nats, p = %{customdata[1]:.2g}"
            f"%{{customdata[2]}}<extra>{source}</extra>",
        )
        figure.add_scatter(
            x=[part["total"].mean() for part in parts],
            y=[part["row"].iloc[0] for part in parts],
            mode="markers",
            name=f"mean, {source}",
            legendgroup=source,
            showlegend=False,
            marker={"symbol": "line-ns", "size": 20, "line": {"color": colour, "width": 3}},
            hovertemplate=f"mean of {source} traces: %{{x:.2f}} nats<extra></extra>",
        )
    figure.update_xaxes(title_text="log p(y | x, z), nats (right: the reference answer is more probable)")
    figure.update_yaxes(
        tickvals=list(range(len(groups))),
        ticktext=[
            f"{figure_text(g['question'].iloc[0], 40, 3)}<br>y = {figure_text(g['answer'].iloc[0], 40, 2)}"
            for g in groups
        ],
        range=[len(groups) - 0.5, -0.5],
        zeroline=False,
    )
    return figure.update_layout(
        title_text="A point is a trace (hollow: unfinished), a bar the mean",
        height=150 + 80 * max(1, len(groups)),
    )


def plot_training_curves(
    metrics: pd.DataFrame, evaluations: pd.DataFrame | None = None, reward_unit: str = "nats"
) -> go.Figure:
    """Small multiples over a run's steps: what rises when it learns, and what else might make it rise.

    metrics and evaluations are ``Run.metrics`` and ``Run.evaluations``; a quantity that the method does not
    have (KL without a posterior) gets no panel. The bars on accuracy are 95% intervals, those of
    ``evaluation.summarise``. From 60 steps on, each step is a faint line and the bold one a centred mean over
    a twentieth of the run.
    """
    sources = SOURCE_COLOURS.items()
    panels = [
        ("Reward by source", reward_unit, {f"reward_{s}": (s, c) for s, c in sources}),
        ("KL(p′‖p)", "nats a token", {"kl": ("all traces", BOTH)}),
        ("Trace length", "tokens", {f"trace_tokens_{s}": (s, c) for s, c in sources}),
        ("Finished traces", "share", {"finished_share": ("all traces", BOTH)}),
        ("Held-out accuracy", "share of questions", {"accuracy": ("held-out questions", PRIOR)}),
        ("Gradient norm", "L2 norm before clipping", {"gradient_norm": ("all traces", BOTH)}),
    ]
    frames = {"accuracy": evaluations} if evaluations is not None and len(evaluations) else {}
    drawn = []
    for title, unit, series in panels:
        kept = {}
        for column, (name, colour) in series.items():
            frame = frames.get(column, metrics)
            if column in frame and frame[column].notna().any():
                kept[column] = (frame.dropna(subset=[column]), name, colour)
        if kept:
            drawn.append((title, unit, kept))
    if not drawn:
        return go.Figure(layout={"template": TEMPLATE, "title": {"text": "no finished step yet"}})

    columns = min(3, len(drawn))
    rows = -(-len(drawn) // columns)
    figure = make_subplots(
        rows,
        columns,
        subplot_titles=[title for title, _, _ in drawn],
        horizontal_spacing=0.09,
        vertical_spacing=0.2 if rows > 1 else 0,
    )
    named = set()
    for i, (_, unit, series) in enumerate(drawn):
        place = {"row": i // columns + 1, "col": i % columns + 1}
        for column, (frame, name, colour) in series.items():
            noisy = len(frame) > 60
            shown = {"legendgroup": name, "x": frame["step"], "name": name}
            in_legend = name in SOURCE_COLOURS and name not in named
            figure.add_scatter(
                y=frame[column],
                mode="lines" if noisy else "lines+markers",
                opacity=0.35 if noisy else 1,
                line={"color": colour, "width": 1 if noisy else 2},
                marker={"size": 5},
                error_y=_interval(frame, column),
                hovertemplate=f"step %{{x}}: %{{y:.3g}} {unit}{_spread(frame, column)}<extra>{name}</extra>",
                customdata=_bounds(frame, column),
                showlegend=in_legend and not noisy,
                **shown,
                **place,
            )
            if noisy:
                window = len(frame) // 20
                figure.add_scatter(
                    y=frame[column].rolling(window, center=True, min_periods=1).mean(),
                    mode="lines",
                    line={"color": colour, "width": 2.5},
                    hovertemplate=f"mean of {window} steps: %{{y:.3g}} {unit}<extra>{name}</extra>",
                    showlegend=in_legend,
                    **shown,
                    **place,
                )
            named.add(name)
        figure.update_yaxes(title_text=unit, **place)
        if unit.startswith("share"):
            figure.update_yaxes(tickformat=".0%", rangemode="tozero", **place)
        last = max(frame["step"].max() for frame, _, _ in series.values())
        figure.update_xaxes(title_text="step", dtick=1 if last <= 8 else None, **place)
    return figure.update_layout(
        template=TEMPLATE, height=60 + 260 * rows, legend={"y": 1.08}, margin={"t": 70, "b": 40}
    )


def _bounds(frame: pd.DataFrame, column: str) -> np.ndarray | None:
    """(rows, 2) low and high of a column's interval, or None where it has none."""
    names = [f"{column}_low", f"{column}_high"]
    return frame[names].to_numpy(float) if set(names) <= set(frame) else None


def _spread(frame: pd.DataFrame, column: str) -> str:
    """The part of a hover template that shows ``_bounds``."""
    return "" if _bounds(frame, column) is None else " (95%: %{customdata[0]:.3g} to %{customdata[1]:.3g})"


def _interval(frame: pd.DataFrame, column: str) -> dict[str, Any] | None:
    """Error bars from ``_bounds``."""
    bounds = _bounds(frame, column)
    if bounds is None:
        return None
    value = frame[column].to_numpy(float)
    return {
        "array": (bounds[:, 1] - value).clip(0),
        "arrayminus": (value - bounds[:, 0]).clip(0),
        "thickness": 1,
        "width": 3,
    }


def plot_evaluation_curve(runs: Mapping[str, pd.DataFrame], value: str = "accuracy") -> go.Figure:
    """Held-out accuracy against step, a bold line with a band for every entry of ``runs``.

    An entry is one run's ``Run.evaluations``, and the band its 95% interval over questions; or
    several such frames put together, told apart by a column ``seed``: then thin lines are the seeds, the
    bold line their mean, and the band goes from the lowest seed to the highest.
    """
    figure = go.Figure(layout={"template": TEMPLATE})
    for k, (name, frame) in enumerate(runs.items()):
        if value not in frame or not frame[value].notna().any():
            continue
        colour, label = PALETTE[k % len(PALETTE)], figure_text(name, 40, 2)
        frame = frame.dropna(subset=[value]).sort_values("step")
        seeds = list(frame.groupby("seed")) if "seed" in frame else []
        shared = {"legendgroup": name, "line": {"color": colour}}
        if len(seeds) > 1:
            by_step = frame.groupby("step")[value]
            mean, low, high = by_step.mean(), by_step.min(), by_step.max()
            band = "seeds"
            for seed, own in seeds:
                figure.add_scatter(
                    x=own["step"],
                    y=own[value],
                    mode="lines",
                    name=f"{label}, seed {figure_text(seed)}",
                    showlegend=False,
                    opacity=0.5,
                    customdata=_bounds(own, value),
                    hovertemplate=f"%{{y:.3f}}{_spread(own, value)}",
                    **(shared | {"line": {"color": colour, "width": 1}}),
                )
        else:
            mean = frame.set_index("step")[value]
            bounds = _bounds(frame, value)
            low, high = (mean, mean) if bounds is None else (bounds[:, 0], bounds[:, 1])
            band = "95%"
        low, high = np.asarray(low, float), np.asarray(high, float)
        figure.add_scatter(
            x=[*mean.index, *mean.index[::-1]],
            y=[*high, *low[::-1]],
            fill="toself",
            fillcolor=colour,
            opacity=0.15,
            mode="none",
            hoverinfo="skip",
            showlegend=False,
            legendgroup=name,
        )
        figure.add_scatter(
            x=mean.index,
            y=mean,
            mode="lines+markers",
            name=label,
            customdata=np.stack([low, high], axis=1),
            hovertemplate=f"%{{y:.3f}} ({band}: %{{customdata[0]:.3f}} to %{{customdata[1]:.3f}})",
            **(shared | {"line": {"color": colour, "width": 3}}),
        )
    figure.update_xaxes(title_text="training step", hoverformat="d")
    figure.update_yaxes(title_text="held-out accuracy (share of questions)", tickformat=".0%", rangemode="tozero")
    return figure.update_layout(height=420, hovermode="x unified")
