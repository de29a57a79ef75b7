"""Plotly figures of a run: training curves, held-out accuracy, log-probabilities of answers.

Frames come from a run folder (``Run``) or from ``trace_frame``. Text that a model or a data set wrote is
made visible and escaped wherever it enters hover text or tick labels. Backgrounds are transparent and lines
mid-grey, so that figures fit light and dark themes.
"""

from collections.abc import Mapping
from typing import Any

import numpy as np
import pandas as pd
import plotly.graph_objects as go
from plotly.subplots import make_subplots

from ..runs.reweight import answer_logprob
from .html import figure_text, verdict
from .style import BOTH, PALETTE, PRIOR, SOURCE_COLOURS, TEMPLATE, add_line, error_bars


def plot_answer_logprobs(frame: pd.DataFrame, questions: int = 8) -> go.Figure:
    """log p(y|x,z) in nats of prior against posterior traces, one row for each of the first questions.

    A point is a trace (hollow: unfinished, cross: the model's own answer after it is wrong), a bar the mean of a
    question's traces from one source.
    """
    row = frame.groupby("example_id", sort=False).ngroup()
    crossed = frame.get("right", pd.Series(None, frame.index, object)).eq(False)
    frame = frame.assign(total=answer_logprob(frame), row=row, crossed=crossed)[row < questions]
    figure = go.Figure(layout={"template": TEMPLATE})

    def said(trace: Any) -> str:
        found = verdict(getattr(trace, "right", None))
        return found and f"<br>{found}: it answered {figure_text(getattr(trace, 'prediction', None) or '', 40, 2)}"

    for source, colour in SOURCE_COLOURS.items():
        own = frame[frame["source"] == source]
        if own.empty:
            continue
        offset, same = (-0.17 if source == "prior" else 0.17), own.groupby("row")["total"]
        stagger = 0.2 * (same.cumcount() + 1) / (same.transform("size") + 1) - 0.1  # equal traces stay apart
        shown = own.assign(place=own["row"] + offset + stagger)
        # Circles first: the legend shows the first point's symbol.
        shown = shown.sort_values(["crossed", "finished"], ascending=[True, False], kind="stable")
        symbols = shown["crossed"].map({True: "x", False: "circle"}) + np.where(shown["finished"], "", "-open")
        figure.add_scatter(
            x=shown["total"],
            y=shown["place"],
            mode="markers",
            name=source,
            legendgroup=source,
            marker={"color": colour, "size": 9, "opacity": 0.8, "symbol": symbols},
            customdata=[
                [figure_text(t.trace), np.exp(t.total), said(t) + "<br>unfinished" * (not t.finished)]
                for t in shown.itertuples()
            ],
            hovertemplate="%{customdata[0]}<br>log p(y|x,z) = %{x:.2f} nats, p = %{customdata[1]:.2g}"
            f"%{{customdata[2]}}<extra>{source}</extra>",
        )
        figure.add_scatter(
            x=same.mean(),
            y=same.mean().index + offset,
            mode="markers",
            name=f"mean, {source}",
            legendgroup=source,
            showlegend=False,
            marker={"symbol": "line-ns", "size": 20, "line": {"color": colour, "width": 3}},
            hovertemplate=f"mean of {source} traces: %{{x:.2f}} nats<extra></extra>",
        )
    first = frame.drop_duplicates("row")
    labels = [
        f"{figure_text(question, 40, 3)}<br>y = {figure_text(answer, 40, 2)}"
        for question, answer in zip(first["question"], first["answer"], strict=True)
    ]
    figure.update_xaxes(title_text="log p(y | x, z), nats (right: the reference answer is more probable)")
    figure.update_yaxes(tickvals=first["row"], ticktext=labels, range=[len(first) - 0.5, -0.5], zeroline=False)
    title = f"A point is a trace (hollow: unfinished{', cross: wrong' * bool(frame['crossed'].any())}), a bar the mean"
    return figure.update_layout(title_text=title, height=150 + 80 * max(1, len(first)))


