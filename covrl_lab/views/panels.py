"""Notebook panels: look at traces, drag the mixing ratio, see estimators move.

Need the ``notebooks`` extra (ipywidgets, anywidget, plotly). Every panel also displays a copy of itself
that needs no kernel, for stored notebooks, web pages and batch runs; where the panel is alive, its copy
steps aside. Plots are redrawn by the plotly.js that is in the page already: a ``FigureWidget`` would send
5 MB with every figure and store them in executed notebooks, and an ``Output`` draws each figure from nothing.
"""

from __future__ import annotations

import html
import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import anywidget
import ipywidgets as widgets
import numpy as np
import pandas as pd
import plotly.graph_objects as go
import pyarrow as pa
import pyarrow.parquet as pq
import traitlets
from IPython.display import HTML, display
from plotly.offline import get_plotlyjs

from ..runs import reweight as tokens
from ..runs.folder import Run, load_run, step_file
from ..types import ConfigError, did_you_mean
from . import figures
from .token_view import SCALES, TokenView, colours, token_html

if TYPE_CHECKING:
    from ..theory.world import World

_STATIC = Path(__file__).parent / "static"

# --- parts


class Plot(anywidget.AnyWidget):
    """A plotly figure that is redrawn in place; ``figure`` is its JSON, nothing where it is empty."""

    _esm = (_STATIC / "plot.js").read_text(encoding="utf-8")
    figure = traitlets.Unicode().tag(sync=True)

    def __init__(self, **kwargs: Any):
        super().__init__(**kwargs)
        self.on_msg(self._send_plotly)

    def draw(self, figure: go.Figure) -> None:
        """Put ``figure`` in place of what is shown."""
        self.figure = figure.to_json()

    def _send_plotly(self, widget: Any, content: Any, buffers: Any) -> None:
        """For a page without a plotly of its own."""
        self.send({"source": get_plotlyjs()})


class Table(anywidget.AnyWidget):
    """Rows to sort and to pick from, by mouse or arrow keys.

    columns: dictionaries with name, label, kind ("number", "text", "source" or "flag"), digits and about.
    rows: dictionaries by column name, and "id" (text). The widget sets ``picked`` (an id) and ``sort``
    (column name, descending?); whoever fills the rows sorts them. ``marked``: ids shown as chosen.
    """

    _esm = (_STATIC / "table.js").read_text(encoding="utf-8")
    _css = (_STATIC / "table.css").read_text(encoding="utf-8")
    label = traitlets.Unicode().tag(sync=True)
    columns = traitlets.List().tag(sync=True)
    rows = traitlets.List().tag(sync=True)
    note = traitlets.Unicode().tag(sync=True)
    sort = traitlets.List(["", False]).tag(sync=True)
    picked = traitlets.Unicode().tag(sync=True)
    marked = traitlets.List().tag(sync=True)

    def sorted(self, frame: pd.DataFrame) -> pd.DataFrame:
        """``frame`` in the order asked for, unknown values last."""
        by, descending = self.sort
        if by not in frame:
            return frame
        return frame.sort_values(by, ascending=not descending, kind="stable", na_position="last")

    def fill(self, frame: pd.DataFrame, limit: int, marked: Sequence[str] = ()) -> None:
        """Show the first ``limit`` rows of ``frame`` (with a column "id")."""
        shown = self.sorted(frame).head(limit)
        names = [c["name"] for c in self.columns]
        text = {c["name"] for c in self.columns if c["kind"] == "text"}
        rows = []
        for record in shown[["id", *names]].to_dict("records"):
            row = {name: None if _unknown(value) else value for name, value in record.items()}
            rows.append(row | {name: figures.visible(row[name]) for name in text})
        with self.hold_sync():
            self.rows, self.marked = rows, list(marked)
            left = len(frame) - len(shown)
            self.note = f"{len(shown):,} of {len(frame):,} shown; search to narrow" if left else ""


def _unknown(value: Any) -> bool:
    return value is None or (isinstance(value, float) and not math.isfinite(value))


def _column(name: str, label: str, kind: str, about: str = "", digits: int = 0) -> dict[str, Any]:
    return {"name": name, "label": label, "kind": kind, "about": about, "digits": digits}


