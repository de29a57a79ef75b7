"""Figures and the panel of the estimators: exact sums as lines, means of random draws as points."""

from typing import Any

import ipywidgets as widgets
import numpy as np
import pandas as pd
import plotly.graph_objects as go
from IPython.display import HTML
from plotly.subplots import make_subplots

from ..types import ConfigError, did_you_mean
from ..views.html import helped, html_number, html_table, html_text
from ..views.style import BOTH, GREY, PALETTE, POSTERIOR, PRIOR, SOURCE_COLOURS, TEMPLATE, add_line
from ..views.widgets import Panel, Plot, field, in_turn, row
from . import estimators
from .world import World

_KNOB_TITLES = {
    "distance": "distance between p and q<br>(1: the world's own posterior)",
    "composite_weight": "composite weight w",
}
_LOOKS = [  # colour, dash of lines, symbol of points: one for each of several curves
    (PRIOR, "solid", "circle"),
    (POSTERIOR, "dash", "square"),
    (PALETTE[3], "dot", "diamond"),
]


def _panels(columns: int, **settings: Any) -> go.Figure:
    figure = make_subplots(cols=columns, horizontal_spacing=0.11, **settings)
    return figure.update_layout(template=TEMPLATE, height=400, margin={"t": 70})


def _line(figure: go.Figure, col: int, x: Any, y: Any, name: str, colour: str, dash: str, **settings: Any) -> None:
    line = {"color": colour, "dash": dash}
    figure.add_scatter(x=x, y=y, mode="lines", name=name, legendgroup=name, line=line, row=1, col=col, **settings)


def _points(
    figure: go.Figure, col: int, x: Any, frame: pd.DataFrame, name: str, colour: str, symbol: str, value: str = "mean"
) -> None:
    """``value`` of the draws, a mean with bars of two standard errors; nothing where the frame has no draws."""
    if value in frame:
        bars = {"array": 2 * frame["standard_error"], "thickness": 1.5, "width": 3}
        figure.add_scatter(
            x=x,
            y=frame[value],
            error_y=bars if value == "mean" else None,
            mode="markers",
            marker={"color": colour, "symbol": symbol, "size": 7},
            name=f"{name}, draws",
            legendgroup=name,
            showlegend=False,
            row=1,
            col=col,
        )


def plot_kl_estimators(frame: pd.DataFrame) -> go.Figure:
    """``estimators.kl_sweep``: mean and standard deviation of one sample's KL estimate, in nats.

    Lines are exact, points are means of draws with two standard errors and their standard deviations.
    """
    x, figure = frame["over"].iloc[0], _panels(2)
    exact = frame.drop_duplicates(x)
    _line(figure, 1, exact[x], exact["exact"], "exact KL(p′‖p)", GREY, "solid", line_width=3)
    width = exact[x].max() - exact[x].min() or 1.0
    for k, (name, own) in enumerate(frame.groupby("estimator", sort=False)):
        colour, dash, symbol = _LOOKS[k]
        # Three estimators of one number: side by side, or their points would hide one another.
        _points(figure, 1, own[x] + (k - 1) * width / 120, own, name, colour, symbol)
        _line(figure, 2, own[x], own["deviation"], name, colour, dash)
        _points(figure, 2, own[x], own, name, colour, symbol, "sample_deviation")
    figure.update_xaxes(title_text=_KNOB_TITLES[x])
    figure.update_yaxes(title_text="mean estimate (nats)", rangemode="tozero", col=1)
    figure.update_yaxes(title_text="standard deviation of one sample (nats)", rangemode="tozero", col=2)
    return figure.update_traces(hovertemplate="%{x:.2f}: %{y:.4f} nats")


