"""The trace explorer: prior against posterior traces of a run, token by token."""

import functools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import ipywidgets as widgets
import numpy as np
import pandas as pd
import plotly.graph_objects as go
from IPython.display import HTML

from ..config import RunConfig
from ..runs.folder import INDEX_COLUMNS, Run
from ..runs.notes import keep, noted, read_notes
from ..runs.reweight import Settings, Traces, answer_logprob, quantities
from ..types import ConfigError, Example, did_you_mean
from .html import alarms_html, html_passage, html_text, verdict
from .token_figures import plot_token_lines
from .token_view import SCALES, TokenView, spelled, token_html
from .widgets import (
    HIDDEN,
    Panel,
    Plot,
    Table,
    Take,
    field,
    in_turn,
    named,
    offer,
    open_run,
    row,
    step_choices,
    table_column,
)

_ALL = "mean log p(y|x,z) of all its {} traces, nats, whatever the filters leave"
_QUESTION_COLUMNS = [
    table_column("step", "step", "number"),
    table_column("question", "question", "text"),
    table_column("answer", "answer", "text", "reference answer y"),
    table_column("prior", "prior", "number", _ALL.format("prior"), 1),
    table_column("posterior", "posterior", "number", _ALL.format("posterior"), 1),
    table_column("right", "right", "number", "share of all its traces after which the model's own answer is right", 2),
]
_ROLLOUT_COLUMNS = [
    table_column("rollout", "#", "number", "number of the rollout in its step"),
    table_column("starred", "★", "star", "starred in this panel"),
    table_column("source", "source", "source", "the prompt that drew the trace"),
    table_column("right", "right", "mark", "whether the model's own answer after the trace is right"),
    table_column("prediction", "its answer", "text", "the model's own greedy answer after the trace"),
    table_column("total", "log p(y|x,z)", "number", "log p of the reference answer after the trace, nats", 1),
    table_column("reward", "reward", "number", "what the method made of it", -3),
    table_column("advantage", "A", "number", "advantage: reward against its group's", 2),
    table_column("answer_weight", "c_y", "number", "factor of the answer's log-likelihood in the loss", -3),
    table_column("length", "tokens", "number", "trace length"),
    table_column("finished", "finished", "flag", "whether the trace ended in time and in form"),
    table_column("trace", "trace", "text"),
]
_MOST_QUESTIONS = 200  # rows of the list of questions; more would be slow to draw and nobody reads them
_GROUP = ["step", "example_id"]
_STORED = INDEX_COLUMNS[:-1]
# What "show" offers -> which traces those are; the first two where verdicts are stored.
_SHOWS = {"right": "right == 1", "wrong": "right == 0", "finished": "finished == 1", "unfinished": "finished == 0"}
_SHOWS |= {name: name for name in ("starred", "reward > 0", "reward < 0", "advantage > 0", "advantage < 0")}
_SHOWS |= {"longest tenth": "length >= length.quantile(0.9)", "shortest tenth": "length <= length.quantile(0.1)"}
_FITTED = "Colours span what the two traces hold, not a fixed range"
_GAINED, _CLIPPED = "prior wrong, posterior right", "with clipped tokens"


def trace_index(run: Run, *steps: int) -> pd.DataFrame:
    """One row a rollout of the given steps (all without arguments), without the columns of one number a token.

    Columns: step, rollout, example_id, question, answer, source, trace, finished, reward, advantage, right (1, 0 or
    NaN: not known), prediction (None: not known), length (tokens), and total, log p(y|x,z) in nats.
    """
    frame = run.trace_columns(only=steps)
    if frame.empty and run.damage:
        if steps:
            return trace_index(run)
        raise ConfigError(next(iter(run.damage.values())))
    frame = _with_right(frame.assign(total=answer_logprob(frame)), run.config)
    return frame.reindex(columns=[*_STORED, "total"]).astype({"right": float})


def source_field(label: str, value: str) -> widgets.Dropdown:
    """A choice of the prompt that drew the traces; "" stands for both."""
    sources = [("all sources", ""), ("prior", "prior"), ("posterior", "posterior")]
    return field(widgets.Dropdown, label, value, "110px", HIDDEN, options=sources)


def offered(index: pd.DataFrame, step: int, source: str) -> pd.Series:
    """Which rows are of this step (0: all) and this source (empty: both)."""
    return index["step"].eq(step or index["step"]) & index["source"].eq(source or index["source"])