class _Copy(anywidget.AnyWidget):
    """Hides the ``outputs`` outputs before its own: the copies for where no kernel draws a widget."""

    _esm = """
    export default { render({ model, el }) {
      const hide = () => {
        if (!el.isConnected) return setTimeout(hide, 50);
        let child = el.closest(".jp-OutputArea-child");
        for (let k = 0; child && k < model.get("outputs"); k++) {
          child = child.previousElementSibling;
          if (child) child.style.display = "none";
        }
      };
      hide();
    } };
    """
    outputs = traitlets.Int().tag(sync=True)


def _opened(run: Run | str | Path, step: int | None) -> tuple[Run, int]:
    """A run and the step to start with, its last unless given. ConfigError without traces of it."""
    run = run if isinstance(run, Run) else load_run(run)
    steps = run.steps
    if not steps:
        raise ConfigError(f"{run.path} has no traces yet; train a step first")
    if step is not None and step not in steps:
        raise ConfigError(f"{run.path} has no traces of step {step}; it has {steps}")
    return run, steps[-1] if step is None else step


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
        display(widgets.VBox([self.widget, _Copy(outputs=len(copies))]))


# --- traces

_QUESTION_COLUMNS = [
    _column("step", "step", "number"),
    _column("question", "question", "text"),
    _column("answer", "answer", "text", "reference answer y"),
    _column("prior", "prior", "number", "mean log p(y|x,z) of prior traces, nats", 1),
    _column("posterior", "posterior", "number", "mean log p(y|x,z) of posterior traces, nats", 1),
]
_ROLLOUT_COLUMNS = [
    _column("rollout", "#", "number", "number of the rollout in its step"),
    _column("source", "source", "source", "the prompt that drew the trace"),
    _column(
        "total", "log p(y|x,z)", "number", "log-probability of the reference answer after the trace, nats", 1
    ),
    _column("reward", "reward", "number", "what the method made of it", 1),
    _column("advantage", "A", "number", "advantage: reward against its group's", 2),
    _column("answer_weight", "c_y", "number", "factor of the answer's log-likelihood in the loss", 1),
    _column("length", "tokens", "number", "trace length"),
    _column("finished", "ended", "flag", "whether the trace ended in time and in form"),
    _column("correct", "correct", "flag", "the task's verdict on the model's own answer after the trace"),
    _column("trace", "trace", "text"),
]
_MOST_QUESTIONS = 200  # rows of the list of questions; more would be slow to draw and nobody reads them
_LIGHT = ["step", "rollout", "example_id", "question", "answer", "source", "trace", "answer_logp"]


def trace_index(run: Run) -> pd.DataFrame:
    """One row a rollout of all steps, without the columns of one number a token.

    Columns: step, rollout, example_id, question, answer, source, trace, and total, log p(y|x,z) in nats.
    """
    tables = [pq.read_table(step_file(run.path / "traces", step), columns=_LIGHT) for step in run.steps]
    if not tables:
        return pd.DataFrame(columns=[*_LIGHT[:-1], "total"])
    index = pa.concat_tables(tables)
    parts = index.column("answer_logp").combine_chunks()
    offsets = parts.offsets.to_numpy()
    sums = np.concatenate([[0.0], np.cumsum(parts.values.to_numpy())])
    frame = index.drop_columns(["answer_logp"]).to_pandas()
    return frame.assign(total=sums[offsets[1:]] - sums[offsets[:-1]])


