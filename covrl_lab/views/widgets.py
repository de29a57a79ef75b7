"""The parts of notebook panels: a plot and a table that are redrawn in place, input fields, and the panel itself.

Plots are redrawn by the plotly.js that is already in the page. A ``FigureWidget`` would send 5 MB with every figure
and store them in executed notebooks. An ``Output`` would draw each figure anew.
"""

import functools
import math
import threading
import uuid
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import anywidget
import ipywidgets as widgets
import pandas as pd
import plotly.graph_objects as go
import traitlets
from IPython.display import HTML, DisplayHandle, display
from plotly.offline import get_plotlyjs

from ..runs.folder import Run, load_run
from ..types import ConfigError
from .html import help_on, html_mark, html_number, html_table, html_text, visible

_TURN = threading.RLock()


def in_turn(handler: Callable[..., Any]) -> Callable[..., Any]:
    """Let one handler of a panel work at a time: ipykernel 7.4 may answer two messages of a page in two threads."""

    @functools.wraps(handler)
    def waiting(*args: Any, **kwargs: Any) -> Any:
        with _TURN:
            return handler(*args, **kwargs)

    return waiting


def static_text(name: str) -> str:
    """A script or a style sheet of the folder static/."""
    return (Path(__file__).parent / "static" / name).read_text(encoding="utf-8")


def script(*names: str) -> str:
    """The script of a ``Scripted`` widget, from files of the folder static/."""
    return "".join(map(static_text, ("late.js", *names)))


class Scripted(anywidget.AnyWidget):
    """A widget with a script of ours. It answers the page, and gives its state to one that loaded the script late."""

    own_id = traitlets.Unicode().tag(sync=True)

    def __init__(self, answers: Mapping[str, Callable[[Any], Any]] | None = None, **kwargs: Any):
        """answers: name of a message -> what is done with its content."""
        own_id = uuid.uuid4().hex
        super().__init__(model_id=own_id, own_id=own_id, **kwargs)
        known = {"late": lambda _: self.send_state()} | dict(answers or {})
        self.on_msg(lambda _, told, buffers: [in_turn(known[name])(value) for name, value in told.items()])


class Plot(Scripted):
    """A plotly figure that is redrawn in place; ``figure`` is its JSON, nothing where it is empty."""

    _esm = script("saving.js", "plot.js")
    figure = traitlets.Unicode().tag(sync=True)

    def __init__(self, on_click: Callable[[dict[str, Any]], None] | None = None, **kwargs: Any):
        """on_click: called with x, y and curve of a point that a reader clicks."""
        # A page without a plotly of its own asks for it; else it tells of a click.
        answers = {"wanted": lambda _: self.send({"source": get_plotlyjs()}), "clicked": on_click or (lambda _: None)}
        super().__init__(answers, **kwargs)

    def draw(self, figure: go.Figure) -> None:
        """Put ``figure`` in place of what is shown."""
        self.figure = figure.to_json()


def _start(text: str) -> str:
    """What a cell holds of a text, and the box under the mouse: a whole one may have 100,000 characters."""
    return text if len(text) <= 500 else f"{text[:500]} …"


class Table(Scripted):
    """Rows to sort and to pick from, by mouse or arrow keys.

    columns: dictionaries with name, label, kind ("number", "text", "source", "flag", "star" or "mark": right or wrong),
    digits (decimals; below 0: significant digits) and about.
    rows: dictionaries by column name, and "id" (text). The widget sets ``picked`` (an id) and ``sort``
    (column name, descending?); whoever fills the rows sorts them. ``marked``: ids shown as chosen.
    """

    _esm = script("table.js")
    _css = static_text("table.css")
    label = traitlets.Unicode().tag(sync=True)
    columns = traitlets.List().tag(sync=True)
    rows = traitlets.List().tag(sync=True)
    note = traitlets.Unicode().tag(sync=True)
    sort = traitlets.List(["", False]).tag(sync=True)
    picked = traitlets.Unicode().tag(sync=True)
    marked = traitlets.List().tag(sync=True)

    def fill(self, frame: pd.DataFrame, limit: int, marked: Sequence[str] | None = None, empty: str = "") -> None:
        """Show ``limit`` rows of ``frame`` (with a column "id") in the order asked for, or say that it is ``empty``."""
        by, descending = self.sort
        if by in frame:
            frame = frame.sort_values(by, ascending=not descending, kind="stable", na_position="last")
        shown = frame.head(limit)
        names = [c["name"] for c in self.columns]
        text = {c["name"] for c in self.columns if c["kind"] == "text"}
        known = shown[list(dict.fromkeys(["id", *names]))].replace([math.inf, -math.inf], math.nan).astype(object)
        rows = known.where(known.notna(), None).to_dict("records")
        rows = [record | {name: visible(_start(record[name] or "")) for name in text} for record in rows]
        with self.hold_sync():
            self.rows, self.marked = rows, [self.picked] if marked is None else list(marked)
            left = f"{len(shown):,} of {len(frame):,} shown; search to narrow" if len(shown) < len(frame) else ""
            self.note = empty if frame.empty else left

    def html(self, texts: bool = True) -> str:
        """The rows as plain HTML, or without the columns of text."""
        columns = [c for c in self.columns if texts or c["kind"] != "text"]

        def cell(value: Any, column: dict[str, Any]) -> str:
            if column["kind"] == "star":
                return "★" * value
            return html_mark(value) if column["kind"] == "mark" else html_number(value, column["form"])

        rows = [[cell(line[c["name"]], c) for c in columns] for line in self.rows]
        return html_table([html_text(c["label"]) for c in columns], rows)


