"""The mixing ratio by hand: what other mixtures would make of a step's stored traces."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import ipywidgets as widgets
import plotly.graph_objects as go
from IPython.display import HTML

from ..runs import reweight
from ..runs.folder import Run
from .html import html_number, html_row, html_table
from .token_figures import plot_mixing
from .widgets import Panel, Plot, open_run

# key of reweight.summarise_traces -> (label, digits, factor)
_SUMMARY = {
    "clipped_share": ("tokens held back by the clip, %", 1, 100),
    "effective_sample_size": ("effective traces, (ΣW)² / ΣW²", 1, 1),
    "effective_sample_share": ("… of all, %", 1, 100),
    "ratio_low": ("least ratio p′/h", 3, 1),
    "ratio_high": ("largest ratio p′/h", 3, 1),
    "kl": ("KL(p′‖p), nats a token", 4, 1),
    "reward": ("expected reward", 2, 1),
    "reward_prior": ("… of prior traces", 2, 1),
    "reward_posterior": ("… of posterior traces", 2, 1),
    "gradient_weight_prior": ("pull on log p, a token", 4, 1),
    "gradient_weight_posterior": ("pull on log q, a token", 4, 1),
    "gradient_weight_prior_share": ("share of the pull that reaches the prior, %", 1, 100),
}


class _Side:
    """One setting of the mixing panel: its sliders and its plot."""

    def __init__(self, name: str, settings: reweight.Settings):
        self.name = name
        wide = {"style": {"description_width": "60px"}, "layout": {"width": "95%"}}

        def slider(label: str, value: float, low: float, high: float, step: float) -> widgets.FloatSlider:
            return widgets.FloatSlider(
                value=value, min=low, max=max(high, value), step=step, description=label, **wide
            )

        self.alpha = slider("α", settings.alpha, 0.0, 1.0, 0.01)
        self.composite_weight = slider("w", settings.composite_weight, 0.0, 1.0, 0.01)
        self.clip_range = slider("clip ±", settings.clip_range, 0.01, 1.0, 0.01)
        self.clip = widgets.Dropdown(
            options=[("PPO", "ppo"), ("soft (tanh)", "soft"), ("none", "none")],
            value=settings.clip,
        )
        self.controls = [self.alpha, self.composite_weight, self.clip_range, self.clip]
        self.plot = Plot(layout={"min_height": "570px"})
        self.clip.layout, self.clip_range.layout = {"width": "150px"}, {"flex": "1 1 200px"}
        clips = widgets.HBox([self.clip_range, self.clip], layout={"width": "95%"})
        self.widget = widgets.VBox(
            [widgets.HTML(f"<b>setting {name}</b>"), self.alpha, self.composite_weight, clips, self.plot],
            layout={"flex": "1 1 380px", "min_width": "0"},
        )

    @property
    def settings(self) -> reweight.Settings:
        return reweight.Settings(self.alpha.value, self.composite_weight.value, self.clip.value, self.clip_range.value)

    def __str__(self) -> str:
        s = self.settings
        clip = "no clip" if s.clip == "none" else f"{s.clip} clip ±{s.clip_range:g}"
        return f"α {s.alpha:g}, w {s.composite_weight:g}, {clip}"


class MixingRatio(Panel):
    """What other mixtures would make of a step's stored traces: two settings side by side, without a model.

    run: a ``Run`` or its folder; step: whose traces (default: the last). Traces are weighed by source so
    that the prior's make up alpha of them; log-probabilities and advantages are the stored ones. Setting A
    starts as the run's own; B with another alpha. ``summary`` maps "A" and "B" to
    what ``reweight.summarise_traces`` says.
    """

    def __init__(self, run: Run | str | Path, step: int | None = None):
        self.run, step = open_run(run, step)
        own = reweight.Settings.of(self.run.config)
        other = 0.25 if own.alpha >= 0.5 else 0.75
        self.sides = [
            _Side("A", own),
            _Side("B", reweight.Settings(other, own.composite_weight, own.clip, own.clip_range)),
        ]
        self.step = widgets.Dropdown(
            options=[(f"step {s}", s) for s in self.run.steps],
            value=step,
            layout={"width": "120px"},
        )
        self.table, self.summary = widgets.HTML(), {}
        self._parts: dict[str, tuple] = {}
        self.note = widgets.HTML()
        self.step.observe(self._load, names="value")
        for side in self.sides:
            for control in side.controls:
                control.observe(lambda change, side=side: self._update([side]), names="value")
        settings = widgets.HBox(
            [side.widget for side in self.sides], layout={"flex_flow": "row wrap", "grid_gap": "16px"}
        )
        top = widgets.HBox([self.step, self.note], layout={"grid_gap": "10px"})
        self.widget = widgets.VBox([top, self.table, settings])
        self._load()

    def _load(self, change: Any = None) -> None:
        frame = self.run.traces(self.step.value)
        self.traces = reweight.Traces.of(frame)
        share = self.traces.from_prior.mean()
        drawn = f"{len(frame)} traces, {self.traces.mask.sum():,} tokens, {share:.0%} drawn from the prior"
        if self.traces.logq is None:
            drawn += "; <b>not scored under the posterior prompt, so there is nothing to mix</b>"
        self.note.value = drawn
        self._update(self.sides)

    def _update(self, sides: Sequence[_Side]) -> None:
        for side in sides:
            settings = side.settings
            values = reweight.quantities(self.traces, settings)
            self.summary[side.name] = reweight.summarise_traces(self.traces, settings, values)
            densities = reweight.densities(self.traces, settings, values)
            bounds = None if settings.clip == "none" else settings.clip_bounds
            self._parts[side.name] = (
                densities,
                bounds,
                reweight.gradient_weights(self.traces, settings, values),
            )
            side.plot.draw(self._figure([side]))
        self.table.value = self.html()

    def _figure(self, sides: Sequence[_Side]) -> go.Figure:
        densities, bounds, gradient_weights = zip(*(self._parts[side.name] for side in sides), strict=True)
        return plot_mixing({side.name: str(side) for side in sides}, densities, bounds, gradient_weights)

    def html(self) -> str:
        """The numbers of both settings as plain HTML."""
        a, b = (self.summary[side.name] for side in self.sides)
        rows = [
            html_row([label, *(html_number(_known(x, factor), digits) for x in (a[key], b[key], b[key] - a[key]))])
            for key, (label, digits, factor) in _SUMMARY.items()
        ]
        table = html_table(["", *(f"{side.name}: {side}" for side in self.sides), "B − A"], rows)
        return f'<div style="line-height: 1.25; font-variant-numeric: tabular-nums">{table}</div>'

    def static(self) -> list[Any]:
        """Numbers and plots of both settings, as HTML and a plotly figure."""
        return [
            HTML(f"<p>step {self.step.value}: {self.note.value}</p>{self.html()}"),
            self._figure(self.sides),
        ]


def _known(value: float, factor: float) -> float | None:
    return None if math.isnan(value) else value * factor