def plot_gradient_quality(frame: pd.DataFrame) -> go.Figure:
    """``estimators.gradient_quality``: bias (% of the exact gradient's norm) and noise (multiples of it)."""
    figure = _panels(2, shared_yaxes=True)
    parts = frame.groupby("part", sort=False)
    for (part, own), (colour, _, symbol) in zip(parts, (_LOOKS[1], _LOOKS[0]), strict=False):
        for col, (value, factor, unit) in enumerate((("bias", 100, "%"), ("noise", 1, "×")), 1):
            figure.add_scatter(
                x=factor * own[value],
                y=own["estimator"],
                mode="markers",
                marker={"color": colour, "symbol": symbol, "size": 10},
                name=f"{part} ",
                legendgroup=part,
                showlegend=col == 1,
                cliponaxis=False,
                hovertemplate=f"%{{y}}: %{{x:.3g}} {unit}",
                row=1,
                col=col,
            )
    order = {"categoryorder": "array", "categoryarray": list(frame["estimator"])}
    figure.update_yaxes(type="category", autorange="reversed", ticklabelstandoff=8, **order)
    figure.update_xaxes(title_text="bias (% of the exact gradient)", rangemode="tozero", col=1)
    figure.update_xaxes(title_text="noise of one rollout (× exact gradient)", rangemode="tozero", col=2)
    return figure.update_layout(height=120 + 27 * len(frame))


def plot_ratio_range(frame: pd.DataFrame) -> go.Figure:
    """``estimators.ratio_range``: the ratios p'/h against alpha, and the share of tokens the clip touches."""
    figure, alpha, epsilon = _panels(2), frame["alpha"], float(frame["clip_range"].iloc[0])
    for low, high, name, colour, dash in (
        ("bound_low", "bound_high", "bounds w/α and (1−w)/(1−α)", GREY, "dash"),
        ("low", "high", "least and largest here", PRIOR, "solid"),
    ):
        _line(figure, 1, alpha, frame[low], name, colour, dash)
        _line(figure, 1, alpha, frame[high], name, colour, dash, showlegend=False)
    figure.add_hrect(y0=1 - epsilon, y1=1 + epsilon, fillcolor=BOTH, opacity=0.15, line_width=0, row=1, col=1)
    square = {"symbol": "square", "size": 12, "color": BOTH, "opacity": 0.35}
    figure.add_scatter(x=[None], y=[None], mode="markers", marker=square, name=f"inside the clip, 1 ± {epsilon:g}")
    _line(figure, 2, alpha, frame["touched"], "touched by the clip", POSTERIOR, "solid")
    _points(figure, 2, alpha, frame, "touched by the clip", POSTERIOR, "circle")
    figure.update_xaxes(title_text="α, share of traces drawn from the prior", range=[0, 1])
    ticks = [0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 20, 50, 100]
    scale = {"type": "log", "tickvals": ticks, "ticktext": [f"{t:g}" for t in ticks]}
    figure.update_yaxes(title_text="ratio p′/h (no unit, log scale)", **scale, col=1)
    figure.update_yaxes(title_text="share of sampled tokens", tickformat=".0%", rangemode="tozero", col=2)
    figure.update_traces(hovertemplate="α %{x:.2f}: %{y:.3f}", col=1)
    return figure.update_traces(hovertemplate="α %{x:.2f}: %{y:.1%}", col=2)


def plot_responsibility(frame: pd.DataFrame) -> go.Figure:
    """``estimators.responsibilities``: mean rho of prior and posterior traces against the distance."""
    figure, weight = _panels(1), float(frame["composite_weight"].iloc[0])
    for (source, own), (_, dash, symbol) in zip(frame.groupby("source", sort=False), _LOOKS, strict=False):
        colour, name = SOURCE_COLOURS[source], f"{source} traces"
        _line(figure, 1, own["distance"], own["expected"], name, colour, dash)
        _points(figure, 1, own["distance"], own, name, colour, symbol)
    ends = [frame["distance"].min(), frame["distance"].max()]
    _line(figure, 1, ends, [weight] * 2, f"w = {weight:g}, the mean under p′", GREY, "dot", hoverinfo="skip")
    figure.update_xaxes(title_text=_KNOB_TITLES["distance"])
    figure.update_yaxes(title_text="ρ, share of the gradient reaching the prior", range=[0, 1])
    return figure.update_traces(hovertemplate="distance %{x:.2f}: ρ = %{y:.3f}")