class TraceExplorer(Panel):
    """Prior against posterior traces of one question, token by token.

    run: a ``Run`` or its folder; step: where to start (default: the last with traces). The search box
    looks in questions, reference answers and traces. Of the traces one step's at a time are in memory.
    ``refresh``, or its button, shows what a run has written since.
    """

    def __init__(self, run: Run | str | Path, step: int | None = None):
        self.run, step = _opened(run, step)
        self.config = self.run.config
        self.settings = tokens.Settings.of(self.config)
        self._frame = pd.DataFrame()
        self.found = widgets.HTML()
        self._read()

        self.step = widgets.Dropdown(options=self._steps(), value=step, layout={"width": "110px"})
        self.search = widgets.Text(
            placeholder="search questions, answers, traces", layout={"flex": "1 1 150px"}
        )
        self.source = widgets.Dropdown(
            options=[("all sources", ""), ("prior", "prior"), ("posterior", "posterior")],
            layout={"width": "110px"},
        )
        self.again = widgets.Button(
            description="Refresh",
            icon="refresh",
            tooltip="Read the run folder again; filters, order and question stay",
            layout={"width": "auto"},
        )
        self.questions = Table(label="questions", columns=_QUESTION_COLUMNS)
        self.rollouts = Table(label="rollouts of the question", sort=["total", True])
        self.heading = widgets.HTML()
        self.colour = widgets.Dropdown(
            options=colours(),
            value="log_gap" if "posterior" in set(self.index["source"]) else "logp",
            description="colour",
            style={"description_width": "50px"},
            layout={"width": "290px"},
        )
        self.view = TokenView(colour=self.colour.value)
        self.plot = Plot(layout={"min_height": "250px"})

        for control in (self.step, self.search, self.source):
            control.observe(self._list_questions, names="value")
        self.again.on_click(lambda button: self.refresh())
        self.questions.observe(self._list_questions, names="sort")
        self.questions.observe(lambda change: self.choose(change.new), names="picked")
        self.rollouts.observe(self._list_rollouts, names="sort")
        self.rollouts.observe(lambda change: self._pick(int(change.new)), names="picked")
        self.colour.observe(self._recolour, names="value")
        self.view.observe(self._draw_lines, names="selected")

        row = {"flex_flow": "row wrap", "grid_gap": "10px"}
        controls = widgets.HBox(
            [self.step, self.search, self.source, self.colour, self.again, self.found], layout=row
        )
        self.questions.layout = {"flex": "2 1 330px", "min_width": "0"}
        self.rollouts.layout = {"flex": "3 1 480px", "min_width": "0"}
        tables = widgets.HBox([self.questions, self.rollouts], layout=row)
        self.widget = widgets.VBox([controls, tables, self.heading, self.view, self.plot])
        self.widget.add_class("covrl-explorer")
        self._list_questions()
        if self.questions.rows:
            self.questions.picked = self.questions.rows[0]["id"]

    # --- what is there

    def _read(self) -> None:
        self.index = trace_index(self.run)
        text = (self.index[name] for name in ("question", "answer", "trace"))
        self._haystack = next(text).str.cat(list(text), sep="\n").str.lower()
        self._step = 0  # whose traces are in memory
        steps = self.index["step"].nunique()
        self.found.value = f"{steps:,} step{'s' * (steps != 1)}, {len(self.index):,} traces"

    def _steps(self) -> list[tuple[str, int]]:
        return [("all steps", 0), *((f"step {s}", s) for s in self.index["step"].unique().tolist())]

    def refresh(self) -> None:
        """Read the run folder again; filters, order and what is chosen stay as they are."""
        self._read()
        kept = self.step.value
        self.step.unobserve(self._list_questions, names="value")
        self.step.options = steps = self._steps()
        self.step.value = kept if kept in dict(steps).values() else 0
        self.step.observe(self._list_questions, names="value")
        self._list_questions()

    # --- what is chosen

    def filtered(self) -> pd.DataFrame:
        """The rows of ``index`` that step, source and search leave."""
        keep = np.ones(len(self.index), bool)
        if self.step.value:
            keep &= (self.index["step"] == self.step.value).to_numpy()
        if self.source.value:
            keep &= (self.index["source"] == self.source.value).to_numpy()
        if self.search.value.strip():
            sought = self.search.value.strip().lower()
            keep &= self._haystack.str.contains(sought, regex=False).to_numpy(bool)
        return self.index[keep]

    def _list_questions(self, change: Any = None) -> None:
        frame = self.filtered()
        means = frame.pivot_table(
            "total", ["step", "example_id"], "source", "mean", sort=False, observed=True
        )
        first = frame.drop_duplicates(["step", "example_id"])[["step", "example_id", "question", "answer"]]
        listed = first.merge(means.reset_index(), on=["step", "example_id"]).reindex(
            columns=["step", "example_id", "question", "answer", "prior", "posterior"]
        )
        listed["id"] = listed["step"].astype(str) + "/" + listed["example_id"].astype(str)
        self.questions.fill(listed, _MOST_QUESTIONS, [self.questions.picked])
        if change is not None and change["owner"] is self.source and len(self._frame):
            self._list_rollouts()

    def choose(self, question: str) -> None:
        """Show a question, named "step/example_id", with the likeliest trace of each source."""
        step, _, example = question.partition("/")
        if int(step) != self._step:
            self._step, self._all = int(step), self.run.traces(int(step))
        frame = self._all[self._all["example_id"] == example].reset_index(drop=True)
        frame = frame.assign(
            id=frame["rollout"].astype(str),
            total=figures.answer_logprob(frame),
            length=frame["tokens"].map(len),
        )
        if "verdict" in frame or self.config.get("method") == "grpo":  # there the reward is the verdict
            frame["correct"] = frame["verdict" if "verdict" in frame else "reward"] > 0
        self._frame = frame
        best = frame.sort_values("total", ascending=False).drop_duplicates("source")
        self._shown = {row.source: int(row.rollout) for row in best.itertuples()}
        self.questions.marked = [question]
        self.rollouts.columns = [c for c in _ROLLOUT_COLUMNS if c["name"] in frame]
        self._show()

    def _pick(self, rollout: int) -> None:
        row = self._frame[self._frame["rollout"] == rollout]
        if len(row):
            self._shown[row["source"].iloc[0]] = rollout
            self._show()

    def pair(self) -> pd.DataFrame:
        """The rows that are shown token by token, the prior's first."""
        chosen = [self._shown[source] for source in ("prior", "posterior") if source in self._shown]
        return self._frame.set_index("rollout", drop=False).loc[chosen]

    # --- what is drawn

    def _list_rollouts(self, change: Any = None) -> None:
        frame = self._frame
        kept = frame[frame["source"] == self.source.value] if self.source.value else frame
        self.rollouts.fill(kept, len(kept), [str(rollout) for rollout in self._shown.values()])

    def _show(self) -> None:
        self._list_rollouts()
        self.heading.value = self._heading()
        pair = self.pair()
        self.view.show(pair, self.settings)
        # Start where prior and posterior disagree most.
        gaps = [np.abs(t["values"].get("log_gap", t["values"]["logp"])) for t in self.view.traces]
        side = int(np.argmax([gap.max() for gap in gaps]))
        self.view.selected = [side, int(gaps[side].argmax())]

    def _heading(self) -> str:
        row = self._frame.iloc[0]
        question, answer = (html.escape(figures.visible(row[name])) for name in ("question", "answer"))
        named = [self.run.path.name, f"step {row['step']}", self.config.get("model", "")]
        s = self.settings
        named += [f"α {s.alpha:g}, w {s.composite_weight:g}, clip {s.clip} {s.clip_range:g}"]
        return (
            '<div style="line-height: 1.5; overflow-wrap: anywhere"><b style="font-size: 1.1em">'
            f'<code style="background: none; font: inherit">{question}</code></b> reference answer '
            f'<b><code style="background: none; font: inherit">{answer}</code></b><br>'
            f'<span style="opacity: 0.75">{html.escape(" · ".join(map(str, named)))}</span></div>'
        )

    def _recolour(self, change: Any) -> None:
        self.view.colour = change.new
        self._draw_lines()

    def lines(self) -> go.Figure:
        """The selected token's trace as lines."""
        side, at = self.view.selected or [0, None]
        trace, name = self.view.traces[side], self.view.colour
        figure = figures.token_lines(trace["tokens"], trace["values"], name, SCALES[name]["title"], at)
        return figure.update_layout(title_text=f"The {trace['title']} under both prompts", margin={"t": 60})

    def _draw_lines(self, change: Any = None) -> None:
        if self.view.selected:
            self.plot.draw(self.lines())

    def static(self) -> list[Any]:
        """The chosen question's rollouts, the two traces and the lines, as HTML and a plotly figure."""
        names = [c for c in self.rollouts.columns if c["kind"] != "text"]
        cells = [
            figures._row([_shown(row[c["name"]], c["digits"]) for c in names]) for row in self.rollouts.rows
        ]
        table = figures._table([html.escape(c["label"]) for c in names], cells)
        view = token_html(self.pair(), self.settings, self.view.colour)
        return [HTML(f"{self._heading()}{table}{view}"), self.lines()]