def _with_right(frame: pd.DataFrame, config: dict[str, Any]) -> pd.DataFrame:
    """The rows with ``right`` where it is known, also of a run of grpo that did not store it: its reward says it."""
    if "right" in frame and frame["right"].notna().any():
        return frame
    frame = frame.drop(columns=["right", "prediction"], errors="ignore")
    return frame.assign(right=frame["reward"] >= 1) if config.get("method") == "grpo" else frame


@functools.lru_cache(maxsize=4)
def _prompter(config: Path) -> Any:
    """The run's prompter, or a sentence that says why there is none; a model hub may take a minute to refuse."""
    try:
        from ..train.opening import open_task  # needs transformers

        return open_task(RunConfig.load(config))[1]
    except (ConfigError, OSError, ImportError) as error:
        return f"The prompts cannot be rebuilt: {error}"


def prompts_html(run: Run, rows: pd.DataFrame) -> str:
    """What stood around each trace, token by token, rebuilt from the run's settings; or why it cannot be rebuilt.

    The prior's prompt is followed by trace, seam and the reference answer that is scored, the posterior's by the trace.
    """
    prompter, boxes = _prompter(run.path / "config.json"), []
    if isinstance(prompter, str):
        return f"<p>{html_text(prompter)}</p>"

    def part(name: str, ids: Sequence[int]) -> str:
        decode = prompter.tokenizer.decode
        texts = spelled([decode([i]) for i in ids], decode(list(ids)))
        look = 'style="border-right: 1px solid #8886"'
        spans = "".join(f"<bdi {look}>{html_text(t, spaces=True)}</bdi>" + "<br>" * t.endswith("\n") for t in texts)
        chip = f'<b style="background: #8883; border-radius: 3px; padding: 0 4px">{name}</b>'
        return f' {chip} <code style="background: none">{spans}</code>'

    for trace in rows.itertuples():
        prompt = prompter(Example(trace.example_id, trace.question, trace.answer))
        own = part(f"{trace.source} trace, {len(trace.tokens)} tokens", ())
        rest = part("seam", prompt.seam) + part("reference answer", prompt.answer)
        lines = [part(f"prior, {len(prompt.prior)} tokens", prompt.prior) + own + rest]
        if np.ndim(trace.logq):
            lines.append(part(f"posterior, {len(prompt.posterior)} tokens", prompt.posterior) + own)
        text = "".join(f'<p dir="auto" style="overflow-wrap: anywhere">{line}</p>' for line in lines)
        boxes.append(f'<div style="flex: 1 1 300px; max-height: 320px; overflow: auto">{text}</div>')
    return f'<div style="display: flex; flex-wrap: wrap; gap: 10px">{"".join(boxes)}</div>'


def _clipped(run: Run, settings: Settings, frame: pd.DataFrame, held: dict[int, set[int]]) -> pd.DataFrame:
    """The rows whose traces hold a token that the clip holds back; ``held`` keeps what was read of each step."""
    for step in set(frame["step"]) - set(held):
        traces = run.traces(step)
        values = quantities(Traces.of(traces), settings).get("clipped", np.zeros((len(traces), 1)))
        held[step] = set(traces["rollout"][np.nansum(values, 1) > 0])
    return frame[[rollout in held[step] for step, rollout in zip(frame["step"], frame["rollout"], strict=True)]]


