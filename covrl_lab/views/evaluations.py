"""Held-out questions through training: which the model learned, gained and lost, and what it wrote each time."""

from pathlib import Path
from typing import Any

import ipywidgets as widgets
import pandas as pd
import plotly.graph_objects as go
from IPython.display import HTML

from ..runs.folder import Run, load_run
from ..runs.questions import OUTCOMES, between, by_learning, history
from ..runs.stats import mcnemar, paired_interval
from ..types import ConfigError
from .html import alarms_html, figure_text, html_number, html_passage, html_table, html_text, verdict
from .style import BOTH, POSTERIOR, TEMPLATE, text_colour
from .widgets import Panel, Plot, Table, field, in_turn, named, offer, row, step_choices, table_column

_COLUMNS = [
    table_column("question", "question", "text"),
    table_column("answer", "answer", "text", "reference answer y"),
    table_column("before", "said before", "text", "the model's own answer at the first of the two steps"),
    table_column("after", "said after", "text", "the model's own answer at the second of the two steps"),
    table_column("learned", "learned", "text", "from when on every answer was right"),
]
_ALL = "all questions"
_MOST_ROWS = 500  # of the list; the heat map holds all
_LISTED = 20  # questions of each list where nothing can be scrolled


def plot_questions(rows: pd.DataFrame) -> go.Figure:
    """Scores of all answers, a row a question (the soonest learned on top), a column an evaluation.

    rows: ``questions.history``.
    """
    order = by_learning(rows)
    said = [
        f"{verdict(right)}: it said {figure_text(prediction, 40, 2)}{'' if finished else '<br>trace unfinished'}"
        for right, prediction, finished in zip(rows["right"], rows["prediction"], rows["finished"], strict=True)
    ]
    table = rows.assign(said=said).pivot(index="example_id", columns="step", values=["score", "said"])
    table, count = table.loc[order["example_id"]], len(order)
    # Names of the rows, as each of a thousand questions stands in the page once, and not with every answer.
    names = [
        f"{place}. {figure_text(r.question, 60, 3)}<br>reference answer {figure_text(r.answer, 40, 2)}"
        for place, r in enumerate(order.itertuples(), 1)
    ]
    height = int(min(700, max(220, 90 + 14 * count)))
    figure = go.Figure(layout={"template": TEMPLATE, "height": height, "margin": {"t": 40, "b": 45}})
    z, steps = table["score"].astype(float), [str(step) for step in table["score"]]
    look = {"colorscale": [[0, "rgba(213, 94, 0, 0.28)"], [1, BOTH]], "showscale": False}
    # Of cells that are no larger than their gaps nothing is drawn.
    look |= {"xgap": 2 * (len(steps) <= 60), "ygap": int(3 * count <= height)}
    look["hovertemplate"] = "%{y}<br>step %{x}: %{text}<extra></extra>"
    figure.add_heatmap(x=steps, y=names, z=z, zmin=0, zmax=1, text=table["said"], **look)
    groups = order.reset_index().groupby("learned", sort=False)["index"].agg(["mean", "size"])
    groups = groups[groups["size"] * (height - 90) >= 14 * count]  # a label needs the height of its text
    figure.update_xaxes(title_text="after step", type="category", showgrid=False)
    labels = [f"{name}: {size}" for name, size in groups["size"].items()]
    look = {"type": "category", "autorange": "reversed", "showgrid": False}
    figure.update_yaxes(tickvals=groups["mean"], ticktext=labels, **look)
    return figure.update_layout(title_text="Green: right, orange: wrong; a row is a question")


def change_html(listed: pd.DataFrame, before: int, after: int) -> str:
    """Counts, paired change, McNemar's p and, folded, the first gained and lost of ``questions.between``."""
    counts = {kind: int((listed["outcome"] == kind).sum()) for kind in OUTCOMES.values()}
    gained, lost, count = counts["gained"], counts["lost"], sum(counts.values())
    change, low, high = (html_number(100 * value, "+.1f") for value in paired_interval(gained, lost, count))
    cells = [f'<b data-outcome="{kind}">{number}</b>' for kind, number in counts.items()]
    cells += [f"<b>{change}</b> ({low} to {high})", f"{mcnemar(gained, lost):.2g}"]
    table = html_table([*counts, "change in points of accuracy (95%)", "McNemar's exact p"], [cells])
    parts = [f"<p>From step {before} to step {after}, {count} questions:</p>{table}"]
    for kind in ("gained", "lost"):
        first = listed[listed["outcome"] == kind].head(_LISTED)
        texts = first[["question", "answer", "before", "after"]].to_numpy()
        lines = [[html_passage(asked), *map(html_text, said)] for asked, *said in texts]
        left = f", the first {_LISTED}" if counts[kind] > _LISTED else ""
        table = html_table(["question", "y", f"said at step {before}", f"said at step {after}"], lines)
        parts.append(f"<details><summary>{kind}: {counts[kind]}{left}</summary>{table}</details>")
    return "".join(parts)


