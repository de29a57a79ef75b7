"""The trace explorer: prior against posterior traces of a run, token by token."""

from __future__ import annotations

import html
from pathlib import Path
from typing import Any

import ipywidgets as widgets
import numpy as np
import pandas as pd
import plotly.graph_objects as go
import pyarrow as pa
from IPython.display import HTML

from ..runs.folder import Run
from ..runs.reweight import Settings, answer_logprob
from ..types import ConfigError
from .html import alarms_html, html_number, html_table, html_text
from .token_figures import plot_token_lines
from .token_view import SCALES, TokenView, colours, token_html
from .widgets import Panel, Plot, Table, field, offer, open_run, row, table_column

_QUESTION_COLUMNS = [
    table_column("step", "step", "number"),
    table_column("question", "question", "text"),
    table_column("answer", "answer", "text", "reference answer y"),
    table_column("prior", "prior", "number", "mean log p(y|x,z) of prior traces, nats", 1),
    table_column("posterior", "posterior", "number", "mean log p(y|x,z) of posterior traces, nats", 1),
]
_ROLLOUT_COLUMNS = [
    table_column("rollout", "#", "number", "number of the rollout in its step"),
    table_column("source", "source", "source", "the prompt that drew the trace"),
    table_column("total", "log p(y|x,z)", "number", "log p of the reference answer after the trace, nats", 1),
    table_column("reward", "reward", "number", "what the method made of it", 1),
    table_column("advantage", "A", "number", "advantage: reward against its group's", 2),
    table_column("answer_weight", "c_y", "number", "factor of the answer's log-likelihood in the loss", 1),
    table_column("length", "tokens", "number", "trace length"),
    table_column("finished", "ended", "flag", "whether the trace ended in time and in form"),
    table_column("correct", "correct", "flag", "the task's verdict on the model's own answer after the trace"),
    table_column("trace", "trace", "text"),
]
_MOST_QUESTIONS = 200  # rows of the list of questions; more would be slow to draw and nobody reads them
_LIGHT = ["step", "rollout", "example_id", "question", "answer", "source", "trace", "answer_logp"]


def trace_index(run: Run) -> pd.DataFrame:
    """One row a rollout of all steps, without the columns of one number a token.

    Columns: step, rollout, example_id, question, answer, source, trace, and total, log p(y|x,z) in nats.
    """
    tables = run.tables(run.steps, _LIGHT)
    frame = pa.concat_tables(tables).to_pandas() if tables else pd.DataFrame(columns=_LIGHT)
    return frame.drop(columns="answer_logp").assign(total=answer_logprob(frame))


