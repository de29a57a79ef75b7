"""Figures and the panel of the estimators: exact sums as lines, means of random draws as points."""

from __future__ import annotations

import html
import math
from typing import Any

import ipywidgets as widgets
import pandas as pd
import plotly.graph_objects as go
from IPython.display import HTML, display
from plotly.subplots import make_subplots

from ..types import ConfigError, did_you_mean
from ..views.html import html_row, html_table
from ..views.style import BOTH, GREY, PALETTE, POSTERIOR, PRIOR, SOURCE_COLOURS, TEMPLATE
from . import estimators
from .world import World

_KNOB_TITLES = {
    "distance": "distance between p and q (1: the world's own posterior)",
    "composite_weight": "composite weight w",
}
_DASHES = ("solid", "dash", "dot", "dashdot")
_SYMBOLS = ("circle", "square", "diamond", "x")


def _two_panels(**settings: Any) -> go.Figure:
    figure = make_subplots(cols=2, horizontal_spacing=0.11, **settings)
    return figure.update_layout(template=TEMPLATE, height=400, margin={"t": 70})


def _points(frame: pd.DataFrame, x: str, name: str, colour: str, symbol: str, **settings: Any) -> go.Scatter:
    """Means of draws with bars of two standard errors; nothing where the frame has no draws."""
    drawn = "mean" in frame
    return go.Scatter(
        x=frame[x] if drawn else [],
        y=frame["mean"] if drawn else [],
        error_y={"array": 2 * frame["standard_error"] if drawn else [], "thickness": 1.5, "width": 3},
        mode="markers",
        marker={"color": colour, "symbol": symbol, "size": 7},
        name=name,
        showlegend=False,
        **settings,
    )


def plot_kl_estimators(frame: pd.DataFrame) -> go.Figure:
    """``estimators.kl_sweep``: mean and standard deviation of one sample's KL estimate, in nats.

    Lines are exact, points are means of draws with two standard errors and their standard deviations.
    """
    x, figure = frame["over"].iloc[0], _two_panels()
    one = frame[frame["estimator"] == frame["estimator"].iloc[0]]
    figure.add_scatter(
        x=one[x],
        y=one["exact"],
        mode="lines",
        name="exact KL(p′‖p)",
        line={"color": GREY, "width": 3},
        row=1,
        col=1,
    )
    for k, (name, own) in enumerate(frame.groupby("estimator", sort=False)):
        colour, symbol = (PRIOR, POSTERIOR, PALETTE[3])[k % 3], _SYMBOLS[k % 4]
        # Three estimators of one number: side by side, or their points would hide one another.
        width = own[x].max() - own[x].min() or 1.0
        shifted = own.assign(**{x: own[x] + (k - 1) * width / 120})
        figure.add_trace(_points(shifted, x, name, colour, symbol, legendgroup=name), row=1, col=1)
        figure.add_scatter(
            x=own[x],
            y=own["deviation"],
            mode="lines",
            line={"color": colour, "dash": _DASHES[k % 4]},
            name=name,
            legendgroup=name,
            row=1,
            col=2,
        )
        if "sample_deviation" in own:
            figure.add_scatter(
                x=own[x],
                y=own["sample_deviation"],
                mode="markers",
                marker={"color": colour, "symbol": symbol, "size": 7},
                name=f"{name}, draws",
                legendgroup=name,
                showlegend=False,
                row=1,
                col=2,
            )
    figure.update_xaxes(title_text=_KNOB_TITLES[x])
    figure.update_yaxes(title_text="mean estimate (nats)", rangemode="tozero", col=1)
    figure.update_yaxes(title_text="standard deviation of one sample (nats)", rangemode="tozero", col=2)
    return figure.update_traces(hovertemplate="%{x:.2f}: %{y:.4f} nats")


def plot_gradient_quality(frame: pd.DataFrame) -> go.Figure:
    """``estimators.gradient_quality``: bias (% of the exact gradient's norm) and noise (multiples of it)."""
    figure = _two_panels(shared_yaxes=True)
    for k, (part, own) in enumerate(frame.groupby("part", sort=False)):
        for column, (value, factor, unit) in enumerate((("bias", 100, "%"), ("noise", 1, "×")), 1):
            figure.add_scatter(
                x=factor * own[value],
                y=own["estimator"],
                mode="markers",
                marker={"color": (POSTERIOR, PRIOR)[k % 2], "symbol": _SYMBOLS[k % 4], "size": 10},
                name=f"{part} ",
                legendgroup=part,
                showlegend=column == 1,
                cliponaxis=False,
                hovertemplate=f"%{{y}}: %{{x:.3g}} {unit}",
                row=1,
                col=column,
            )
    figure.update_yaxes(
        autorange="reversed",
        categoryorder="array",
        categoryarray=list(frame["estimator"]),
        type="category",
        ticklabelstandoff=8,
    )
    figure.update_xaxes(title_text="bias (% of the exact gradient)", rangemode="tozero", col=1)
    figure.update_xaxes(title_text="noise of one rollout (× exact gradient)", rangemode="tozero", col=2)
    return figure.update_layout(height=120 + 27 * len(frame))


