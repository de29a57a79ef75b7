"""Two traces of one question beside each other, aligned by their tokens: of two runs, two steps, or both sources."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import ipywidgets as widgets
import pandas as pd
from IPython.display import HTML

from ..runs.folder import Run
from ..runs.reweight import Settings
from ..types import ConfigError, did_you_mean
from .explorer import offered, source_field, trace_index
from .html import alarms_html, html_number, html_passage, html_text
from .token_view import TokenView, align, payload, traces_html
from .widgets import HIDDEN, Panel, Table, field, in_turn, named, offer, open_run, row, step_choices, table_column

_MEAN = "mean log p(y|x,z) of the traces that {} offers, nats"
_COLUMNS = [
    table_column("question", "question", "text"),
    table_column("answer", "answer", "text", "reference answer y"),
    table_column("a", "A", "number", _MEAN.format("A"), 1),
    table_column("b", "B", "number", _MEAN.format("B"), 1),
    table_column("gain", "B − A", "number", "", 1),
]
_MOST_QUESTIONS = 300


class _Side:
    """Which traces one side offers, and the one that is shown. Of a run of many files it first reads one step's."""

    def __init__(self, name: str, run: Run, step: int | None, source: str) -> None:
        self.name, (self.run, shown) = name, open_run(run, step)
        self.only = shown * run.long  # the step that has been read; 0: all have been
        self.index = trace_index(self.run, *[shown] * run.long)
        steps = step_choices(run.steps)
        self.step = field(widgets.Dropdown, f"{name}'s step", self.only or step or 0, "110px", HIDDEN, options=steps)
        known = source in set(self.index["source"])
        self.source = source_field(f"{name}'s source", source if known else "prior")
        self.trace = field(widgets.Dropdown, "trace", None, "330px", "40px", options=[])
        self.widget = row(named(run, f"{name}: "), self.step, self.source, self.trace)

    def offered(self) -> pd.DataFrame:
        """The rows of ``trace_index`` that step and source leave."""
        if self.only and self.step.value != self.only:
            self.only, self.index = 0, trace_index(self.run)
        return self.index[offered(self.index, self.step.value, self.source.value)]

    def choices(self, question: str) -> list[tuple[str, tuple[int, int]]]:
        """(description, (step, rollout)) of the question's traces, the likeliest answer first."""
        own = self.offered().query("example_id == @question").sort_values("total", ascending=False)
        marks = own["right"].map({1.0: " ✓", 0.0: " ✗"}).fillna("")
        return [
            (f"step {t.step}, {t.source} #{t.rollout}, {html_number(t.total, '.1f')} nats{mark}", (t.step, t.rollout))
            for t, mark in zip(own.itertuples(), marks, strict=True)
        ]

    def drawn(self) -> list[dict[str, Any]]:
        """The chosen trace as ``payload`` gives it; nothing where none is chosen."""
        if self.trace.value is None:
            return []
        step, rollout = self.trace.value
        frame = self.run.traces(step)
        (trace,) = payload(frame.query("rollout == @rollout"), Settings.at(self.run.config, frame))
        return [trace | {"title": f"{self.name}: {trace['title']}, step {step}"}]


