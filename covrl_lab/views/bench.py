"""The prompt bench: traces of your own question from both prompts, before and after training."""

import contextlib
import html
import threading
from concurrent.futures import CancelledError
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import ipywidgets as widgets
import pandas as pd
import plotly.graph_objects as go
from IPython.display import HTML

from ..config import RunConfig
from ..files import read_object, readable
from ..runs.folder import SHARED, load_run, run_folders, step_file, steps_in
from ..runs.reweight import answer_logprob
from ..types import ConfigError
from .html import html_number, html_source, html_table, html_text, visible
from .style import GREY, POSTERIOR, SOURCE_COLOURS, text_colour
from .token_figures import plot_coherence
from .token_view import TokenView, token_html
from .widgets import Panel, Plot, aside, button, field, in_turn, offer, row, step_choices

if TYPE_CHECKING:
    from ..train.policy import Policy
    from ..train.prompts import Prompter


_NARROW = "205px"  # of a field; four stand side by side
USUAL = {"question": "What is 47 + 35?", "answer": "82", "temperature": 1.0, "max_tokens": 28}


class Source(NamedTuple):
    """What a name given to the bench stands for: a model, or a run with its checkpoints, step -> adapter."""

    config: RunConfig
    checkpoints: dict[int, Path]
    run_dir: Path | None = None

    def defaults(self) -> dict[str, Any]:
        """What the bench's fields hold until they are filled in: a run's own settings and first held-out question."""
        found = USUAL | {"temperature": self.config.temperature, "max_tokens": self.config.max_trace_tokens}
        steps = steps_in(self.run_dir / "evaluations") if self.run_dir else []
        asked = load_run(self.run_dir).predictions(steps[0]).head(1) if steps else pd.DataFrame()
        return found | {name: asked[name].iloc[0] for name in ("question", "answer") if len(asked)}


def find_source(name: str | Path, **settings: Any) -> Source:
    """Read a run folder, one checkpoint in it, what ``share`` wrote (a folder, "hub:OWNER/NAME"), or a model name.

    Loads no model. What is on the Hub is fetched to ``runs/hub``.
    ``settings`` are fields of RunConfig that a bare model name leaves open (task, quantization, ...).
    Raises ConfigError for a run without a checkpoint, an adapter without its settings, or a model that cannot be.
    """
    if str(name).startswith("hub:"):
        from ..train.sharing import fetch

        name = fetch(name)
    path = Path(name)
    if (about := path / SHARED).is_file():
        with readable(repr(str(about))):
            known = read_object(about)
            return Source(RunConfig.from_dict(known["settings"]), {int(known["step"]): path})
    if (path / "adapter_config.json").is_file() and path.parent.name != "checkpoints":
        raise ConfigError(f"{str(path)!r} holds an adapter without {SHARED}, which says how it was trained")
    run_dir = path.parent.parent if path.parent.name == "checkpoints" else path
    folder = run_dir / "checkpoints"
    if not (run_dir / "metrics.jsonl").exists() and not folder.is_dir():
        if path.parent != Path() and path.parent.is_dir() and not path.exists():
            raise ConfigError(f"there is no run folder {str(path.absolute())!r}; check the path")  # not a hub's name
        return Source(RunConfig(model=str(name), **settings), {})
    found = {step: step_file(folder, step, "") for step in steps_in(folder)}
    found = {step: adapter for step, adapter in found.items() if path in (run_dir, adapter)}
    if not found:
        raise ConfigError(f"{str(name)!r} holds no checkpoint yet; a run writes one every few steps")
    return Source(RunConfig.load(run_dir / "config.json"), found, run_dir)


def summary_html(frames: dict[str, pd.DataFrame]) -> str:
    """HTML table: for each weights and source the traces' log p(y|x,z) in nats, finished share and length."""
    rows = []
    for name, frame in frames.items():
        for source, own in frame.groupby("source", sort=False):
            total, weights = answer_logprob(own), html.escape(name)
            mean = f'<span data-cell="{weights}/{source}">{html_number(total.mean(), ".2f")}</span>'
            finished, length = f"{own['finished'].mean():.0%}", f"{own['tokens'].map(len).mean():.1f}"
            rows.append([weights, html_source(source), mean, html_number(total.max(), ".2f"), finished, length])
    header = ["weights", "source", "mean log p(y|x,z), nats", "best, nats", "finished", "tokens"]
    return html_table(header, rows)