def plot_group_splits(frame: pd.DataFrame) -> go.Figure:
    """``estimators.group_splits`` of worlds ``World.of_reasoning``, whose arguments are two more columns."""
    parts = list(frame.groupby("posterior", sort=False))
    titles = [f"q ∝ p(z|x) p(y|x,z)<sup>{posterior:g}</sup>" for posterior, _ in parts]
    figure = _panels(len(parts), shared_yaxes=True, subplot_titles=titles)
    for col, (_, part) in enumerate(parts, 1):
        for (right, own), colour in zip(part.groupby("right", sort=False), PALETTE, strict=False):
            x, y, shown = own["alpha"], own["noise"], col == 1
            add_line(figure, x, y, f"{right:.0%}", colour, showlegend=shown, row=1, col=col)
    ticks = [0.2, 0.3, 0.5, 1, 2, 3, 5, 10]
    figure.update_yaxes(type="log", tickvals=ticks, ticktext=[f"{t:g}" for t in ticks])
    figure.update_yaxes(title_text="noise of a group (× its expected gradient)", col=1)
    figure.update_xaxes(title_text="α, share of traces drawn from the prior", tickformat=".2f")
    figure.update_layout(legend_title_text="prior traces that are right:", legend_y=1.15, height=430)
    return figure.update_traces(hovertemplate="α %{x:.2f}: %{y:.2f}×")


# --- the panel

# name -> (label, least, largest, step)
_SLIDERS = {
    "alpha": ("α", 0.05, 0.95, 0.05),
    "composite_weight": ("w", 0.05, 1.0, 0.05),
    "distance": ("distance", 0.0, 4.0, 0.1),
    "temperature": ("temperature", 0.25, 3.0, 0.05),
}
# section -> column of its frame -> (heading, format)
_COLUMNS = {
    "kl": {
        "estimator": ("estimator", ""),
        "exact": ("exact KL, nats", "z.4f"),
        "mean": ("mean of draws, nats", "z.4f"),
        "standard_error": ("its standard error, nats", "z.4f"),
        "deviation": ("deviation of one sample, nats", "z.4f"),
        "lowest": ("least value, nats", "z.4f"),
    },
    "gradient": {
        "part": ("gradient of", ""),
        "estimator": ("estimator", ""),
        "bias": ("bias, share of exact", "z.4%"),
        "noise": ("noise of one rollout, × exact", "z.4f"),
    },
    "ratio": {
        "bound_low": ("lower bound of p′/h", "z.4f"),
        "low": ("least here", "z.4f"),
        "high": ("largest here", "z.4f"),
        "bound_high": ("upper bound of p′/h", "z.4f"),
        "touched": ("touched by the clip", "z.4%"),
        "touched_positive": ("of A > 0", "z.4%"),
        "touched_negative": ("of A < 0", "z.4%"),
    },
    "responsibility": {
        "source": ("traces from", ""),
        "expected": ("mean ρ", "z.4f"),
        "lowest": ("least ρ of a token", "z.4f"),
        "highest": ("largest ρ of a token", "z.4f"),
    },
}