class TraceExplorer(Panel):
    """Prior against posterior traces of one question, token by token.

    run: a ``Run`` or its folder; step: where to start (default: the last with traces). The search box
    looks in questions, reference answers and traces. Of the traces one step's at a time are in memory.
    ``refresh``, or its button, shows what a run has written since.
    """

    def __init__(self, run: Run | str | Path, step: int | None = None):
        run, step = open_run(run, step)
        self.run, self.config = run.forgiving(), run.config
        self.settings = Settings.of(self.config)
        self._frame = pd.DataFrame()
        self.found = widgets.HTML()
        self._read()

        narrow, sources = {"width": "110px"}, [("all sources", ""), ("prior", "prior"), ("posterior", "posterior")]
        shown = step if step in set(self.index["step"]) else 0  # all
        self.step = widgets.Dropdown(options=self._steps(), value=shown, layout=narrow)
        self.search = widgets.Text(placeholder="search questions, answers, traces", layout={"flex": "1 1 150px"})
        self.source = widgets.Dropdown(options=sources, layout=narrow)
        about = "Read the run folder again; filters, order and question stay"
        self.again = widgets.Button(description="Refresh", icon="refresh", tooltip=about, layout={"width": "auto"})
        self.questions = Table(label="questions", columns=_QUESTION_COLUMNS)
        self.rollouts = Table(label="rollouts of the question", sort=["total", True])
        self.heading = widgets.HTML()
        colour = "log_gap" if "posterior" in set(self.index["source"]) else "logp"
        self.colour = field(widgets.Dropdown, "colour", colour, "290px", "50px", options=colours())
        self.view = TokenView(colour=colour)
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

        controls = row(self.step, self.search, self.source, self.colour, self.again, self.found)
        self.questions.layout = {"flex": "2 1 330px", "min_width": "0"}
        self.rollouts.layout = {"flex": "3 1 480px", "min_width": "0"}
        tables = row(self.questions, self.rollouts)
        self.widget = widgets.VBox([controls, tables, self.heading, self.view, self.plot])
        self.widget.add_class("covrl-explorer")
        self._list_questions()
        if self.questions.rows:
            self.questions.picked = self.questions.rows[0]["id"]

    # --- what is there

    def _read(self) -> None:
        self.index = trace_index(self.run)
        if self.index.empty and self.run.damage:
            raise ConfigError(next(iter(self.run.damage.values())))
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
        steps, kept = self._steps(), self.step.value
        offer(self.step, steps, kept if kept in dict(steps).values() else 0, self._list_questions)
        self._list_questions()

    # --- what is chosen

    def filtered(self) -> pd.DataFrame:
        """The rows of ``index`` that step, source and search leave."""
        keep = pd.Series(True, self.index.index)
        if self.step.value:
            keep &= self.index["step"] == self.step.value
        if self.source.value:
            keep &= self.index["source"] == self.source.value
        if sought := self.search.value.strip().lower():
            keep &= self._haystack.str.contains(sought, regex=False)
        return self.index[keep]

    def _list_questions(self, change: Any = None) -> None:
        frame = self.filtered()
        means = frame.pivot_table("total", ["step", "example_id"], "source", "mean", sort=False, observed=True)
        first = frame.drop_duplicates(["step", "example_id"])[["step", "example_id", "question", "answer"]]
        listed = first.merge(means.reset_index(), on=["step", "example_id"])
        listed = listed.reindex(columns=[*first, "prior", "posterior"])
        listed["id"] = listed["step"].astype(str) + "/" + listed["example_id"].astype(str)
        self.questions.fill(listed, _MOST_QUESTIONS, [self.questions.picked])
        if change is not None and change["owner"] is self.source and len(self._frame):
            self._list_rollouts()

    def choose(self, question: str) -> None:
        """Show a question, named "step/example_id", with the likeliest trace of each source."""
        step, _, example = question.partition("/")
        if int(step) != self._step:
            self._step, self._all = int(step), self.run.traces(int(step))
        if self._all.empty:
            self.heading.value = alarms_html(self.run.damage)
            return
        frame = self._all[self._all["example_id"] == example].reset_index(drop=True)
        frame = frame.assign(total=answer_logprob(frame), length=frame["tokens"].map(len))
        frame["id"] = frame["rollout"].astype(str)
        if "verdict" in frame or self.config.get("method") == "grpo":  # there the reward is the verdict
            frame["correct"] = frame["verdict" if "verdict" in frame else "reward"] > 0
        self._frame = frame
        best = frame.sort_values("total", ascending=False).drop_duplicates("source")
        self._shown = {trace.source: int(trace.rollout) for trace in best.itertuples()}
        self.questions.marked = [question]
        self.rollouts.columns = [c for c in _ROLLOUT_COLUMNS if c["name"] in frame]
        self._show()

    def _pick(self, rollout: int) -> None:
        found = self._frame[self._frame["rollout"] == rollout]
        if len(found):
            self._shown[found["source"].iloc[0]] = rollout
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
        damage = alarms_html(self.run.damage)
        self.heading.value = damage + _heading(self.run, self.settings, self._frame.iloc[0])
        pair = self.pair()
        self.view.show(pair, self.settings)
        # Start where prior and posterior disagree most.
        gaps = [np.abs(t["values"].get("log_gap", t["values"]["logp"])) for t in self.view.traces]
        side = int(np.argmax([gap.max() for gap in gaps]))
        self.view.selected = [side, int(gaps[side].argmax())]

    def _recolour(self, change: Any) -> None:
        self.view.colour = change.new
        self._draw_lines()

    def lines(self) -> go.Figure:
        """The selected token's trace as lines."""
        side, at = self.view.selected or [0, None]
        trace, name = self.view.traces[side], self.view.colour
        figure = plot_token_lines(trace["tokens"], trace["values"], name, SCALES[name]["title"], at)
        return figure.update_layout(title_text=f"The {trace['title']} under both prompts", margin={"t": 60})

    def _draw_lines(self, change: Any = None) -> None:
        if self.view.selected:
            self.plot.draw(self.lines())

    def static(self) -> list[Any]:
        """The chosen question's rollouts, the two traces and the lines, as HTML and a plotly figure."""
        if self._frame.empty:
            return [HTML(self.heading.value)]
        columns = [c for c in self.rollouts.columns if c["kind"] != "text"]
        rows = [[html_number(line[c["name"]], f".{c['digits']}f") for c in columns] for line in self.rollouts.rows]
        table = html_table([html.escape(c["label"]) for c in columns], rows)
        tokens = token_html(self.pair(), self.settings, self.view.colour)
        return [HTML(self.heading.value + table + tokens), self.lines()]


def _heading(run: Run, settings: Settings, trace: Any) -> str:
    """Question, reference answer and the run's settings as HTML; ``trace`` is a row of the question."""
    code, s = '<code style="background: none; font: inherit">', settings
    question, answer = (f"{code}{html_text(trace[name])}</code>" for name in ("question", "answer"))
    named = [run.path.name, f"step {trace['step']}", run.config.get("model", "")]
    named += [f"α {s.alpha:g}, w {s.composite_weight:g}, clip {s.clip} {s.clip_range:g}"]
    return (
        f'<div style="line-height: 1.5; overflow-wrap: anywhere"><b style="font-size: 1.1em">{question}</b> '
        f"reference answer <b>{answer}</b><br>"
        f'<span style="opacity: 0.75">{html.escape(" · ".join(map(str, named)))}</span></div>'
    )