def question_html(rows: pd.DataFrame) -> str:
    """One question's answers side by side; ``rows`` are those of the question in ``questions.history``."""
    cards = []
    for r in rows.to_dict("records"):
        colour = BOTH if r["right"] else POSTERIOR
        said = f'<span style="color: {text_colour(colour)}">{verdict(r["right"])}</span>'
        score = "" if r["score"] in (0, 1) else f", score {r['score']:.2g}"
        nats, ended = r.get("answer_logp"), "" if r["finished"] else ", unfinished"
        likely = "" if nats is None or nats != nats else f", log p(y|x,z) {html_number(nats, '.1f')} nats"
        cards.append(
            f'<div data-step="{r["step"]}" style="flex: 1 1 140px; max-width: 420px; border-top: 3px solid {colour}; '
            f'overflow-wrap: anywhere"><b>step {r["step"]}</b> {said}{score}'
            f'<br>it said <b class="covrl-said">{html_text(r["prediction"])}</b>{likely}'
            f'<div style="opacity: 0.75">trace, {html_text(r["trace_tokens"])} tokens{ended}</div>'
            f'<div class="covrl-trace-text">{html_passage(r["trace"])}</div></div>'
        )
    question, answer = (rows[name].iloc[0] for name in ("question", "answer"))
    head = f"<div>{html_passage(question)}reference answer <b><code>{html_text(answer)}</code></b></div>"
    side_by_side = f'<div style="display: flex; flex-wrap: wrap; gap: 10px">{"".join(cards)}</div>'
    return f'<div class="covrl-question" style="line-height: 1.5">{head}{side_by_side}</div>'


class EvaluationBrowser(Panel):
    """Held-out questions through a run's evaluations, from its files alone.

    run: a ``Run`` or its folder; before, after: the steps to compare (default: the first and the last). A click on
    the heat map, or the list with the arrow keys, opens a question: trace, answer and score at every step.
    ConfigError where the run has no evaluation of a step.
    """

    def __init__(self, run: Run | str | Path, before: int | None = None, after: int | None = None):
        self.run = (run if isinstance(run, Run) else load_run(run)).forgiving()
        self.history = history(self.run)
        self.heat_map = plot_questions(self.history)
        steps = self.history["step"].unique().tolist()
        before, after = steps[0] if before is None else before, steps[-1] if after is None else after
        if missing := {before, after} - set(steps):
            raise ConfigError(f"{self.run.path} has no evaluation of step {min(missing)}; it has {steps}")
        offered, kinds = step_choices(steps)[1:], [_ALL, *OUTCOMES.values()]
        self.before = field(widgets.Dropdown, "from", before, "150px", "40px", options=offered)
        self.after = field(widgets.Dropdown, "to", after, "130px", "20px", options=offered)
        self.show = field(widgets.Dropdown, "show", _ALL, "230px", "40px", options=kinds)
        self.change, self.question = widgets.HTML(), widgets.HTML()
        self.questions = Table(label="held-out questions", columns=_COLUMNS)
        half = {"flex": "1 1 420px", "min_width": "0"}
        self.plot = Plot(self._pick, layout=half)
        for control in (self.before, self.after, self.show):
            control.observe(self._list, names="value")
        self.questions.observe(self._list, names="sort")
        self.questions.observe(self._open, names="picked")
        beside = row(self.plot, widgets.VBox([self.questions, self.question], layout=half))
        filters = row(named(self.run), self.before, self.after, self.show, self.refresh_button())
        self.widget = widgets.VBox([filters, self.change, beside])
        self.widget.add_class("covrl-evaluations")
        self._list()
        self.questions.picked = self.listed["id"].iloc[0]

    def refresh(self) -> None:
        """Read the evaluations again; steps, list and question stay."""
        self.run = self.run.forgiving()
        self.history = history(self.run)
        self.heat_map = plot_questions(self.history)
        steps = self.history["step"].unique().tolist()
        for choice, end in ((self.before, steps[0]), (self.after, steps[-1])):
            offer(choice, step_choices(steps)[1:], choice.value if choice.value in steps else end, self._list)
        self._list()
        self._open()

    @in_turn
    def _list(self, change: Any = None) -> None:
        pair = self.before.value, self.after.value
        self.listed = listed = between(self.history, *pair).rename(columns={"example_id": "id"})
        kept = listed if self.show.value == _ALL else listed[listed["outcome"] == self.show.value]
        self.questions.fill(kept, _MOST_ROWS)
        self.change.value = alarms_html(self.run.damage or {}) + change_html(listed, *pair)

    def _pick(self, at: dict[str, Any]) -> None:
        self.questions.picked = self.listed["id"][int(at["y"].split(".")[0]) - 1]

    @in_turn
    def _open(self, change: Any = None) -> None:
        self.questions.marked = [self.questions.picked]
        self.question.value = question_html(self.history[self.history["example_id"] == self.questions.picked])
        place = self.listed.index[self.listed["id"] == self.questions.picked][0]
        ends = {"x0": 0, "x1": 1, "y0": place - 0.5, "y1": place + 0.5}
        framed = go.Figure(self.heat_map).add_shape(type="rect", xref="paper", line_color=POSTERIOR, **ends)
        self.plot.draw(framed)

    def static(self) -> list[Any]:
        """Heat map, what was gained and lost, and the chosen question, as a plotly figure and HTML."""
        return [self.heat_map, HTML(self.change.value + self.question.value)]
