"""Held-out questions through training: which the model learned, gained and lost, and what it wrote each time."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import ipywidgets as widgets
import pandas as pd
import plotly.graph_objects as go
from IPython.display import HTML

from ..runs.folder import Run, load_run
from ..runs.questions import by_learning, history, outcomes
from ..runs.stats import mcnemar, paired_interval
from ..types import ConfigError
from .html import figure_text, html_number, html_table, html_text
from .style import BOTH, GREY, POSTERIOR, TEMPLATE
from .widgets import Panel, Plot, Table, field, offer, row, table_column

_COLUMNS = [
    table_column("question", "question", "text"),
    table_column("answer", "y", "text", "reference answer y"),
    table_column("before", "said before", "text", "the model's own answer at the first of the two steps"),
    table_column("after", "said after", "text", "the model's own answer at the second of the two steps"),
    table_column("learned", "learned", "text", "from when on every answer was right"),
]
_KINDS = ("gained", "lost", "right at both", "wrong at both")
_MOST_ROWS = 500  # of the list; the heat map holds all
_LISTED = 20  # questions of each list where nothing can be scrolled


def plot_questions(rows: pd.DataFrame, chosen: str = "") -> go.Figure:
    """Right and wrong answers, a row a question (the soonest learned on top), a column an evaluation.

    rows: ``questions.history``. The question with the id ``chosen`` is framed.
    """
    order, steps = by_learning(rows), sorted(rows["step"].unique())

    def table(values: pd.Series) -> pd.DataFrame:
        return rows.assign(v=values).pivot(index="example_id", columns="step", values="v").loc[order["example_id"]]

    said = [
        f"{figure_text(r.question, 60, 3)}<br>it said {figure_text(r.prediction, 40, 2)}, "
        f"reference answer {figure_text(r.answer, 40, 2)}{'' if r.finished else '<br>trace unfinished'}"
        for r in rows.itertuples()
    ]
    height = int(min(700, max(220, 90 + 14 * len(order))))
    figure = go.Figure(layout={"template": TEMPLATE, "height": height, "margin": {"t": 40, "r": 40, "b": 45}})
    figure.add_heatmap(
        z=table(rows["score"]),
        x=[str(step) for step in steps],
        y=list(range(len(order))),
        text=table(pd.Series(said, rows.index)),
        zmin=0,
        zmax=1,
        colorscale=[[0, "rgba(213, 94, 0, 0.28)"], [1, BOTH]],
        showscale=False,
        xgap=2,
        ygap=1,
        hovertemplate="step %{x}: %{text}<extra></extra>",
    )
    ids = list(order["example_id"])
    if chosen in ids:
        place = {"xref": "paper", "x0": 0, "x1": 1, "y0": ids.index(chosen) - 0.5, "y1": ids.index(chosen) + 0.5}
        figure.add_shape(type="rect", line={"color": POSTERIOR, "width": 2}, **place)
    sizes = order["learned"].value_counts(sort=False)
    ends = sizes.cumsum()
    large = sizes[sizes * (height - 90) >= 14 * len(order)]  # a label needs the height of its text
    figure.update_xaxes(title_text="after step", type="category", showgrid=False)
    figure.update_yaxes(
        tickvals=[ends[name] - count / 2 - 0.5 for name, count in large.items()],
        ticktext=[f"{name}: {count}" for name, count in large.items()],
        range=[len(order) - 0.5, -0.5],
        showgrid=False,
        zeroline=False,
    )
    return figure.update_layout(title_text="Green: right, orange: wrong; a row is a question")


def change_html(rows: pd.DataFrame, before: int, after: int) -> str:
    """What was gained and lost between two steps: counts, the paired change with its interval, McNemar's p."""
    counts = outcomes(rows, before, after).value_counts()
    numbers = {kind: int(counts.get(kind, 0)) for kind in _KINDS}
    gained, lost, count = numbers["gained"], numbers["lost"], sum(numbers.values())
    change, low, high = (html_number(100 * value, "+.1f") for value in paired_interval(gained, lost, count))
    cells = [f'<b data-outcome="{kind}">{number}</b>' for kind, number in numbers.items()]
    cells += [f"<b>{change}</b> ({low} to {high})", f"{mcnemar(gained, lost):.2g}"]
    header = [*_KINDS, "change in points of accuracy (95%)", "McNemar's exact p"]
    return f"<p>From step {before} to step {after}, {count} questions:</p>{html_table(header, [cells])}"


def lists_html(rows: pd.DataFrame, before: int, after: int) -> str:
    """The first questions gained and lost, with what the model said at both steps."""
    order, found, parts = by_learning(rows), outcomes(rows, before, after), []
    said = rows.set_index(["example_id", "step"])["prediction"]
    for kind in ("gained", "lost"):
        own = order[order["example_id"].map(found) == kind]
        lines = [
            [html_text(text) for text in (r.question, r.answer, said[r.example_id, before], said[r.example_id, after])]
            for r in own.head(_LISTED).itertuples()
        ]
        left = f", the first {_LISTED}" if len(own) > _LISTED else ""
        table = html_table(["question", "y", f"said at step {before}", f"said at step {after}"], lines)
        parts.append(f"<details><summary>{kind}: {len(own)}{left}</summary>{table}</details>")
    return "".join(parts)