def plot_ratio_range(frame: pd.DataFrame) -> go.Figure:
    """``estimators.ratio_range``: the ratios p'/h against alpha, and the share of tokens the clip touches."""
    figure, epsilon = _two_panels(), float(frame["clip_range"].iloc[0])
    bounds, world = {"color": GREY, "dash": "dash"}, {"color": PRIOR}
    for k, (column, name, line) in enumerate(
        (
            ("bound_low", "bounds w/α and (1−w)/(1−α)", bounds),
            ("bound_high", "bounds w/α and (1−w)/(1−α)", bounds),
            ("low", "least and largest here", world),
            ("high", "least and largest here", world),
        )
    ):
        figure.add_scatter(
            x=frame["alpha"],
            y=frame[column],
            mode="lines",
            line=line,
            name=name,
            legendgroup=name,
            showlegend=not k % 2,
            hovertemplate="α %{x:.2f}: %{y:.3f}",
            row=1,
            col=1,
        )
    figure.add_hrect(y0=1 - epsilon, y1=1 + epsilon, fillcolor=BOTH, opacity=0.15, line_width=0, row=1, col=1)
    figure.add_scatter(
        x=[None],
        y=[None],
        mode="markers",
        marker={"symbol": "square", "size": 12, "color": BOTH, "opacity": 0.35},
        name=f"inside the clip, 1 ± {epsilon:g}",
        row=1,
        col=1,
    )
    figure.add_scatter(
        x=frame["alpha"],
        y=frame["touched"],
        mode="lines",
        line={"color": POSTERIOR},
        name="touched by the clip",
        hovertemplate="α %{x:.2f}: %{y:.1%}",
        row=1,
        col=2,
    )
    points = _points(frame, "alpha", "draws", POSTERIOR, "circle", hovertemplate="α %{x:.2f}: %{y:.1%}")
    figure.add_trace(points, row=1, col=2)
    figure.update_xaxes(title_text="α, share of traces drawn from the prior", range=[0, 1])
    ticks = [0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 20, 50, 100]
    figure.update_yaxes(
        title_text="ratio p′/h (no unit, log scale)",
        type="log",
        tickvals=ticks,
        ticktext=[f"{t:g}" for t in ticks],
        col=1,
    )
    figure.update_yaxes(title_text="share of sampled tokens", tickformat=".0%", rangemode="tozero", col=2)
    return figure


def plot_responsibility(frame: pd.DataFrame) -> go.Figure:
    """``estimators.responsibilities``: mean rho of prior and posterior traces against the distance."""
    figure = go.Figure(layout={"template": TEMPLATE, "height": 400})
    weight = float(frame["composite_weight"].iloc[0])
    hover = "distance %{x:.2f}: ρ = %{y:.3f}"
    for k, (source, own) in enumerate(frame.groupby("source", sort=False)):
        colour = SOURCE_COLOURS[source]
        figure.add_scatter(
            x=own["distance"],
            y=own["expected"],
            mode="lines",
            line={"color": colour, "dash": _DASHES[k]},
            name=f"{source} traces",
            hovertemplate=hover,
        )
        figure.add_trace(_points(own, "distance", source, colour, _SYMBOLS[k], hovertemplate=hover))
    figure.add_scatter(
        x=[frame["distance"].min(), frame["distance"].max()],
        y=[weight, weight],
        mode="lines",
        line={"color": GREY, "dash": "dot"},
        name=f"w = {weight:g}, the mean under p′",
        hoverinfo="skip",
    )
    figure.update_xaxes(title_text=_KNOB_TITLES["distance"])
    return figure.update_yaxes(title_text="ρ, share of the gradient reaching the prior", range=[0, 1])


# --- the panel