def _field(kind: type, label: str, value: Any, width: str = "640px", **settings: Any) -> Any:
    return field(kind, label, value, width, "110px", **settings)


class BenchResults(Panel):
    """The lower half of the prompt bench: ``frames``, what ``probe`` gives, as table and plots."""

    places = 2

    def __init__(self) -> None:
        self.frames: dict[str, pd.DataFrame] = {}
        self.summary, self.curve = widgets.HTML(), Plot(layout={"min_height": "460px"})
        self.weights = widgets.ToggleButtons()
        self.traces = {source: _field(widgets.Dropdown, f"{source} trace", None) for source in SOURCE_COLOURS}
        self.tokens = TokenView()
        self.colour = self.tokens.chooser()
        parts = [self.summary, self.weights, *self.traces.values(), self.curve, self.colour, self.tokens]
        self.results = widgets.VBox(parts, layout={"display": "none"})
        self.weights.observe(self._list_traces, names="value")
        for choice in self.traces.values():
            choice.observe(self._show_traces, names="value")
        self.tokens.observe(self._draw_curve, names="selected")

    @in_turn
    def _show(self) -> None:
        self.summary.value = summary_html(self.frames)
        names = list(self.frames)
        kept = self.weights.value if self.weights.value in names else names[-1]
        offer(self.weights, names, kept, self._list_traces)
        self._list_traces()
        self.weights.layout.display = None if len(names) > 1 else "none"  # one is no choice
        self.results.layout.display = None

    @in_turn
    def _list_traces(self, change: Any = None) -> None:
        """Offer the traces of the chosen weights, the best of each source first."""
        frame = self.frames[self.weights.value]
        for source, choice in self.traces.items():
            own = frame[frame["source"] == source].sort_values("reward", ascending=False, kind="stable")
            nats = (html_number(reward, ".2f") for reward in own["reward"])
            texts = [f"{number} nats   {visible(text)[:90]}" for number, text in zip(nats, own["trace"], strict=True)]
            offer(choice, list(zip(texts, own.index, strict=True)), own.index[0], self._show_traces)
        self._show_traces()

    def _chosen(self) -> list[Any]:
        """The index labels of the two traces that are shown."""
        return [choice.value for choice in self.traces.values()]

    @in_turn
    def _show_traces(self, change: Any = None) -> None:
        rows = self.frames[self.weights.value].loc[self._chosen()]
        self.tokens.show(rows, alternatives=rows["alternatives"].tolist())
        self._draw_curve()

    @in_turn
    def _draw_curve(self, change: Any = None) -> None:
        self.curve.draw(self.lines())

    def lines(self) -> go.Figure:
        """The coherence curves of the chosen weights, with a line at the selected token."""
        figure = plot_coherence(self.frames[self.weights.value], self._chosen())
        if self.tokens.selected:
            figure.add_vline(self.tokens.selected[1] + 1, line={"color": GREY, "dash": "dot"})
        return figure

    def static(self) -> list[Any]:
        """The last results as HTML and a plotly figure; nothing before the first."""
        if not self.frames:
            return []
        tables = "".join(f"<h4>{html.escape(name)}</h4>{token_html(f)}" for name, f in self.frames.items())
        return [HTML(summary_html(self.frames) + tables), self.lines()]


