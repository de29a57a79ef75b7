"""An ablation of the mixing ratio: choose a grid, see its cost, launch it, watch it, read the results.

Frames and figures come from the run folders of a ``Sweep``; the panel adds no numbers of its own.
"""

import html
import threading
import time
from collections.abc import Mapping
from itertools import zip_longest
from pathlib import Path
from typing import Any, ClassVar

import ipywidgets as widgets
import numpy as np
import pandas as pd
import plotly.graph_objects as go
from IPython.display import HTML

from ..config import RunConfig
from ..defaults import METHOD_DEFAULTS
from ..files import read_object
from ..runs.compare import curves
from ..runs.folder import Run, load_run, read_lines
from ..runs.sweep import Sweep
from ..runs.worker import ENDS
from ..types import ConfigError
from .comparison import plot_against_alpha
from .explorer import TraceExplorer
from .figures import plot_evaluation_curve
from .widgets import Panel, Plot, Table, aside, button, field, in_turn, row, table_column

SIGNS = {"queued": "◦", "running": "▸", "done": "✓", "cancelled": "⊘", "failed": "✗"}
REFRESH_SECONDS = 1.0
MODELS = ("smollm2-135m", "tiny")  # offered by name


# --- frames


def sweep_results(sweep: Sweep) -> pd.DataFrame:
    """One row a run that has finished a step: its table's columns, method, alpha, seed, and its rewards.

    reward_prior and reward_posterior are means over the last fifth of the finished steps, at least one.
    """
    rows = []
    for record in sweep.table().to_dict("records"):
        if record["step"]:
            config, metrics = sweep.runs[record["id"]], load_run(sweep.path(record["id"])).forgiving().metrics
            last = metrics[["reward_prior", "reward_posterior"]].tail(max(1, len(metrics) // 5)).astype(float).mean()
            own = {"method": config.method, "alpha": config.alpha, "seed": config.seed}
            rows.append(record | own | last.to_dict())
    columns = ["id", "method", "alpha", "seed", "accuracy", "reward_prior", "reward_posterior"]
    return pd.DataFrame(rows) if rows else pd.DataFrame(columns=columns)


def sweep_curves(sweep: Sweep) -> dict[str, pd.DataFrame]:
    """ "method, alpha" -> evaluations of its runs with their seed, for ``plot_evaluation_curve``."""
    methods: dict[str, list[Run]] = {}
    for run_id, config in sorted(sweep.runs.items(), key=lambda item: (item[1].method, item[1].alpha)):
        path = sweep.path(run_id)
        if (path / "evaluations.jsonl").exists():
            methods.setdefault(f"{config.method}, α {config.alpha:g}", []).append(load_run(path).forgiving())
    return next(iter(curves(methods).values()), {})  # a grid has one task


def _results(sweep: Sweep) -> list[go.Figure]:
    return [plot_against_alpha(sweep_results(sweep)), plot_evaluation_curve(sweep_curves(sweep))]


# --- what is left to do, and how long it takes

# Runs that agree in these take about the same time for a step.
STEP_TIME_SETTINGS = """
model quantization dtype device task questions_per_step rollouts_per_question max_trace_tokens
""".split()


def step_time_settings(config: RunConfig) -> tuple[Any, ...]:
    """The settings that decide how long a step takes."""
    return tuple(getattr(config, name) for name in STEP_TIME_SETTINGS)


def measured(sweep: Sweep) -> tuple[float, float, int] | None:
    """(seconds of a step, seconds of a run around its steps, steps seen) of like runs in the sweep's folder.

    Medians; start-up and evaluations are around the steps, 0 until a run has finished. None: no step yet.
    """
    wanted = {step_time_settings(config) for config in sweep.runs.values()}
    seconds, around = [], []
    for path in sweep.folder.glob("*/config.json"):
        if step_time_settings(RunConfig.load(path)) in wanted:
            own = [record["seconds"] for record in read_lines(path.parent / "metrics.jsonl").records]
            seconds += own
            done = path.parent / "done.json"
            if done.exists() and not (ended := read_object(done)).get("first_step"):
                around.append(max(0.0, ended.get("seconds", 0.0) - sum(own)))
    return (float(np.median(seconds)), float(np.median(around or [0.0])), len(seconds)) if seconds else None


def describe_cost(sweep: Sweep, workers: int, step_seconds: float | None = None) -> str:
    """What is left to do and how long it takes, in one sentence that says where the time comes from.

    ``step_seconds`` is an estimate for where no step of such a run has been measured.
    """
    frame = sweep.table()
    left = frame[~frame["status"].isin(ENDS)]
    steps, at_once = int((left["steps"] - left["step"]).sum()), min(workers, len(left))
    text = f"{len(frame)} run{'s' * (len(frame) != 1)}, {len(left)} to do with {steps} steps in all"
    if left.empty:
        return text
    if seen := measured(sweep):
        step, around, count = seen
        source = f"{count} measured steps of {step:.2g} s (median), and {around:.0f} s around them a run"
    elif step_seconds is not None:
        step, around = step_seconds, 0.0
        source = f"an estimated step of {step:.2g} s, start-up and evaluations not counted"
    else:
        return f"{text}; no step of such a run has been measured here yet"
    minutes = (steps * step + len(left) * around) / at_once / 60
    return f"{text}; about {minutes:.1f} minutes with {at_once} at once, from {source}"


# --- the table of runs

_COLUMNS = [
    table_column("id", "run", "text"),
    table_column("method", "method", "text"),
    table_column("alpha", "α", "number", "", 2),
    table_column("seed", "seed", "number"),
    table_column("state", "state", "text"),
    table_column("accuracy", "accuracy, %", "number", "latest held-out accuracy", 1),
    table_column("seconds", "seconds", "number", "spent on training steps", 1),
]


def table(sweep: Sweep) -> pd.DataFrame:
    """One row a run as its files say now: the columns of ``Sweep.table``, method, alpha, seed, and state in words.

    state: a running run has its step, a failed or cancelled one its reason. accuracy in per cent.
    """
    frame = sweep.table()
    configs = [sweep.runs[run_id] for run_id in frame["id"]]
    for name in ("method", "alpha", "seed"):
        frame[name] = [getattr(config, name) for config in configs]
    running = frame["status"] == "running"
    steps = (", step " + frame["step"].astype(str) + " of " + frame["steps"].astype(str)).where(running, "")
    reasons = frame["reason"].map(lambda reason: f": {reason}" if reason else "")
    frame["state"] = frame["status"].map(SIGNS) + " " + frame["status"] + steps + reasons
    return frame.assign(accuracy=100 * frame["accuracy"].astype(float))


# --- the panel


def _fields(
    alphas: Any, methods: Any, seeds: Any, steps: int, model: str, task: str, workers: int
) -> dict[str, widgets.Widget]:
    """The fields that choose a grid, by name."""
    from ..train.builtin_tasks import TASKS

    def text(kind: type, label: str, value: str, **settings: Any) -> widgets.Widget:
        return field(kind, label, value, "280px", continuous_update=False, **settings)

    def count(label: str, value: int, most: int) -> widgets.BoundedIntText:
        return field(widgets.BoundedIntText, label, value, "280px", min=1, max=most)

    known = tuple(METHOD_DEFAULTS)
    chosen = [name for name in _listed(methods).split(", ") if name in known]
    return {
        "alphas": text(widgets.Text, "α", _listed(alphas)),
        "seeds": text(widgets.Text, "seeds", _listed(seeds)),
        "steps": count("steps", steps, 10**6),
        "model": text(widgets.Combobox, "model", model, options=MODELS),
        "task": text(widgets.Combobox, "task", task, options=tuple(TASKS)),
        "workers": count("at once", workers, 256),
        "methods": field(widgets.SelectMultiple, "methods", chosen, "240px", options=known, rows=7),
    }


def _check(config: RunConfig) -> None:
    """ConfigError for a task or a model that does not exist, before anything is launched."""
    from ..train.tasks import check_task

    check_task(config)
    if config.model not in MODELS:
        from ..train.models import check_model  # imports torch

        check_model(config.model)


class Ablation(Panel):
    """Widgets that choose a grid and drive it: cost, Launch, a live table, traces of its picked run, results.

    folder: holds the run folders; what it holds of the chosen grid already is shown and not done again.
    alphas, methods, seeds: comma-separated lists, or sequences. base: further fields of ``RunConfig``.
    notebook: what papermill runs, see ``Sweep``.
    ``sweep`` is the present ``Sweep``; it runs in the background and ends with the kernel, and launching the
    same grid again resumes it. A cell that is run again keeps what its fields were set to.
    """

    places = 5
    _chosen: ClassVar[dict[str, tuple[Any, dict[str, Any]]]] = {}  # folder -> arguments, and the fields' values

    def __init__(
        self,
        folder: str | Path,
        *,
        alphas: Any = "0.25, 0.5, 0.75, 1",
        methods: Any = "covrl",
        seeds: Any = "0, 1, 2",
        steps: int = 40,
        model: str = "smollm2-135m",
        task: str = "arithmetic",
        base: Mapping[str, Any] | None = None,
        workers: int = 1,
        notebook: str | Path | None = None,
    ) -> None:
        self.folder, self.base, self.notebook = Path(folder), dict(base or {}), notebook
        given = (_listed(alphas), _listed(methods), _listed(seeds), steps, model, task, workers)
        self._estimates: dict[tuple[Any, ...], float] = {}  # like runs -> seconds a step
        self._watcher: threading.Thread | None = None
        self.fields = _fields(*given)
        before, kept = self._chosen.get(str(self.folder), (None, {}))
        self._chosen[str(self.folder)] = given, kept if before == given else {}
        for name, value in self._chosen[str(self.folder)][1].items():
            self.fields[name].value = value
        self.cost = widgets.HTML()
        self.launch_button = button("Launch", self.launch, "play", button_style="primary")
        self.stop_button = button("Stop all", lambda: aside(self.stop), "stop", disabled=True)
        about = "from the settings and a short measurement of this machine"
        self.estimate_button = button("Estimate", lambda: aside(self.estimate), about=about)
        self.table = Table(label="runs of the grid", columns=_COLUMNS)
        self.act_button = button("Cancel", self._act)
        self.traces_button = button("Traces", lambda: self.show_traces(self.table.picked))
        self.table.observe(in_turn(lambda _: self._offer()), names="picked")
        self.table.observe(lambda _: self.refresh(), names="sort")
        self.picked, self.traces, choices = widgets.HTML(), widgets.VBox(), list(self.fields.values())
        self.plots, self.results, self._drawn = [Plot(), Plot()], [], []
        grid = row(widgets.VBox(choices[:3]), widgets.VBox(choices[3:6]), choices[6])
        buttons = widgets.HBox([self.launch_button, self.stop_button, self.estimate_button])
        about_run = row(self.picked, self.act_button, self.traces_button)
        self.widget = widgets.VBox([grid, self.cost, buttons, self.table, about_run, self.traces, *self.plots])
        self.widget.add_class("covrl-ablation")
        self.sweep: Sweep | None = None
        self._statuses: dict[str, str] = {}  # id -> status, as shown
        for one in self.fields.values():
            one.observe(lambda _: self._choose(), names="value")
        self._choose()
        if self.sweep and "running" in self.sweep.statuses.values():  # another process drives it
            self._watch()

    # --- choosing

    @in_turn
    def _choose(self) -> None:
        """Take the fields as they stand: a new sweep, its cost and its table."""
        values = {name: one.value for name, one in self.fields.items()}
        self._chosen[str(self.folder)] = self._chosen[str(self.folder)][0], values
        self.traces.children = ()  # they were of another grid
        base = self.base | {name: values[name] for name in ("model", "task", "steps")}
        grid = {"method": values["methods"], "alpha": values["alphas"], "seed": values["seeds"]}
        try:
            self.sweep = Sweep(self.folder, base, grid, notebook=self.notebook)
            _check(next(iter(self.sweep.runs.values())))
        except ConfigError as error:
            self.sweep = None
            self._warn(error)
            self.table.rows = []
            self._draw()
        else:
            self.refresh()
            if self.table.picked not in self.sweep.runs:
                self.table.picked = next(iter(self.sweep.runs))
        self.estimate_button.disabled = self.sweep is None
        self._enable()

    def _warn(self, error: ConfigError) -> None:
        self.cost.value = f"<b>⚠ {html.escape(str(error))}</b>"

    def _enable(self) -> None:
        driven = self.sweep is not None and self.sweep.driven
        for one in self.fields.values():
            one.disabled = driven
        left = self.sweep is not None and set(self._statuses.values()).difference(ENDS)
        self.launch_button.disabled = driven or not left
        self.stop_button.disabled = not driven
        self._offer()

    def _offer(self) -> None:
        """What can be done with the picked run."""
        run_id = self.table.picked if self.sweep and self.table.picked in self.sweep.runs else ""
        status = self._statuses.get(run_id, "")
        self.table.marked = [run_id]
        self.picked.value = f"run <code>{html.escape(run_id)}</code>" if run_id else ""
        self.act_button.description = "Retry" if status in ("failed", "cancelled") else "Cancel"
        self.act_button.disabled = status in ("", "done")
        self.traces_button.disabled = not (run_id and Run(self.sweep.path(run_id)).steps)

    def estimate(self) -> None:
        """Estimate a step of the grid's first run with ``plan``, which loads torch; takes seconds."""
        from ..train.plan import plan

        if self.sweep is None:
            return
        config = next(iter(self.sweep.runs.values()))
        self.estimate_button.disabled = True
        self.cost.value = "measuring this machine, a few seconds …"
        try:
            self._estimates[step_time_settings(config)] = 60 * plan(config).minutes
            self.refresh()
        except ConfigError as error:
            self._warn(error)
        self.estimate_button.disabled = self.sweep is None  # another grid may have been chosen meanwhile

    def _show_cost(self) -> None:
        estimate = self._estimates.get(step_time_settings(next(iter(self.sweep.runs.values()))))
        text = describe_cost(self.sweep, self.fields["workers"].value, estimate)
        self.cost.value = html.escape(f"{text}. {self.sweep.error}." if self.sweep.error else f"{text}.")

    # --- driving

    def launch(self) -> None:
        """Start what is left of the grid in the background."""
        if self.sweep is None:
            return
        try:
            self.sweep.submit(workers=self.fields["workers"].value)
            self._watch()
        except ConfigError as error:
            self._warn(error)

    def stop(self) -> None:
        """End the runs at work; they stay queued, and Launch resumes them."""
        if self.sweep is not None:
            self.sweep.stop()
            self.refresh()

    def _act(self) -> None:
        """Cancel the picked run, or retry it, which needs the sweep to be driven."""
        if self.sweep.retry(self.table.picked):
            self.launch()
        else:
            self.sweep.cancel(self.table.picked)
        self.refresh()

    def _watch(self) -> None:
        """Refresh in the background for as long as something is at work."""
        self._enable()
        if self._watcher is None or not self._watcher.is_alive():
            self._watcher = aside(self._follow)

    def _follow(self) -> None:
        sweep = self.sweep
        while sweep is self.sweep and (sweep.driven or "running" in sweep.statuses.values()):
            self.refresh()
            time.sleep(REFRESH_SECONDS)
        self.refresh()

    # --- showing

    @in_turn
    def refresh(self) -> None:
        """Show what the run folders hold now."""
        if self.sweep is None:
            return
        frame = table(self.sweep)
        self._statuses = dict(zip(frame["id"], frame["status"], strict=True))
        self.table.fill(frame, len(frame))
        self._enable()
        self._show_cost()
        self._draw(frame if frame["step"].any() else None)

    def _draw(self, runs: pd.DataFrame | None = None) -> None:
        """Draw the results anew where one of ``runs`` has got further."""
        state = [] if runs is None else runs[["id", "step", "accuracy"]].astype(str).to_numpy().tolist()
        if state != self._drawn:
            self._drawn, self.results = state, _results(self.sweep) if state else []
            for plot, figure in zip_longest(self.plots, self.results):
                plot.figure = "" if figure is None else figure.to_json()

    def show_traces(self, run_id: str) -> None:
        """Open a run's stored traces below the table."""
        title = widgets.HTML(f"<h3>Traces of run {html.escape(self.sweep.describe(run_id))}</h3>")
        self.explorer = TraceExplorer(load_run(self.sweep.path(run_id)))
        self.traces.children = (title, self.explorer.widget)

    def static(self) -> list[Any]:
        """The cost and the table of runs as HTML, the open traces, and the results as figures."""
        traces = self.explorer.static() if self.traces.children else ()
        return [HTML(f"<p>{self.cost.value}</p>{self.table.html()}"), *traces, *self.results]


def _listed(values: Any) -> str:
    return str(values) if isinstance(values, str | int | float) else ", ".join(str(value) for value in values)
