"""Comparisons of runs as figures and as text: what ``runs.compare`` finds, for readers."""

import html
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pandas as pd
import plotly.graph_objects as go
from plotly.subplots import make_subplots

from ..runs.compare import over_seeds
from .html import figure_text, html_number, visible
from .style import GREY, PALETTE, POSTERIOR, PRIOR, TEMPLATE, add_line, error_bars


def readable(table: pd.DataFrame) -> pd.DataFrame:
    """The same table as text: ``42.2% (36.0% to 48.3%)``, with a sign where it is a difference."""
    shown = pd.DataFrame(index=table.index)
    sign = "+" if "difference" in table else ""
    for column in table:
        if column.endswith(("low", "high")):
            continue
        if column in ("iqm", "mean", "difference", "probability"):
            shown[column] = [
                f"{value:{sign}.1%}" + (f" ({low:{sign}.1%} to {high:{sign}.1%})" if low == low else " (–)")
                for value, low, high in zip(table[column], *_ends(table, column), strict=True)
            ]
        elif column == "by_seed":
            shown[column] = [", ".join(f"{x:+.1%}" for x in values) for values in table[column]]
        elif column in ("lowest", "highest"):
            shown[column] = [f"{x:.1%}" for x in table[column]]
        elif column == "trace_use":
            shown["trace use, nats"] = [html_number(x, ".1f") for x in table[column]]
        else:
            shown[column] = table[column].astype(str)
    return shown


def _ends(table: pd.DataFrame, column: str) -> tuple[pd.Series, pd.Series]:
    """The low and the high end of a column's interval."""
    prefix = f"{column}_" if f"{column}_low" in table else ""
    return table[f"{prefix}low"], table[f"{prefix}high"]


def to_markdown(table: pd.DataFrame) -> str:
    """A Markdown table of ``readable(table)``; what settings or folders are called cannot break it."""
    shown = readable(table)

    def line(cells) -> str:
        texts = (html.escape(visible(str(c)), quote=False).replace("|", "\\|") for c in cells)
        return "| " + " | ".join(texts) + " |\n"

    return line(shown.columns) + "|---" * shown.shape[1] + "|\n" + "".join(map(line, shown.to_numpy()))


