"""The mixing ratio by hand: what other mixtures would make of a step's stored traces."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import ipywidgets as widgets
import plotly.graph_objects as go
from IPython.display import HTML

from ..runs import reweight
from ..runs.folder import Run
from .html import alarms_html, summary_table
from .token_figures import plot_mixing
from .widgets import HIDDEN, Panel, Plot, field, in_turn, named, open_run, row, step_choices


class _Side:
    """One setting of the mixing panel: its sliders and its plot."""

    def __init__(self, name: str, own: reweight.Settings):
        def slider(label: str, value: float, low: float, width: str = "95%") -> widgets.FloatSlider:
            high = max(1.0, value)
            return field(widgets.FloatSlider, label, value, width, min=low, max=high, step=0.01)

        self.name, self.own = name, own
        self.alpha = slider("α", own.alpha, 0.0)
        self.composite_weight = slider("w", own.composite_weight, 0.0)
        self.clip_range = slider("clip ±", own.clip_range, 0.01, "220px")
        self.clip_range.layout.flex = "1 1 200px"
        clips = [("PPO", "ppo"), ("soft (tanh)", "soft"), ("none", "none")]
        self.clip = field(widgets.Dropdown, "clip", own.clip, "150px", HIDDEN, options=clips)
        self.controls = [self.alpha, self.composite_weight, self.clip_range, self.clip]
        self.plot = Plot(layout={"min_height": "570px", "flex": "1 1 380px", "min_width": "0"})
        clip = row(self.clip_range, self.clip)  # below each other where the page is narrow
        clip.layout.width = "95%"
        read = [] if own.whole_traces else [self.composite_weight, clip]  # the group bound reads alpha alone
        parts = [widgets.HTML(f"<b>setting {name}</b>"), self.alpha, *read]
        self.chosen = widgets.VBox(parts, layout={"flex": "1 1 300px", "min_width": "0"})

    @property
    def settings(self) -> reweight.Settings:
        own, clip = self.own, self.clip_range.value
        high = own.clip_range_high if own.clip_range == clip != own.clip_range_high else None  # moved, both bounds are
        numbers = self.alpha.value, self.composite_weight.value, self.clip.value, clip
        return reweight.Settings(*numbers, high, own.whole_traces)

    def __str__(self) -> str:
        s = self.settings
        clip = "no clip" if s.clip == "none" else f"{s.clip} clip ±{s.clip_range:g}"
        if s.clip == "ppo" and s.clip_range_high is not None:
            clip = f"ppo clip {s.clip_bounds[0]:g} to {s.clip_bounds[1]:g}"
        return f"α {s.alpha:g}" + ("" if s.whole_traces else f", w {s.composite_weight:g}, {clip}")


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
        other = replace(own, alpha=0.25 if own.alpha >= 0.5 else 0.75)
        self.sides = [_Side("A", own), _Side("B", other)]
        steps = step_choices(self.run.steps)[1:]
        self.step = field(widgets.Dropdown, "step", step, "110px", HIDDEN, options=steps)
        self.table, self.note = widgets.HTML(), widgets.HTML()
        self.summary: dict[str, dict[str, float]] = {}
        self._parts: dict[str, tuple] = {}
        self.step.observe(self._load, names="value")
        for side in self.sides:
            for control in side.controls:
                control.observe(lambda change, side=side: self._update([side]), names="value")
        chosen, plots = row(*(side.chosen for side in self.sides)), row(*(side.plot for side in self.sides))
        self.mixed = widgets.VBox([chosen, self.table, plots])
        self.widget = widgets.VBox([row(named(self.run), self.step, self.note), self.mixed])
        self._load()

    @in_turn
    def _load(self, change: Any = None) -> None:
        frame, self.traces = self.run.traces(self.step.value), None
        if frame.empty:
            self.note.value, self.mixed.layout.display = alarms_html(self.run.damage), "none"
            return
        share = frame["source"].eq("prior").mean()
        if self.run.config.get("alpha_rate"):
            self.sides[0].alpha.value = reweight.Settings.at(self.run.config, frame).alpha  # what it was in this step
        self.traces = reweight.Traces.of(frame)
        drawn = f"{len(frame)} traces, {self.traces.mask.sum():,} tokens, {share:.0%} drawn from the prior"
        if self.traces.logq is None:
            drawn += "; <b>not scored under the posterior prompt, so there is nothing to mix</b>"
        self.mixed.layout.display = "none" if self.traces.logq is None else ""
        self.note.value = drawn
        self._update(self.sides)

    @in_turn
    def _update(self, sides: Sequence[_Side]) -> None:
        if self.traces is None:  # another step's are being loaded, which draws both sides
            return
        for side in sides:
            settings = side.settings
            values = reweight.quantities(self.traces, settings)
            self.summary[side.name] = reweight.summarise_traces(self.traces, settings, values)
            densities = reweight.densities(self.traces, settings, values)
            bounds = None if settings.clip == "none" or settings.whole_traces else settings.clip_bounds
            self._parts[side.name] = (densities, bounds, reweight.gradient_weights(self.traces, settings, values))
            side.plot.draw(self._figure([side]))
        self.table.value = self.html()

    def _figure(self, sides: Sequence[_Side]) -> go.Figure:
        return plot_mixing({side.name: str(side) for side in sides}, [self._parts[side.name] for side in sides])

    def html(self) -> str:
        """The numbers of both settings as plain HTML."""
        a, b = (self.summary[side.name] for side in self.sides)
        header = ["", *(f"{side.name}: {side}" for side in self.sides), "B − A"]
        table = summary_table(header, [a, b, {key: b[key] - a[key] for key in a}])
        return f'<div style="line-height: 1.25; font-variant-numeric: tabular-nums">{table}</div>'

    def static(self) -> list[Any]:
        """Numbers and plots of both settings, as HTML and a plotly figure."""
        note = f"<p>step {self.step.value}: {self.note.value}</p>"
        hidden = self.mixed.layout.display == "none"
        return [HTML(note)] if hidden else [HTML(note + self.html()), self._figure(self.sides)]