def question_html(rows: pd.DataFrame) -> str:
    """One question's answers side by side; ``rows`` are those of the question in ``questions.history``."""
    first, cards = rows.iloc[0], []
    for r in rows.sort_values("step").to_dict("records"):
        colour, verdict = (BOTH, "✓ right") if r["right"] else (POSTERIOR, "✗ wrong")
        score = "" if r["score"] in (0, 1) else f", score {r['score']:.2g}"
        nats, ended = r.get("answer_logp"), "" if r["finished"] else ", unfinished"
        likely = "" if nats is None or nats != nats else f", log p(y|x,z) {html_number(nats, '.1f')} nats"
        trace = "<br>".join(map(html_text, r["trace"].split("\n")))
        cards.append(
            f'<div data-step="{r["step"]}" style="flex: 1 1 210px; max-width: 420px; border-top: 3px solid {colour}; '
            'padding: 2px 8px 6px 0; overflow-wrap: anywhere">'
            f'<b>step {r["step"]}</b> <span style="color: {colour}">{verdict}</span>{score}<br>'
            f'it said <b class="covrl-said">{html_text(r["prediction"])}</b>{likely}'
            f'<div style="color: {GREY}">trace, {r["trace_tokens"]} tokens{ended}</div>'
            f'<code class="covrl-trace-text" style="background: none; padding: 0">{trace}</code></div>'
        )
    question, answer = (f"<code>{html_text(first[name])}</code>" for name in ("question", "answer"))
    return (
        '<div class="covrl-question" style="line-height: 1.5">'
        f"<p><b>{question}</b> reference answer <b>{answer}</b></p>"
        f'<div style="display: flex; flex-wrap: wrap; gap: 10px">{"".join(cards)}</div></div>'
    )


class EvaluationBrowser(Panel):
    """Held-out questions through a run's evaluations, from its files alone.

    run: a ``Run`` or its folder; before, after: the steps to compare (default: the first and the last). A click on
    the heat map, or the list with the arrow keys, opens a question: trace, answer and score at every step.
    ConfigError where the run has no evaluation of a step.
    """

    def __init__(self, run: Run | str | Path, before: int | None = None, after: int | None = None):
        self.run = run if isinstance(run, Run) else load_run(run)
        self.history = history(self.run)
        steps = self.steps()
        before, after = steps[0] if before is None else before, steps[-1] if after is None else after
        if missing := {before, after} - set(steps):
            raise ConfigError(f"{self.run.path} has no evaluation of step {min(missing)}; it has {steps}")
        self.before = field(widgets.Dropdown, "from step", before, "150px", "70px", options=steps)
        self.after = field(widgets.Dropdown, "to step", after, "150px", "70px", options=steps)
        self.kind = field(widgets.Dropdown, "list", "all", "190px", "40px", options=["all", *_KINDS])
        self.again = widgets.Button(description="Refresh", icon="refresh", layout={"width": "auto"})
        self.change, self.question = widgets.HTML(), widgets.HTML()
        self.questions = Table(label="held-out questions", columns=_COLUMNS)
        for control in (self.before, self.after, self.kind):
            control.observe(self._list, names="value")
        self.questions.observe(self._list, names="sort")
        self.questions.observe(lambda change: self._open(), names="picked")
        self.again.on_click(lambda button: self.refresh())
        controls, half = row(self.before, self.after, self.kind, self.again), {"flex": "1 1 420px", "min_width": "0"}
        self.plot = Plot(self._click, layout=half)
        beside = row(self.plot, widgets.VBox([self.questions, self.question], layout=half))
        self.widget = widgets.VBox([controls, self.change, beside])
        self.widget.add_class("covrl-evaluations")
        self._list()
        self.questions.picked = self.order["example_id"].iloc[0]

    def steps(self) -> list[int]:
        return self.history["step"].unique().tolist()

    def refresh(self) -> None:
        """Read the evaluations again; steps, list and question stay."""
        self.history = history(self.run)
        for choice in (self.before, self.after):
            offer(choice, self.steps(), choice.value, self._list)
        self._list()
        self._open()

    def _list(self, change: Any = None) -> None:
        pair = self.before.value, self.after.value
        self.order = by_learning(self.history)
        said = self.history.pivot(index="example_id", columns="step", values="prediction").fillna("")
        ids = self.order["example_id"]
        listed = self.order.assign(id=ids, before=ids.map(said[pair[0]]), after=ids.map(said[pair[1]]))
        found = ids.map(outcomes(self.history, *pair))
        listed = listed if self.kind.value == "all" else listed[found == self.kind.value]
        self.questions.fill(listed, _MOST_ROWS, [self.questions.picked])
        self.change.value = change_html(self.history, *pair)

    def _click(self, point: dict[str, Any]) -> None:
        self.questions.picked = self.order["example_id"].iloc[int(point["y"])]

    def _chosen(self) -> pd.DataFrame:
        return self.history[self.history["example_id"] == self.questions.picked]

    def _open(self) -> None:
        self.questions.marked = [self.questions.picked]
        self.question.value = question_html(self._chosen())
        self.plot.draw(plot_questions(self.history, self.questions.picked))

    def static(self) -> list[Any]:
        """Heat map, what was gained and lost, and the chosen question, as a plotly figure and HTML."""
        pair = self.before.value, self.after.value
        page = change_html(self.history, *pair) + lists_html(self.history, *pair) + question_html(self._chosen())
        return [plot_questions(self.history), HTML(page)]