def plot_training_curves(
    metrics: pd.DataFrame, evaluations: pd.DataFrame | None = None, reward_unit: str = "the method's reward"
) -> go.Figure:
    """Small multiples over a run's steps: what rises when it learns, and what else might make it rise.

    metrics and evaluations are ``Run.metrics`` and ``Run.evaluations``, reward_unit is ``reward_unit(run.config)``;
    a quantity that the method does not have (KL without a posterior) gets no panel. The bars on accuracy are 95%
    intervals, those of ``evaluation.summarise``. Trace use is how far log p(y|x,z) moves with another question's trace.
    From 60 steps on, each step is a faint line and the bold one a centred mean over a twentieth of the run.
    """
    colours = SOURCE_COLOURS | {"all traces": BOTH, "held-out questions": PRIOR}
    curves = [  # panel, unit, column, name
        ("Reward by source", reward_unit, "reward_prior", "prior"),
        ("Reward by source", reward_unit, "reward_posterior", "posterior"),
        ("Right traces", "share", "right_prior", "prior"),
        ("Right traces", "share", "right_posterior", "posterior"),
        ("KL(p′‖p)", "nats a token", "kl", "all traces"),
        ("Trace length", "tokens", "trace_tokens_prior", "prior"),
        ("Trace length", "tokens", "trace_tokens_posterior", "posterior"),
        ("Finished traces", "share", "finished_share", "all traces"),
        ("Held-out accuracy", "share of questions", "accuracy", "held-out questions"),
        ("Trace use", "nats", "trace_dependence", "held-out questions"),
        ("Gradient norm", "L2 norm before clipping", "gradient_norm", "all traces"),
    ]
    drawn = []
    for panel, unit, column, name in curves:
        evaluated = name == "held-out questions" and evaluations is not None and len(evaluations)
        frame = evaluations if evaluated else metrics
        if column in frame and frame[column].notna().any():
            drawn.append((panel, unit, column, name, frame.dropna(subset=[column])))
    if not drawn:
        return go.Figure(layout={"template": TEMPLATE, "title": {"text": "no finished step yet"}})

    panels = list(dict.fromkeys(panel for panel, *_ in drawn))
    columns = min(3, len(panels))
    rows = -(-len(panels) // columns)
    gaps = {"horizontal_spacing": 0.09, "vertical_spacing": 0.2 if rows > 1 else 0}
    figure = make_subplots(rows, columns, subplot_titles=panels, **gaps)
    named = set()
    for panel, unit, column, name, frame in drawn:
        row, col = divmod(panels.index(panel), columns)
        place = {"row": row + 1, "col": col + 1}
        noisy, window, colour = len(frame) > 60, len(frame) // 20, colours[name]
        in_legend = name in SOURCE_COLOURS and name not in named
        named.add(name)
        bounds, spread = _bounds(frame, column)
        look = {"mode": "lines", "opacity": 0.35, "width": 1} if noisy else {"marker": {"size": 5}}
        add_line(
            figure,
            frame["step"],
            frame[column],
            name,
            colour,
            error_y=None if bounds is None else error_bars(frame[column], *bounds.T),
            hovertemplate=f"step %{{x}}: %{{y:.3g}} {unit}{spread}<extra>{name}</extra>",
            customdata=bounds,
            showlegend=in_legend and not noisy,
            **look,
            **place,
        )
        if noisy:
            mean = frame[column].rolling(window, center=True, min_periods=1).mean()
            hover = f"mean of {window} points: %{{y:.3g}} {unit}<extra>{name}</extra>"
            look = {"mode": "lines", "hovertemplate": hover, "showlegend": in_legend}
            add_line(figure, frame["step"], mean, name, colour, 2.5, **look, **place)
        share = {"tickformat": ".0%", "rangemode": "tozero"} if unit.startswith("share") else {}
        figure.update_yaxes(title_text=unit, **share, **place)
        figure.update_xaxes(title_text="step", dtick=1 if frame["step"].max() <= 8 else None, **place)
    look = {"height": 60 + 260 * rows, "legend": {"y": 1.08}, "margin": {"t": 70, "b": 40}}
    return figure.update_layout(template=TEMPLATE, **look)


def _bounds(frame: pd.DataFrame, column: str) -> tuple[np.ndarray | None, str]:
    """(rows, 2) low and high of a column's interval, and how hover text shows them; None, "" without one."""
    names = [f"{column}_low", f"{column}_high"]
    if not set(names) <= set(frame):
        return None, ""
    return frame[names].to_numpy(float), " (95%: %{customdata[0]:.3g} to %{customdata[1]:.3g})"


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
        mean, (bounds, _), band = frame.set_index("step")[value], _bounds(frame, value), "95%"
        if "seed" in frame and frame["seed"].nunique() > 1:
            by_step = frame.groupby("step")[value]
            mean, bounds, band = by_step.mean(), by_step.agg(["min", "max"]).to_numpy(float), "seeds"
            for seed, own in frame.groupby("seed"):
                known, spread = _bounds(own, value)
                look = {"mode": "lines", "opacity": 0.5, "showlegend": False, "legendgroup": label}
                look |= {"customdata": known, "hovertemplate": f"%{{y:.3f}}{spread}"}
                add_line(figure, own["step"], own[value], f"{label}, seed {figure_text(seed)}", colour, 1, **look)
        elif bounds is None:
            bounds = np.stack([mean, mean], axis=1)
        figure.add_scatter(
            x=[*mean.index, *mean.index[::-1]],
            y=[*bounds[:, 1], *bounds[::-1, 0]],
            fill="toself",
            fillcolor=colour,
            opacity=0.15,
            mode="none",
            hoverinfo="skip",
            showlegend=False,
            legendgroup=label,
        )
        hover = f"%{{y:.3f}} ({band}: %{{customdata[0]:.3f}} to %{{customdata[1]:.3f}})"
        add_line(figure, mean.index, mean, label, colour, 3, customdata=bounds, hovertemplate=hover)
    if not figure.data:  # else the axes would go to 400%
        figure.update_layout(title_text="no evaluation yet", yaxis_range=[0, 1])
    figure.update_xaxes(title_text="training step", hoverformat="d")
    figure.update_yaxes(title_text="held-out accuracy (share of questions)", tickformat=".0%", rangemode="tozero")
    return figure.update_layout(height=420, hovermode="x unified")