def export(table: pd.DataFrame, folder: str | Path, name: str) -> list[Path]:
    """Write ``folder/name.csv`` (numbers as they are) and ``folder/name.md`` (to be read); their paths."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    paths = [folder / f"{name}.csv", folder / f"{name}.md"]
    table.to_csv(paths[0], index=False)
    paths[1].write_text(to_markdown(table), encoding="utf-8")
    return paths


# column that plot_intervals draws -> (title of the axis, format, what the ticks are, value without an effect)
_INTERVALS = {
    "iqm": ("held-out accuracy, interquartile mean", ".1%", "lowest and highest run", None),
    "mean": ("held-out accuracy, mean", ".1%", "lowest and highest run", None),
    "difference": ("difference in held-out accuracy (share of questions)", "+.1%", "a seed", 0.0),
    "probability": ("probability that a run of the first beats a run of the second", ".1%", "", 0.5),
}


def plot_intervals(table: pd.DataFrame, value: str) -> go.Figure:
    """A row of ``table`` each, first on top: ``value`` as a point with its interval.

    table is that of ``performance`` ("iqm", "mean"; ticks are the lowest and the highest run),
    ``paired_differences`` ("difference"; ticks are seeds) or ``probability_of_improvement`` ("probability").
    """
    title, form, ticks, neutral = _INTERVALS[value]
    names = table["method"]
    for other, joint in (("minus", " − "), ("against", " over ")):
        names = names + joint + table[other] if other in table else names
    if "task" in table and table["task"].nunique() > 1:
        names = names + ", " + table["task"]
    places, (low, high) = list(range(len(table))), _ends(table, value)
    figure = go.Figure(layout={"template": TEMPLATE})
    if ticks:
        each = table["by_seed"] if value == "difference" else table[["lowest", "highest"]].to_numpy()
        runs = pd.Series(list(each)).explode()
        figure.add_scatter(
            x=runs,
            y=runs.index,
            mode="markers",
            name=ticks,
            marker={"symbol": "line-ns", "size": 14, "line": {"color": POSTERIOR, "width": 2}},
            hovertemplate=f"{ticks}: %{{x:{form}}}<extra></extra>",
        )
    figure.add_scatter(
        x=table[value],
        y=places,
        mode="markers",
        name="all, with interval",
        marker={"color": PRIOR, "size": 9},
        error_x=error_bars(table[value], low, high),
        customdata=np.stack([low, high], axis=1),
        hovertemplate=f"%{{x:{form}}} (%{{customdata[0]:{form}}} to %{{customdata[1]:{form}}})<extra></extra>",
        showlegend=bool(ticks),
    )
    if neutral is not None:
        figure.add_vline(x=neutral, line={"color": GREY, "dash": "dot", "width": 1})
    ends = [0, 1] if value == "probability" else None
    figure.update_xaxes(title_text=title, tickformat=form.replace(".1", ".0"), rangemode="tozero", range=ends)
    figure.update_yaxes(
        tickvals=places,
        ticktext=[figure_text(name, 44, 3) for name in names],
        range=[max(1, len(places)) - 0.5, -0.5],
        zeroline=False,
        showgrid=False,
        ticklabelstandoff=6,
    )
    return figure.update_layout(height=(110 if ticks else 80) + 44 * len(places), margin={"t": 40 if ticks else 10})


def plot_against_alpha(frame: pd.DataFrame) -> go.Figure:
    """Held-out accuracy, and reward by source, against alpha: points are runs, bars 95% over seeds.

    frame: from ``sweep_results``. Unfinished runs count with what they have measured so far. The lines of a
    plot are shifted a little, so that no interval hides another.
    """
    titles = ["Held-out accuracy", "Reward, last fifth (open, dotted: posterior)"]
    figure = make_subplots(cols=2, horizontal_spacing=0.12, subplot_titles=titles)
    methods = sorted(set(frame["method"]))
    room = min([0.06, *0.4 * np.diff(np.unique(frame["alpha"].astype(float)))])  # left and right of an alpha
    shifts = np.linspace(-room, room, len(methods) + 2)[1:-1]
    halves = np.linspace(-room, room, 2 * len(methods) + 2)[1:-1].reshape(-1, 2)
    for k, method in enumerate(methods):
        own, colour = frame[frame["method"] == method], PALETTE[k % len(PALETTE)]
        _means(figure, 1, own, "accuracy", method, colour, shifts[k])
        _means(figure, 2, own, "reward_prior", f"{method}, prior traces", colour, halves[k][0])
        _means(figure, 2, own, "reward_posterior", f"{method}, posterior traces", colour, halves[k][1])
    figure.update_xaxes(title_text="mixing ratio α: share of traces from the prior", range=[-0.06, 1.06])
    unknown = frame["accuracy"].isna().all()
    share = {"tickformat": ".0%", "rangemode": "tozero", "range": [0, 1] if unknown else None}
    figure.update_yaxes(title_text="no evaluation yet" if unknown else "share of questions", **share, col=1)
    figure.update_yaxes(title_text="the method's reward", col=2)
    return figure.update_layout(template=TEMPLATE, height=380, legend={"y": 1.12}, margin={"t": 90})


def _means(
    figure: go.Figure, column: int, frame: pd.DataFrame, value: str, name: str, colour: str, shift: float
) -> None:
    """Add the runs as faint points, and the means with their intervals as a line, ``shift`` beside alpha."""
    known, means = frame.dropna(subset=[value]), over_seeds(frame, value)
    if known.empty:
        return
    hollow = value == "reward_posterior"
    symbol = "-open" if hollow else ""
    figure.add_scatter(
        x=known["alpha"] + shift,
        y=known[value],
        mode="markers",
        opacity=0.45,
        marker={"color": colour, "size": 6, "symbol": f"circle{symbol}"},
        customdata=known[["id", "seed"]],
        hovertemplate="run %{customdata[0]}, seed %{customdata[1]}: %{y:.3g}<extra></extra>",
        legendgroup=name,
        showlegend=False,
        row=1,
        col=column,
    )
    add_line(
        figure,
        means["alpha"] + shift,
        means["mean"],
        name,
        colour,
        line_dash="dot" if hollow else "solid",
        marker={"size": 9, "symbol": f"diamond{symbol}"},
        error_y=error_bars(means["mean"], means["low"], means["high"]),
        customdata=means[["alpha", "runs", "low", "high"]],
        showlegend=column == 1 or bool(frame["accuracy"].isna().all()),  # the other panel has the same colours
        hovertemplate="α %{customdata[0]:g}: %{y:.3g} (95%: %{customdata[2]:.3g} to %{customdata[3]:.3g}, "
        "%{customdata[1]} runs)",
        row=1,
        col=column,
    )


def plot_value_by_use(values: Mapping[str, pd.DataFrame]) -> go.Figure:
    """What each bound gains by reasoning, in nats over its value without any trace; a panel for every entry.

    values: tables of ``runs.reweight.value_by_use``. A line that falls is a bound that prefers not to reason.
    """
    figure = make_subplots(cols=len(values), subplot_titles=[figure_text(name, 40, 2) for name in values])
    names = {"published": ("one trace in the logarithm (published)", POSTERIOR), "group": ("group bound", PRIOR)}
    for column, table in enumerate(values.values(), start=1):
        for bound, (name, colour) in names.items():
            gain = table[bound] - table[bound].iloc[0]
            look = {"mode": "lines", "showlegend": column == 1, "row": 1, "col": column}
            add_line(figure, table["share"], gain, name, colour, hovertemplate="%{y:+.2f} nats", **look)
        figure.add_hline(y=0, line={"color": GREY, "dash": "dot", "width": 1}, row=1, col=column)
    figure.update_xaxes(title_text="share of traces that are used", tickformat=".0%")
    figure.update_yaxes(title_text="bound, nats over no reasoning", col=1)
    return figure.update_layout(
        template=TEMPLATE, height=340, hovermode="x unified", margin={"t": 90}, legend={"y": 1.12}
    )