class TraceComparison(Panel):
    """Two traces of the same question, token by token: where they agree, and how much more probable each token became.

    a, b: runs or their folders; without ``b`` both sides show ``a``. step_a, step_b: whose traces a side offers
    (default: every step's; of a run of many files the last one's at first). With two runs both sides start with prior
    traces, else B with the posterior's. Only questions that both sides hold are listed. ``agreement`` is (tokens in
    common, sum over them of log p in B minus log p in A, nats). ConfigError where there is no such question.
    """

    def __init__(
        self,
        a: Run | str | Path,
        b: Run | str | Path | None = None,
        *,
        step_a: int | None = None,
        step_b: int | None = None,
        question: str = "",
        colour: str = "difference",
    ) -> None:
        runs = [open_run(run, step)[0] for run, step in ((a, step_a), (a if b is None else b, step_b))]
        other = "posterior" if b is None and step_a == step_b else "prior"
        self.a, self.b = _Side("A", runs[0], step_a, "prior"), _Side("B", runs[1], step_b, other)
        self.agreement: tuple[int, float] = 0, 0.0
        self.questions = Table(label="questions of both sides", columns=_COLUMNS, sort=["gain", True])
        self.heading, self.view = widgets.HTML(), TokenView(colour=colour)
        self.colour = self.view.chooser()
        for side in (self.a, self.b):
            for control in (side.step, side.source):
                control.observe(self._list, names="value")
            side.trace.observe(self._show, names="value")
        self.questions.observe(self._list, names="sort")
        self.questions.observe(self._open, names="picked")
        sides = [self.a.widget, self.b.widget]
        self.widget = widgets.VBox([*sides, self.questions, self.heading, self.colour, self.view])
        self.widget.add_class("covrl-side-by-side")
        self._list()
        if self.listed.empty or (question and question not in set(self.listed["id"])):
            for side, step in ((self.a, step_a), (self.b, step_b)):  # other steps may have it
                side.step.value = step or 0
        if self.listed.empty:
            both = " and ".join(str(run.path) for run in runs)
            raise ConfigError(f"{both} have no question in common; compare runs of one task and seed")
        names = list(self.listed["id"])
        if question and question not in names:
            raise ConfigError(f"both sides have no question {question!r}{did_you_mean(question, names)}")
        self.questions.picked = question or self.questions.picked

    @in_turn
    def _list(self, change: Any = None) -> None:
        sides = {side.name.lower(): side.offered() for side in (self.a, self.b)}
        means = [frame.groupby("example_id")["total"].mean().rename(name) for name, frame in sides.items()]
        texts = self.a.index.drop_duplicates("example_id").set_index("example_id")[["question", "answer"]]
        listed = pd.concat(means, axis=1, join="inner").join(texts)
        listed = listed.assign(gain=listed["b"] - listed["a"]).rename_axis("id").reset_index()
        self.listed = listed.astype({"id": str})
        empty = "the two sides have no question in common; choose other steps or sources"
        self.questions.fill(self.listed, _MOST_QUESTIONS, empty=empty)
        if self.questions.picked not in set(self.listed["id"]):
            self.questions.picked = self.questions.rows[0]["id"] if len(listed) else ""
        elif change is not None and change["name"] == "value":
            self._open()

    @in_turn
    def _open(self, change: Any = None) -> None:
        self.questions.marked = [self.questions.picked]
        for side in (self.a, self.b):
            choices = side.choices(self.questions.picked)
            offer(side.trace, choices, choices[0][1] if choices else None, self._show)
        self._show()

    @in_turn
    def _show(self, change: Any = None) -> None:
        traces: Sequence[dict[str, Any]] = [*self.a.drawn(), *self.b.drawn()]
        with self.view.hold_sync():
            self.view.selected = []
            common = align(*traces) if len(traces) == 2 else 0
            self.view.traces = list(traces)
        moved = sum(x or 0.0 for x in traces[1]["values"]["difference"]) if common else 0.0
        self.agreement = common, moved
        self.heading.value = self._heading(traces) if len(traces) == 2 else ""

    def _heading(self, traces: Sequence[dict[str, Any]]) -> str:
        first = self.listed[self.listed["id"] == self.questions.picked].iloc[0]
        lengths, (common, moved) = [len(trace["tokens"]) for trace in traces], self.agreement
        return alarms_html(self.a.run.damage | self.b.run.damage) + (
            f'<div style="line-height: 1.5; overflow-wrap: anywhere">{html_passage(first["question"])}'
            f"reference answer <b><bdi>{html_text(first['answer'])}</bdi></b><br>"
            f"<b>{common}</b> tokens in common, of {lengths[0]} in A and {lengths[1]} in B; over them log p in B is "
            f"<b>{html_number(moved, '+.2f')}</b> nats against A</div>"
        )

    def static(self) -> list[Any]:
        """The chosen question with both traces as HTML."""
        return [HTML(self.heading.value + traces_html(self.view.traces, self.view.colour))]