class PromptBench(BenchResults):
    """Type a question and its answer, sample traces from both prompts, and look at them token by token.

    policy      a loaded policy with its ``prompter``, such as a trainer's (``trainer.policy``)
    model       without a policy: a model name, or a ``checkpoint``: a run folder, one in it, a shared folder, or
                "hub:OWNER/NAME"; loaded at the first click, in the background
    question, answer, temperature, max_tokens
                None: those of the run, its first held-out question
    settings    fields of RunConfig for a bare model name: task (worked examples in the prompt), quantization,
                dtype, ...

    Where there is an adapter, every question is asked twice with the same random numbers: before training
    (adapter off) and after. ``frames`` holds the last results, see ``probe``; ``widget`` is the panel. The
    kernel stays free while it works; do not train the same policy meanwhile.
    """

    def __init__(
        self,
        policy: "Policy | None" = None,
        prompter: "Prompter | None" = None,
        *,
        model: str = "smollm2-135m",
        checkpoint: str | Path | None = None,
        question: str | None = None,
        answer: str | None = None,
        k: int = 4,
        temperature: float | None = None,
        max_tokens: int | None = None,
        seed: int = 0,
        **settings: Any,
    ) -> None:
        if (policy is None) != (prompter is None):
            raise ConfigError("a policy needs its prompter, and a prompter its policy; give both or neither")
        if checkpoint and not str(checkpoint).startswith("hub:"):
            if not Path(checkpoint).exists():
                raise ConfigError(
                    f"there is no run or checkpoint {str(Path(checkpoint).absolute())!r}; check the path"
                )
            find_source(checkpoint)  # its sentence, where there is no checkpoint, comes now
        super().__init__()
        self._settings, self._given = settings, policy is not None
        self._policy, self._prompter, self._opened = policy, prompter, None
        self._cancel, self._thread = threading.Event(), None

        name = "this policy" if policy else str(checkpoint or model)
        found = [path for path in run_folders() if steps_in(path / "checkpoints")]  # where ``RunBrowser`` looks
        found.sort(key=lambda path: path.stat().st_mtime, reverse=True)
        known = ["smollm2-135m", "tiny", *map(str, found)]
        self.source = _field(widgets.Combobox, "model or run", name, options=known, disabled=self._given)
        self.step = _field(widgets.Dropdown, "checkpoint", None, _NARROW)
        given = {"question": question, "answer": answer, "temperature": temperature, "max_tokens": max_tokens}
        self._defaults = {n: value for n, value in USUAL.items() if given[n] is None}  # what stands in the fields
        asked = {n: USUAL[n] if value is None else value for n, value in given.items()}
        self.question = _field(widgets.Textarea, "question x", asked["question"], rows=2)
        self.answer = _field(widgets.Text, "answer y", asked["answer"])
        whole, real = widgets.BoundedIntText, widgets.BoundedFloatText
        self.k = _field(whole, "traces of each", k, _NARROW, min=1, max=64)
        self.temperature = _field(real, "temperature", asked["temperature"], _NARROW, min=0.01, max=10, step=0.1)
        self.max_tokens = _field(whole, "tokens at most", asked["max_tokens"], _NARROW, min=1, max=100_000)
        self.seed = _field(whole, "seed", seed, _NARROW, max=2**31 - 1)
        self.generate = button("Generate", self.start, "play", button_style="primary")
        self.cancel = button("Cancel", self._cancel.set, "stop", disabled=True)
        self.bar = widgets.IntProgress(max=100, layout={"width": "260px"})
        self.message = widgets.HTML()
        where, sampling = row(self.source, self.step), row(self.k, self.temperature, self.max_tokens, self.seed)
        work = widgets.HBox([self.generate, self.cancel, self.bar, self.message])
        self.widget = widgets.VBox([where, self.question, self.answer, sampling, work, self.results])
        self.widget.add_class("covrl-bench")
        self._list_steps()
        self.source.observe(self._list_steps, names="value")

    # --- model

    @in_turn
    def _list_steps(self, change: Any = None) -> None:
        """Offer the checkpoints of the named run, the last one chosen, and its defaults where nothing was typed."""
        steps: list[int] = []
        # A name half typed is no error; a wrong one is reported by the click, which alone asks the Hub.
        with contextlib.suppress(ConfigError, OSError):
            if not self._given and not self.source.value.startswith("hub:"):
                source = find_source(self.source.value, **self._settings)
                steps = list(source.checkpoints)
                self._offer(source.defaults())
        self.step.options = step_choices(steps)[1:] or [("none", 0)]
        self.step.value = steps[-1] if steps else 0
        self.step.disabled = not steps

    def _offer(self, values: dict[str, Any]) -> None:
        """Put a source's defaults into the fields that hold those of the source before."""
        for names in (("question", "answer"), ("temperature",), ("max_tokens",)):
            if all(getattr(self, name).value == self._defaults.get(name) for name in names):
                for name in names:
                    getattr(self, name).value = self._defaults[name] = values[name]

    def _open(self) -> None:
        """Make the chosen model and adapter the present ones, loading only what differs."""
        wanted = (self.source.value, self.step.value)
        if self._given or wanted == self._opened:
            return
        from ..train.policy import load_adapter
        from ..train.probe import open_source

        source = find_source(self.source.value, **self._settings)
        steps = list(source.checkpoints)
        if wanted[1] and wanted[1] not in steps:  # a run that goes on keeps its last ones only
            self._list_steps()
            raise ConfigError(f"the checkpoint of step {wanted[1]} is gone; choose one of {steps}")
        checkpoint = source.checkpoints.get(wanted[1] or max(steps, default=None))
        if self._opened and wanted[0] == self._opened[0]:
            load_adapter(self._policy, checkpoint)
        else:
            self._opened = self._policy = None  # room for the new one
            self._policy, self._prompter = open_source(source.config, checkpoint)
        self._opened = wanted

    # --- one click

    def start(self) -> None:
        """What Generate does: work in the background; ``wait`` waits for it."""
        if self._thread is not None and self._thread.is_alive():
            return
        self._cancel.clear()
        self.generate.disabled, self.cancel.disabled = True, False
        self._thread = aside(self._work)

    def wait(self, seconds: float | None = None) -> None:
        """Return when the work in the background has ended, or after ``seconds``."""
        if self._thread is not None:
            self._thread.join(seconds)

    def _work(self) -> None:
        try:
            self._say("loading the model …")
            self.bar.value = 0
            self._open()
            names = ("before training", "after training") if self._policy.trainable() else ("model",)
            frames = {}
            for i, name in enumerate(names):
                self._say(f"{name}: sampling and scoring …")
                with self._policy.base() if name == "before training" else contextlib.nullcontext():
                    frames[name] = self._probe(i / len(names), (i + 1) / len(names))
            self.frames = frames
            self._show()
            self.bar.value = 100
            self._say("done")
        except CancelledError:
            self._say("cancelled")
        except ConfigError as error:
            self._say(str(error), wrong=True)
        except Exception as error:  # nobody else would see it: this is a thread
            reason = str(error).strip().splitlines()
            self._say(f"{type(error).__name__}: {reason[0] if reason else 'no reason given'}", wrong=True)
        finally:
            self.generate.disabled, self.cancel.disabled = False, True

    def _probe(self, start: float, end: float) -> pd.DataFrame:
        """``probe`` at the fields' values, filling the bar from ``start`` to ``end``: half for each part."""
        from ..train.probe import probe_question  # needs torch

        k, decoded, scored = self.k.value, 0, 0

        def tick(done: int) -> None:
            nonlocal decoded, scored
            if self._cancel.is_set():
                raise CancelledError
            decoded, scored = decoded + done, scored + (done == 0)
            part = scored / (2 * k + 1) if scored else decoded / (2 * k * self.max_tokens.value)
            self.bar.value = round(100 * (start + (end - start) * min(1.0, (part + (scored > 0)) / 2)))

        settings = {name: getattr(self, name).value for name in ("max_tokens", "temperature", "seed")}
        asked = (self.question.value, self.answer.value, k)
        return probe_question(self._policy, self._prompter, *asked, **settings, tick=tick)

    def _say(self, text: str, wrong: bool = False) -> None:
        colour = text_colour(POSTERIOR) if wrong else "inherit"
        self.message.value = f'<span style="color: {colour}">{html_text(text)}</span>'