def _shown(value: Any, digits: int) -> str:
    """A table's cell as HTML."""
    if value is None or isinstance(value, bool):
        return {None: "–", True: "yes", False: "no"}[value]
    text = f"{value:.{digits}f}".replace("-", "−") if isinstance(value, (int, float)) else str(value)
    return html.escape(text)


# --- mixing ratio

# key of tokens.summarise -> (label, digits, factor)
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
    "pull_prior": ("pull on log p, a token", 4, 1),
    "pull_posterior": ("pull on log q, a token", 4, 1),
    "pull_prior_share": ("share of the pull that reaches the prior, %", 1, 100),
}


class _Side:
    """One setting of the mixing panel: its sliders and its plot."""

    def __init__(self, name: str, settings: tokens.Settings):
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
    def settings(self) -> tokens.Settings:
        return tokens.Settings(
            self.alpha.value, self.composite_weight.value, self.clip.value, self.clip_range.value
        )

    def __str__(self) -> str:
        s = self.settings
        clip = "no clip" if s.clip == "none" else f"{s.clip} clip ±{s.clip_range:g}"
        return f"α {s.alpha:g}, w {s.composite_weight:g}, {clip}"


class MixingRatio(Panel):
    """What other mixtures would make of a step's stored traces: two settings side by side, without a model.

    run: a ``Run`` or its folder; step: whose traces (default: the last). Traces are weighed by source so
    that the prior's make up alpha of them; log-probabilities and advantages are the stored ones. Setting A
    starts as the run's own; B with another alpha. ``summary`` maps "A" and "B" to ``tokens.summarise``.
    """

    def __init__(self, run: Run | str | Path, step: int | None = None):
        self.run, step = _opened(run, step)
        own = tokens.Settings.of(self.run.config)
        other = 0.25 if own.alpha >= 0.5 else 0.75
        self.sides = [
            _Side("A", own),
            _Side("B", tokens.Settings(other, own.composite_weight, own.clip, own.clip_range)),
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
        self.traces = tokens.Traces.of(frame)
        share = self.traces.from_prior.mean()
        drawn = f"{len(frame)} traces, {self.traces.mask.sum():,} tokens, {share:.0%} drawn from the prior"
        if self.traces.logq is None:
            drawn += "; <b>not scored under the posterior prompt, so there is nothing to mix</b>"
        self.note.value = drawn
        self._update(self.sides)

    def _update(self, sides: Sequence[_Side]) -> None:
        for side in sides:
            settings = side.settings
            values = tokens.quantities(self.traces, settings)
            self.summary[side.name] = tokens.summarise(self.traces, settings, values)
            densities = tokens.densities(self.traces, settings, values)
            bounds = None if settings.clip == "none" else settings.clip_bounds
            self._parts[side.name] = (densities, bounds, tokens.pulls(self.traces, settings, values))
            side.plot.draw(self._figure([side]))
        self.table.value = self.html()

    def _figure(self, sides: Sequence[_Side]) -> go.Figure:
        densities, bounds, pulls = zip(*(self._parts[side.name] for side in sides), strict=True)
        return figures.mixing({side.name: str(side) for side in sides}, densities, bounds, pulls)

    def html(self) -> str:
        """The numbers of both settings as plain HTML."""
        a, b = (self.summary[side.name] for side in self.sides)
        rows = [
            figures._row(
                [label, *(_shown(_known(x, factor), digits) for x in (a[key], b[key], b[key] - a[key]))]
            )
            for key, (label, digits, factor) in _SUMMARY.items()
        ]
        table = figures._table(["", *(f"{side.name}: {side}" for side in self.sides), "B − A"], rows)
        return f'<div style="line-height: 1.25; font-variant-numeric: tabular-nums">{table}</div>'

    def static(self) -> list[Any]:
        """Numbers and plots of both settings, as HTML and a plotly figure."""
        return [
            HTML(f"<p>step {self.step.value}: {self.note.value}</p>{self.html()}"),
            self._figure(self.sides),
        ]


def _known(value: float, factor: float) -> float | None:
    return None if math.isnan(value) else value * factor


# --- estimators

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
        from ..theory import estimators  # needs torch, which looking at runs does without

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
            figures._row([_cell(row[name], factor) for name, (_, factor) in columns.items()])
            for row in self.frame.to_dict("records")
        ]
        return figures._table([heading for heading, _ in columns.values()], rows)

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