class TraceExplorer(Panel):
    """Prior against posterior traces of one question, token by token.

    run: a ``Run`` or its folder; step, question, colour, rollouts: where to start (default: the last step with traces,
    its first ``example_id``, log q - log p, the likeliest of each source). The search box looks in questions, reference
    answers and traces. One step's traces are in memory. ``refresh``, or its button, shows what a run has written since.
    """

    def __init__(
        self, run: Run | str | Path, step: int | None = None, question: str = "", colour: str = "", rollouts: Any = ()
    ):
        run, step = open_run(run, step)
        self.run, self._frame, self._shown, self._unwritten = run, pd.DataFrame(), {}, {}
        self.settings, self.found = Settings.of(self.run.config), widgets.HTML()
        self._read(*[step] * run.long)  # a filter reads all

        shown = step if step in set(self.index["step"]) else 0  # all
        self.step = field(widgets.Dropdown, "step", shown, "110px", HIDDEN, options=self._offered)
        self.search = widgets.Text(placeholder="search questions, answers, traces", layout={"flex": "1 1 150px"})
        self.source = source_field("source", "")
        judged = self.index["source"][self.index["right"].notna()].nunique()  # of how many sources verdicts are known
        shows = ["all traces", *list(_SHOWS)[0 if judged else 2 :], *[_GAINED] * (judged > 1), _CLIPPED]
        self.show = field(widgets.Dropdown, "show", shows[0], "230px", "40px", options=shows)
        self.again = self.refresh_button()
        narrow, wide = {"flex": "2 1 330px", "min_width": "0"}, {"flex": "3 1 480px", "min_width": "0"}
        self.questions = Table(label="questions", columns=_QUESTION_COLUMNS[: None if judged else -1], layout=narrow)
        self.rollouts = Table(label="rollouts of the question", sort=["total", True], layout=wide)
        self.heading, self.seen = widgets.HTML(), widgets.HTML()
        colour = colour or ("log_gap" if "posterior" in set(self.index["source"]) else "logp")
        self.view = TokenView(colour=colour)
        self.colour = self.view.chooser()
        self.fitted = field(widgets.Checkbox, "fitted range", False, "110px", indent=False, tooltip=_FITTED)
        self.prompts = widgets.ToggleButton(description="Show prompts", layout={"width": "auto"})
        self.plot = Plot(lambda point: self.view.set_trait("selected", [self.view.selected[0], int(point["x"]) - 1]))
        self.plot.layout.min_height = "250px"
        self.take = Take({label: functools.partial(make, self) for label, make in _TAKEN.items()})

        for control in (self.step, self.search, self.source, self.show):
            control.observe(self._list_questions, names="value")
        self.questions.observe(self._list_questions, names="sort")
        self.questions.observe(lambda change: self.choose(change.new), names="picked")
        self.rollouts.observe(self._list_rollouts, names="sort")
        self.rollouts.observe(lambda change: self._pick(int(change.new)), names="picked")
        widgets.dlink((self.fitted, "value"), (self.view, "fitted"))
        self.view.observe(self._draw_lines, names=["selected", "colour"])
        self.view.observe(self._keep_notes, names="notes")
        self.prompts.observe(self._show_prompts, names="value")

        filters = row(named(run), self.step, self.search, self.source, self.show, self.again, self.found)
        tables, looks = row(self.questions, self.rollouts), row(self.colour, self.fitted, self.prompts, self.take)
        self.widget = widgets.VBox([filters, tables, self.heading, looks, self.view, self.seen, self.plot])
        self.widget.add_class("covrl-explorer")
        self._list_questions()
        _choose(self, step, question, rollouts)

    # --- what is there

    def _read(self, *only: int) -> None:
        self.run, self._only = self.run.forgiving(), only
        self.notes = read_notes(self.run) | self._unwritten
        self.index = noted(trace_index(self.run, *only), self.notes)
        text = (self.index[name].astype(str) for name in ("question", "answer", "trace"))
        self._haystack = next(text).str.cat(list(text), sep="\n").str.lower()
        means = self.index.pivot_table("total", _GROUP, "source", "mean", sort=False, observed=True)
        means["right"] = self.index.groupby(_GROUP)["right"].mean()
        self._means = means.reindex(columns=["prior", "posterior", "right"]).reset_index()
        self._offered = step_choices(self.run.steps if only else self.index["step"].unique().tolist())
        self._step, self._held = 0, {}  # whose traces are in memory; step -> rollouts with clipped tokens

    def refresh(self) -> None:
        """Read the run folder again; filters, order and what is chosen stay as they are."""
        self._read(*self._only)
        _prompter.cache_clear()
        kept = self.step.value
        offer(self.step, self._offered, kept if kept in dict(self._offered).values() else 0, self._list_questions)
        picked = self.questions.picked
        self._list_questions()
        if picked and picked == self.questions.picked:
            _open_again(self, picked)

    # --- what is chosen

    def filtered(self) -> pd.DataFrame:
        """The rows of ``index`` that the filters and the search leave."""
        keep, show = offered(self.index, self.step.value, self.source.value), self.show.value
        if sought := self.search.value.strip().lower():
            keep &= self._haystack.str.contains(sought, regex=False)
        if show in _SHOWS:
            keep &= self.index.eval(_SHOWS[show])
        if show == _GAINED:
            best = self.index.pivot_table("right", _GROUP, "source", "max").query("prior == 0 and posterior == 1")
            keep &= pd.MultiIndex.from_frame(self.index[_GROUP]).isin(best.index)
        frame = self.index[keep]
        return _clipped(self.run, self.settings, frame, self._held) if show == _CLIPPED else frame

    @in_turn
    def _list_questions(self, change: Any = None) -> None:
        if self._only and change is not None and change["name"] == "value":
            self.found.value = "reading all steps …"
            self._read()
        frame = self._left = self.filtered()
        steps, total = len(self._offered) - 1, "" if self._only else f", {len(self.index):,} traces"
        left = f", {len(frame):,} in the list" if self._only or len(frame) < len(self.index) else ""
        self.found.value = f"{steps:,} step{'s' * (steps != 1)}{total}{left}"
        listed = frame.drop_duplicates(_GROUP)[[*_GROUP, "question", "answer"]].merge(self._means, on=_GROUP)
        listed["id"] = listed["step"].astype(str) + "/" + listed["example_id"].astype(str)
        self.questions.fill(listed, _MOST_QUESTIONS, empty="no trace fits; clear the search, or choose other filters")
        if self.questions.picked not in set(listed["id"]):
            self.questions.picked = self.questions.rows[0]["id"] if len(listed) else ""
        elif change is None or change["name"] == "value":
            before, self._shown = self._shown, self._likeliest()
            self._list_rollouts() if before == self._shown else self._show()

    @in_turn
    def choose(self, question: str) -> None:
        """Show a question, named "step/example_id", with the likeliest trace of each source; "" shows none."""
        step, _, example = question.partition("/")
        self._question = step, _ = int(step or 0), example
        if step and step != self._step:
            self._step, self._all = step, _with_right(self.run.traces(step), self.run.config)
            self.settings = Settings.at(self.run.config, self._all)
        frame = self._all[self._all["example_id"] == example].reset_index(drop=True)
        frame = noted(frame, self.notes).assign(total=answer_logprob(frame), length=frame["tokens"].map(len))
        frame["id"] = frame["rollout"].astype(str)
        self._frame, self._shown = frame, {}
        self._shown = self._likeliest()
        self.questions.marked = [question]
        self.rollouts.columns = [c for c in _ROLLOUT_COLUMNS if c["name"] in frame]
        self._show()

    def _fits(self) -> pd.Series:
        """Which rollouts of the question the filters leave."""
        step, example = self._question
        own = self._left[(self._left["step"] == step) & (self._left["example_id"] == example)]
        return self._frame["rollout"].isin(own["rollout"])

    def _likeliest(self) -> dict[str, int]:
        """source -> the trace to show: what fits the filters first, then what is shown, then the likeliest."""
        frame = self._frame.assign(fits=self._fits(), kept=self._frame["rollout"].isin(self._shown.values()))
        best = frame.sort_values(["fits", "kept", "total"], ascending=False).drop_duplicates("source")
        return {trace.source: int(trace.rollout) for trace in best.itertuples()}

    @in_turn
    def _pick(self, rollout: int) -> None:
        found = self._frame[self._frame["rollout"] == rollout]
        if len(found):
            self._shown[found["source"].iloc[0]] = rollout
            self._show()

    def pair(self) -> pd.DataFrame:
        """The rows that are shown token by token, the prior's first."""
        chosen = [self._shown[source] for source in ("prior", "posterior") if source in self._shown]
        return self._frame.set_index("rollout", drop=False).loc[chosen]

    @in_turn
    def _keep_notes(self, change: Any) -> None:
        if keep(self.run, self.notes, self._unwritten, change.new):
            self.index, self._frame = noted(self.index, self.notes), noted(self._frame, self.notes)
            self.heading.value = _heading(self.run, self.settings, self._frame)
            self._list_rollouts()

    # --- what is drawn

    @in_turn
    def _list_rollouts(self, change: Any = None) -> None:
        kept = self._frame[self._fits()]
        self.rollouts.fill(kept, len(kept), [str(rollout) for rollout in self._shown.values()])
        if len(kept) < len(self._frame):
            self.rollouts.note = f"{len(kept)} of the question's {len(self._frame)} traces; filters hide the others"

    def _show(self) -> None:
        self._list_rollouts()
        self.heading.value = _heading(self.run, self.settings, self._frame)
        self.view.show(self.pair(), self.settings)
        # Start where prior and posterior disagree most.
        gaps = [np.abs(t["values"].get("log_gap", t["values"]["logp"])) for t in self.view.traces]
        side = int(np.argmax([gap.max() for gap in gaps])) if gaps else 0
        self.view.selected = [side, int(gaps[side].argmax())] if gaps else []
        self.plot.figure = self.plot.figure if gaps else ""
        self._show_prompts()

    def lines(self) -> go.Figure:
        """The selected token's trace as lines; an empty figure where no trace is shown."""
        return _lines(self.view) if self.view.traces else go.Figure()

    @in_turn
    def _draw_lines(self, change: Any = None) -> None:
        if self.view.selected:
            self.plot.draw(self.lines())

    @in_turn
    def _show_prompts(self, change: Any = None) -> None:
        self.seen.value = "loading the tokenizer …" if change and self.prompts.value else ""
        if self.prompts.value and self._shown:
            self.seen.value = prompts_html(self.run, self.pair())

    def static(self) -> list[Any]:
        """The chosen question's rollouts, the two traces and the lines, as HTML and a plotly figure."""
        tables = self.rollouts.html(texts=False) + token_html(self.pair(), self.settings, self.view.colour)
        return [HTML(self.heading.value + tables + self.seen.value), self.lines()]


