"""The parts of notebook panels: a plot and a table that are redrawn in place, input fields, and the panel itself.

They need the ``notebooks`` extra (ipywidgets, anywidget, plotly). Plots are redrawn by the plotly.js that is
already in the page. A ``FigureWidget`` would send 5 MB with every figure and store them in executed
notebooks. An ``Output`` would draw each figure anew.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import anywidget
import ipywidgets as widgets
import pandas as pd
import plotly.graph_objects as go
import traitlets
from IPython.display import display
from plotly.offline import get_plotlyjs

from ..runs.folder import Run, load_run
from ..types import ConfigError
from .html import visible


def static_text(name: str) -> str:
    """A script or a style sheet of the folder static/."""
    return (Path(__file__).parent / "static" / name).read_text(encoding="utf-8")


class Plot(anywidget.AnyWidget):
    """A plotly figure that is redrawn in place; ``figure`` is its JSON, nothing where it is empty."""

    _esm = static_text("plot.js")
    figure = traitlets.Unicode().tag(sync=True)

    def __init__(self, **kwargs: Any):
        super().__init__(**kwargs)
        # For a page without a plotly of its own, which asks.
        self.on_msg(lambda *message: self.send({"source": get_plotlyjs()}))

    def draw(self, figure: go.Figure) -> None:
        """Put ``figure`` in place of what is shown."""
        self.figure = figure.to_json()


class Table(anywidget.AnyWidget):
    """Rows to sort and to pick from, by mouse or arrow keys.

    columns: dictionaries with name, label, kind ("number", "text", "source" or "flag"), digits and about.
    rows: dictionaries by column name, and "id" (text). The widget sets ``picked`` (an id) and ``sort``
    (column name, descending?); whoever fills the rows sorts them. ``marked``: ids shown as chosen.
    """

    _esm = static_text("table.js")
    _css = static_text("table.css")
    label = traitlets.Unicode().tag(sync=True)
    columns = traitlets.List().tag(sync=True)
    rows = traitlets.List().tag(sync=True)
    note = traitlets.Unicode().tag(sync=True)
    sort = traitlets.List(["", False]).tag(sync=True)
    picked = traitlets.Unicode().tag(sync=True)
    marked = traitlets.List().tag(sync=True)

    def fill(self, frame: pd.DataFrame, limit: int, marked: Sequence[str] = ()) -> None:
        """Show the first ``limit`` rows of ``frame`` (with a column "id") in the order asked for."""
        by, descending = self.sort
        if by in frame:
            frame = frame.sort_values(by, ascending=not descending, kind="stable", na_position="last")
        shown = frame.head(limit)
        names = [c["name"] for c in self.columns]
        text = {c["name"] for c in self.columns if c["kind"] == "text"}
        known = shown[["id", *names]].replace([math.inf, -math.inf], math.nan).astype(object)
        rows = known.where(known.notna(), None).to_dict("records")
        rows = [record | {name: visible(record[name]) for name in text} for record in rows]
        with self.hold_sync():
            self.rows, self.marked = rows, list(marked)
            left = len(frame) - len(shown)
            self.note = f"{len(shown):,} of {len(frame):,} shown; search to narrow" if left else ""


def table_column(name: str, label: str, kind: str, about: str = "", digits: int = 0) -> dict[str, Any]:
    return {"name": name, "label": label, "kind": kind, "about": about, "digits": digits}


def field(kind: type, label: str, value: Any, width: str, label_width: str = "60px", **settings: Any) -> Any:
    """An input widget with its label before it; ``width`` counts the label in."""
    shape = {"style": {"description_width": label_width}, "layout": {"width": width}}
    return kind(value=value, description=label, **shape, **settings)


def row(*children: widgets.Widget) -> widgets.HBox:
    """Widgets side by side, on several lines where the page is narrow."""
    return widgets.HBox(children, layout={"flex_flow": "row wrap", "grid_gap": "10px"})


def aside(function: Callable[[], None]) -> threading.Thread:
    """Call without making the kernel wait."""
    thread = threading.Thread(target=function, daemon=True)
    thread.start()
    return thread


def offer(choice: Any, options: Sequence[Any], value: Any, observer: Callable[[Any], None]) -> None:
    """Change what a selection offers and what is chosen in it, without a call of its observer."""
    choice.unobserve(observer, names="value")
    choice.options, choice.value = options, value
    choice.observe(observer, names="value")


class StaticCopy(anywidget.AnyWidget):
    """Hides the ``outputs`` outputs before its own: the copies for where no kernel draws a widget."""

    _esm = static_text("static_copy.js")
    outputs = traitlets.Int().tag(sync=True)


class Panel:
    """A widget with a copy of itself that needs no kernel."""

    widget: widgets.Box

    def static(self) -> list[Any]:
        """What the panel shows now, as plain HTML and plotly figures."""
        raise NotImplementedError

    def _ipython_display_(self) -> None:
        copies = self.static()
        for copy in copies:
            display(copy)
        display(widgets.VBox([self.widget, StaticCopy(outputs=len(copies))]))


def open_run(run: Run | str | Path, step: int | None) -> tuple[Run, int]:
    """A run and the step to start with, its last unless given. ConfigError without traces of it."""
    run = run if isinstance(run, Run) else load_run(run)
    steps = run.steps
    if not steps:
        raise ConfigError(f"{run.path} has no traces yet; train a step first")
    if step is not None and step not in steps:
        raise ConfigError(f"{run.path} has no traces of step {step}; it has {steps}")
    return run, steps[-1] if step is None else step