class EstimatorPanel(Panel):
    """Sliders with the figure and the key numbers of one section: "kl", "gradient", "ratio" or "responsibility".

    ``sliders`` maps a setting's name to its slider. ``frame`` holds the numbers there (units as in the functions of
    ``estimators``), ``table`` shows them and ``plot`` draws what lies around them; with "kl", ``over`` says along which
    setting. ``world`` is the world at distance 1 and temperature 1. Figures have ``samples`` random draws a point.
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
        if section not in _COLUMNS:
            raise ConfigError(f"unknown section {section!r}{did_you_mean(section, _COLUMNS)}")
        self.section, self.world = section, world
        self.clip_range, self.samples, self.seed = clip_range, samples, seed
        given = {"composite_weight": composite_weight, "distance": distance, "temperature": temperature}
        if section in ("gradient", "ratio"):
            given = {"alpha": alpha} | given
        self.sliders = {}
        for name, value in given.items():
            label, low, high, step = _SLIDERS[name]
            ends = {"min": min(low, value), "max": max(high, value), "step": step}
            quick = section != "gradient"  # a gradient takes a quarter of a second
            look = (label, value, "300px", "90px")
            self.sliders[name] = field(widgets.FloatSlider, *look, continuous_update=quick, **ends)
        choices = [(_SLIDERS[name][0], name) for name in estimators.KNOBS]
        self.over = field(widgets.ToggleButtons, "along", choices[0][1], "auto", options=choices)
        self.over.style.button_width = "auto"
        self.plot, self.table = Plot(layout={"min_height": "410px"}), widgets.HTML()
        controls = [*self.sliders.values(), *[self.over] * (section == "kl")]
        self.widget = widgets.VBox([row(*controls), self.plot, self.table])
        for control in controls:
            control.observe(self._update, names="value")
        self._update()

    def _at(self) -> dict[str, float]:
        return {name: slider.value for name, slider in self.sliders.items()}

    def compute(self) -> pd.DataFrame:
        """The numbers at the sliders' present values."""
        at = self._at()
        world, weight = self.world.between(at["distance"], at["temperature"]), at["composite_weight"]
        if self.section == "kl":
            return estimators.kl_estimators(world, weight, self.samples, self.seed)
        if self.section == "gradient":
            return estimators.gradient_quality(world, at["alpha"], weight, self.clip_range)
        if self.section == "ratio":
            return estimators.ratio_range(world, [at["alpha"]], weight, self.clip_range)
        return estimators.responsibilities(self.world, [at["distance"]], weight, at["temperature"])

    def figure(self) -> go.Figure:
        """What lies around the sliders' present values, which a dotted line marks."""
        at, draws = self._at(), {"samples": self.samples, "seed": self.seed}
        if self.section == "gradient":
            return plot_gradient_quality(self.frame)
        if self.section == "kl":
            along, held = self.over.value, {name: at[name] for name in (*estimators.KNOBS, "temperature")}
            points = np.linspace(0, 3, 13) if along == "distance" else np.linspace(0.1, 1, 10)
            figure = plot_kl_estimators(estimators.kl_sweep(self.world, along, points, **held, **draws))
        elif self.section == "ratio":
            along, world = "alpha", self.world.between(at["distance"], at["temperature"])
            points = np.linspace(0.05, 0.95, 37)
            frame = estimators.ratio_range(world, points, at["composite_weight"], self.clip_range, **draws)
            figure = plot_ratio_range(frame)
        else:
            along, settings = "distance", (at["composite_weight"], at["temperature"])
            frame = estimators.responsibilities(self.world, np.linspace(0, 4, 17), *settings, **draws)
            figure = plot_responsibility(frame)
        return figure.add_vline(x=at[along], line={"color": GREY, "dash": "dot"}, row="all", col="all")

    def html(self) -> str:
        """Settings and numbers as plain HTML."""
        columns = {name: column for name, column in _COLUMNS[self.section].items() if name in self.frame}
        records = self.frame.to_dict("records")
        rows = [[html_number(record[name], form) for name, (_, form) in columns.items()] for record in records]
        settings = ", ".join(f"{slider.description} {slider.value:g}" for slider in self.sliders.values())
        header = [helped(html_text(heading)) for heading, _ in columns.values()]
        return f"<p>numbers at: {settings}</p>{html_table(header, rows)}"

    def static(self) -> list[Any]:
        """Figure and table as they stand."""
        return [self.figure(), HTML(self.html())]

    @in_turn
    def _update(self, change: Any = None) -> None:
        self.frame = self.compute()
        self.table.value = self.html()
        self.plot.draw(self.figure())