def _open_again(explorer: TraceExplorer, question: str) -> None:
    """Show the same question, traces and token, as the files hold them now."""
    shown, at = list(explorer._shown.values()), explorer.view.selected
    explorer.choose(question)
    for rollout in shown:
        explorer._pick(rollout)
    sides = explorer.view.traces[at[0] : at[0] + 1] if at else []
    if any(at[1] < len(trace["tokens"]) for trace in sides):
        explorer.view.selected = at


def _choose(explorer: TraceExplorer, step: int, question: str, rollouts: Sequence[int]) -> None:
    """Show a question of the step, and these of its traces. ConfigError for what is not there."""
    names = set(explorer.index["example_id"][explorer.index["step"] == step])
    if question and question not in names:
        raise ConfigError(f"step {step} has no question {question!r}{did_you_mean(question, names)}")
    explorer.questions.picked = f"{step}/{question}" if question else explorer.questions.picked
    known = [row["rollout"] for row in explorer.rollouts.rows]
    for rollout in rollouts:
        if rollout not in known:
            raise ConfigError(f"the question has no rollout {rollout!r} at step {step}; it has {known}")
        explorer._pick(rollout)


def _lines(view: TokenView) -> go.Figure:
    side, at = view.selected or [0, None]
    trace, name = view.traces[side], view.colour
    figure = plot_token_lines(trace["tokens"], trace["values"], name, SCALES[name]["title"], at)
    prompts = "both prompts" if "logq" in trace["values"] else "the prior prompt"
    title = f"The {trace['title']} under {prompts} {verdict(trace['right'])}"
    return figure.update_layout(title_text=title.strip(), margin={"t": 60})