# name -> (label, least, largest, step)
_SLIDERS = {
    "alpha": ("α", 0.05, 0.95, 0.05),
    "composite_weight": ("w", 0.05, 1.0, 0.05),
    "distance": ("distance", 0.0, 4.0, 0.1),
    "temperature": ("temperature", 0.25, 3.0, 0.05),
}
_DEPENDS = {
    "kl": ("composite_weight", "distance", "temperature"),
    "gradient": ("alpha", "composite_weight", "distance", "temperature"),
    "ratio": ("alpha", "composite_weight", "distance", "temperature"),
    "responsibility": ("composite_weight", "distance", "temperature"),
}
# column of the frame -> heading with unit, factor
_COLUMNS: dict[str, dict[str, tuple[str, float]]] = {
    "kl": {
        "estimator": ("estimator", 1),
        "exact": ("exact KL, nats", 1),
        "mean": ("mean of draws, nats", 1),
        "standard_error": ("its standard error, nats", 1),
        "deviation": ("deviation of one sample, nats", 1),
        "lowest": ("least value, nats", 1),
    },
    "gradient": {
        "part": ("gradient of", 1),
        "estimator": ("estimator", 1),
        "bias": ("bias, % of exact", 100),
        "noise": ("noise of one rollout, × exact", 1),
    },
    "ratio": {
        "bound_low": ("lower bound of p′/h", 1),
        "low": ("least here", 1),
        "high": ("largest here", 1),
        "bound_high": ("upper bound of p′/h", 1),
        "touched": ("touched by the clip, %", 100),
        "touched_positive": ("of A > 0, %", 100),
        "touched_negative": ("of A < 0, %", 100),
    },
    "responsibility": {
        "source": ("traces from", 1),
        "expected": ("mean ρ", 1),
        "lowest": ("least ρ of a token", 1),
        "highest": ("largest ρ of a token", 1),
    },
}


def _cell(value: Any, factor: float) -> str:
    if not isinstance(value, float):
        return html.escape(str(value))
    if math.isnan(value):
        return "–"
    if math.isinf(value):
        return "∞"
    return f"{value * factor + 0.0:.4f}".replace("-0.0000", "0.0000").replace("-", "−")


class EstimatorPanel:
    """Sliders and the key numbers of one section: "kl", "gradient", "ratio" or "responsibility".

    ``sliders`` maps a setting's name to its slider, ``frame`` holds the present numbers (units as in the
    functions of ``estimators``), ``table`` is the widget that shows them from the first move on.
    ``world`` is the world at distance 1 and temperature 1.
    """

    def __init__(
        self,
        section: str,
        world: World,
        *,
        alpha: float = 0.5,
        composite_weight: float = 0.5,
        distance: float = 1.0,
        temperature: float = 1.0,
        clip_range: float = 0.3,
        samples: int = 1000,
        seed: int = 0,
    ):
        if section not in _DEPENDS:
            raise ConfigError(f"unknown section {section!r}{did_you_mean(section, _DEPENDS)}")
        self.section, self.world = section, world
        self.clip_range, self.samples, self.seed = clip_range, samples, seed
        given = {
            "alpha": alpha,
            "composite_weight": composite_weight,
            "distance": distance,
            "temperature": temperature,
        }
        self.sliders = {}
        for name in _DEPENDS[section]:
            label, low, high, step = _SLIDERS[name]
            self.sliders[name] = widgets.FloatSlider(
                value=given[name],
                min=min(low, given[name]),
                max=max(high, given[name]),
                step=step,
                description=label,
                continuous_update=section != "gradient",  # a quarter of a second each
                style={"description_width": "90px"},
            )
        self.table = widgets.HTML()
        self.widget = widgets.VBox([*self.sliders.values(), self.table])
        for slider in self.sliders.values():
            slider.observe(self._update, names="value")
        self.frame = self.compute()

    def compute(self) -> pd.DataFrame:
        """The numbers at the sliders' present values."""
        at = {name: slider.value for name, slider in self.sliders.items()}
        world = self.world.between(at["distance"], at["temperature"])
        weight = at["composite_weight"]
        if self.section == "kl":
            return estimators.kl_estimators(world, weight, self.samples, self.seed)
        if self.section == "gradient":
            return estimators.gradient_quality(world, at["alpha"], weight, self.clip_range)
        if self.section == "ratio":
            return estimators.ratio_range(world, [at["alpha"]], weight, self.clip_range)
        return estimators.responsibilities(self.world, [at["distance"]], weight, at["temperature"])

    def html(self) -> str:
        """The table as plain HTML."""
        columns = {name: c for name, c in _COLUMNS[self.section].items() if name in self.frame}
        rows = [
            html_row([_cell(row[name], factor) for name, (_, factor) in columns.items()])
            for row in self.frame.to_dict("records")
        ]
        return html_table([heading for heading, _ in columns.values()], rows)

    def _update(self, change: Any = None) -> None:
        self.frame = self.compute()
        self.table.value = self._titled("now")

    def _titled(self, when: str) -> str:
        settings = ", ".join(f"{slider.description} {slider.value:g}" for slider in self.sliders.values())
        return f"<p>{when}: {settings}</p>{self.html()}"

    def _ipython_display_(self) -> None:
        """The table as it stands, which needs no kernel; below it the sliders with a table of their own."""
        display(HTML(self._titled("numbers at")))
        display(self.widget)