class Take(Scripted):
    """Buttons that save or copy a text; ``make``: label -> function that gives (file name, text) at a click.

    Without a file name the text is copied.
    """

    _esm = script("take.js")
    labels = traitlets.List().tag(sync=True)

    def __init__(self, make: Mapping[str, Callable[[], tuple[str, str]]]):
        super().__init__({"wanted": lambda label: self.send(make[label]())}, labels=list(make))


def table_column(name: str, label: str, kind: str, about: str = "", digits: int = 0) -> dict[str, Any]:
    form = f".{-digits}g" if digits < 0 else f".{digits}f"
    about = about or help_on(label)
    return {"name": name, "label": label, "kind": kind, "about": about, "digits": digits, "form": form}


HIDDEN = "0px"  # a label's width that leaves it to screen readers


def field(kind: type, label: str, value: Any, width: str, label_width: str = "60px", **settings: Any) -> Any:
    """An input widget with its label before it; ``width`` counts the label in, and is less where the page is narrow."""
    settings = {"tooltip": help_on(label) or None} | settings
    shape = {"style": {"description_width": label_width}, "layout": {"width": width, "max_width": "calc(100% - 4px)"}}
    return kind(value=value, description=label, **shape, **settings)


def row(*children: widgets.Widget) -> widgets.HBox:
    """Widgets side by side, on several lines where the page is narrow."""
    return widgets.HBox(children, layout={"flex_flow": "row wrap", "grid_gap": "10px"})


def button(
    label: str, on_click: Callable[[], Any], icon: str = "", about: str = "", **settings: Any
) -> widgets.Button:
    """A button as wide as its label."""
    settings = {"layout": {"width": "auto"}} | settings
    made = widgets.Button(description=label, icon=icon, tooltip=about or None, **settings)
    made.on_click(lambda _: in_turn(on_click)())
    return made


def named(run: Run | Path, before: str = "") -> widgets.HTML:
    """The name of a run, which begins the first row of its panel."""
    path = run.path if isinstance(run, Run) else run
    return widgets.HTML(f"<b>{before}{html_text(path.absolute().name)}</b>")


def aside(function: Callable[[], None]) -> threading.Thread:
    """Call without making the kernel wait."""
    thread = threading.Thread(target=function, daemon=True)
    thread.start()
    return thread


def step_choices(steps: Sequence[int]) -> list[tuple[str, int]]:
    """What a choice of steps offers; 0 stands for all."""
    return [("all steps", 0), *((f"step {step}", step) for step in steps)]


def offer(choice: Any, options: Sequence[Any], value: Any, observer: Callable[[Any], None]) -> None:
    """Change what a selection offers and what is chosen in it, without a call of its observer."""
    choice.unobserve(observer, names="value")
    choice.options, choice.value = options, value
    choice.observe(observer, names="value")


class StaticCopy(anywidget.AnyWidget):
    """Hides the ``outputs`` outputs before its own: the copies for where no kernel draws a widget."""

    _esm = static_text("static_copy.js")
    outputs = traitlets.Int().tag(sync=True)


# A saved widget that finds no kernel is an error, or a line of its text: its copy stands before it.
_NO_ERRORS = "<style>.jp-OutputArea-output.jupyter-widgets:not(:has(*)) { display: none }</style>"


class Panel:
    """A widget with a copy of itself that needs no kernel. The copy follows what the widget shows, a second later."""

    widget: widgets.Box
    places = 0  # outputs that are kept for ``static()``, whose items may come and go
    _copies: Sequence[DisplayHandle] = ()
    _timer = threading.Timer(0, lambda: None)

    def static(self) -> list[Any]:
        """What the panel shows now, as plain HTML and plotly figures."""
        raise NotImplementedError

    def refresh_button(self) -> widgets.Button:
        """Calls ``refresh``; it stands at the end of a panel's filters."""
        return button("Refresh", lambda: self.refresh(), "refresh", "Read the files again; what is chosen stays")

    def _bundles(self) -> list[dict[str, Any]]:
        """``static()`` by media type, and room for what is not there yet: a page gets its outputs once."""
        shown = self.static()
        shown += [HTML("")] * (self.places - len(shown))
        return [{"text/html": copy.data} if isinstance(copy, HTML) else copy._repr_mimebundle_() for copy in shown]

    def _ipython_display_(self) -> None:
        display(HTML(_NO_ERRORS))
        self._copies = [display(bundle, raw=True, display_id=True) for bundle in self._bundles()]
        self._follow_changes(self.widget)
        bundle = widgets.VBox([self.widget, StaticCopy(outputs=len(self._copies))])._repr_mimebundle_()
        display({kind: content for kind, content in bundle.items() if kind != "text/plain"}, raw=True)

    def _follow_changes(self, widget: widgets.Widget) -> None:
        widget.observe(self._changed)
        for child in getattr(widget, "children", ()):
            self._follow_changes(child)

    def _changed(self, change: Any) -> None:
        self._timer.cancel()
        self._timer = threading.Timer(1.0, self._update_copies)
        self._timer.daemon = True
        self._timer.start()

    @in_turn
    def _update_copies(self) -> None:
        with suppress(OSError, ValueError, KeyError):  # a run's file was replaced while it was read: the next change
            for handle, bundle in zip(self._copies, self._bundles(), strict=False):
                handle.update(bundle, raw=True)
        self._follow_changes(self.widget)  # also what was added since


def open_run(run: Run | str | Path, step: int | None) -> tuple[Run, int]:
    """A run and the step to start with, its last unless given. ConfigError without traces of it."""
    run = (run if isinstance(run, Run) else load_run(run)).forgiving()
    steps = run.steps
    if not steps:
        raise ConfigError(f"{run.path} has no traces yet; train a step first")
    if step is not None and step not in steps:
        raise ConfigError(f"{run.path} has no traces of step {step}; it has {steps}")
    return run, steps[-1] if step is None else step