def _json(explorer: TraceExplorer) -> tuple[str, str]:
    """File name and text: the traces that are shown, with what every token was worth."""
    pair = explorer.pair()
    names = [name for name in (*_STORED, "tokens", "token_ids") if name in pair]
    pair = pair[names].assign(values=[trace["values"] for trace in explorer.view.traces])
    return f"{explorer.run.path.name}-tokens.json", pair.to_json(orient="records", indent=1)


def _line(explorer: TraceExplorer) -> tuple[str, str]:
    """The code that opens the explorer at the same question and traces, without its filters."""
    step, _, question = explorer.questions.picked.partition("/")
    place = f"{explorer.run.path.as_posix()!r}, {step or None}, {question!r}"
    shown = sorted(explorer._shown.values())
    return "", f"TraceExplorer({place}, colour={explorer.view.colour!r}, rollouts={shown})"


_TAKEN = {"Tokens as JSON": _json, "Copy this view": _line}
_TAKEN["Rows as CSV"] = lambda explorer: (f"{explorer.run.path.name}.csv", explorer.filtered().to_csv(index=False))


def _heading(run: Run, settings: Settings, frame: pd.DataFrame) -> str:
    """Question, reference answer, verdicts and the run's settings as HTML; ``frame`` holds the question's rows."""
    if frame.empty:
        return alarms_html(run.damage)
    first, s = frame.iloc[0], settings
    named = [run.path.name, f"step {first['step']}", run.config.get("model", "")]
    named += [f"α {s.alpha:g}, w {s.composite_weight:g}, clip {s.clip} {s.clip_range:g}"]
    if "right" in frame:
        groups = frame.groupby("source", sort=False)["right"]
        named += [f"{source} {rows.eq(True).sum()} of {rows.notna().sum()} right" for source, rows in groups]
    code = f'<code style="background: none; font: inherit"><bdi>{html_text(first["answer"])}</bdi></code>'
    return (
        f'{alarms_html(run.damage)}<div style="line-height: 1.5; overflow-wrap: anywhere">'
        f'<div style="font-size: 1.1em">{html_passage(first["question"])}</div>'
        f"reference answer <b>{code}</b><br>"
        f'<span style="opacity: 0.75">{html_text(" · ".join(map(str, named)))}</span></div>'
    )
