"""An ablation of the mixing ratio: choose a grid, see its cost, launch it, watch it, read the results.

Frames and figures come from the run folders of a ``Sweep``; the panel adds no numbers of its own.
"""

from __future__ import annotations

import html
import threading
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import ipywidgets as widgets
import pandas as pd
from IPython.display import HTML

from ..config import RunConfig
from ..defaults import METHOD_DEFAULTS
from ..runs.compare import curves
from ..runs.folder import Run, load_run
from ..runs.sweep import Sweep
from ..types import ConfigError
from .comparison import plot_against_alpha
from .explorer import TraceExplorer
from .figures import plot_evaluation_curve
from .html import html_number, html_table, html_text
from .sweep_cost import describe_cost, step_time_settings
from .widgets import Panel, Plot, aside, field, row, static_text

SIGNS = {"queued": "◦", "running": "▸", "done": "✓", "cancelled": "⊘", "failed": "✗"}
HEADER = ["run", "method", "α", "seed", "status", "accuracy", "seconds"]
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


# --- the table of runs


def _cells(record: Mapping[str, Any], config: RunConfig) -> list[str]:
    """A run's row as HTML, by HEADER; a running one has its step, a failed or cancelled one its reason."""
    state = f"{SIGNS[record['status']]} {record['status']}"
    if record["status"] == "running":
        state += f", step {record['step']} of {record['steps']}"
    if record["reason"]:
        state += f": {record['reason']}"
    texts = [record["id"], config.method, f"{config.alpha:g}", str(config.seed), state]
    return [*map(html_text, texts), html_number(record["accuracy"], ".1%"), f"{record['seconds']:.1f}"]


def table(sweep: Sweep) -> str:
    """HTML table of the runs as their files say now."""
    records = sweep.table().to_dict("records")
    return html_table(HEADER, [_cells(record, sweep.runs[record["id"]]) for record in records])


# --- the panel

_STYLE = f"<style>{static_text('ablation.css')}</style>"
_GROWING = {"flex": "1 1 auto", "margin": "0"}


def _grid_row(cells: list[str], bar: str, attributes: str) -> str:
    """A line of the live table: ``cells`` by HEADER, with a bar of progress after the status."""
    inside = "".join(f"<span>{cell}</span>" for cell in [*cells[:5], bar, *cells[5:]])
    return f"<div {attributes}>{inside}</div>"


class _Row:
    """One run in the live table: its cells, a button to cancel or retry, a button to its traces."""

    def __init__(self, panel: Ablation, run_id: str) -> None:
        self.cells = widgets.HTML(layout=_GROWING)
        layout = {"width": "76px", "height": "26px", "flex": "0 0 auto"}
        self.action = widgets.Button(description="Cancel", layout=layout)
        self.traces = widgets.Button(description="Traces", layout=layout)
        self.action.on_click(lambda _: panel._act(run_id))
        self.traces.on_click(lambda _: panel.show_traces(run_id))
        self.box = widgets.HBox([self.cells, self.action, self.traces], layout={"align_items": "center"})
        self.box.add_class("covrl-run-row")

    def update(self, record: Mapping[str, Any], config: RunConfig) -> None:
        run_id, *cells = _cells(record, config)
        bar = f'<progress value="{record["step"]}" max="{max(1, record["steps"])}"></progress>'
        attributes = f'class="covrl-run" data-status="{record["status"]}"'
        self.cells.value = _grid_row([f"<code>{run_id}</code>", *cells], bar, attributes)
        again = record["status"] in ("failed", "cancelled")
        self.action.description = "Retry" if again else "Cancel"
        self.action.disabled = record["status"] == "done"
        self.traces.disabled = not record["step"]


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
    from ..train.tasks import TaskSettings, check_task

    check_task(config.task, TaskSettings.of(config))
    if config.model not in MODELS:
        from ..train.models import check_model  # imports torch

        check_model(config.model)


class Ablation(Panel):
    """Widgets that choose a grid and drive it: cost, Launch, a live table, results, traces of any run.

    folder: holds the run folders; what it holds of the chosen grid already is shown and not done again.
    alphas, methods, seeds: comma-separated lists, or sequences. base: further fields of ``RunConfig``.
    notebook: what papermill runs, see ``Sweep``.
    ``sweep`` is the present ``Sweep``; it runs in the background and ends with the kernel, and launching the
    same grid again resumes it.
    """

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
        self._estimates: dict[tuple[Any, ...], float] = {}  # like runs -> seconds a step
        self._watcher: threading.Thread | None = None
        self._drawn: Any = None
        self.fields = _fields(alphas, methods, seeds, steps, model, task, workers)
        self.cost = widgets.HTML()
        self.launch_button = widgets.Button(description="Launch", button_style="primary", icon="play")
        self.stop_button = widgets.Button(description="Stop all", icon="stop", disabled=True)
        about = "from the settings and a short measurement of this machine"
        self.estimate_button = widgets.Button(description="Estimate", tooltip=about)
        self.launch_button.on_click(lambda _: self.launch())
        self.stop_button.on_click(lambda _: aside(self.stop))
        self.estimate_button.on_click(lambda _: aside(self.estimate))
        head = _STYLE + _grid_row(HEADER, "progress", 'class="covrl-run covrl-head"')
        beside = widgets.HTML(layout={"width": "160px", "flex": "0 0 auto"})  # as wide as a row's buttons
        self.rows, choices = widgets.VBox(), list(self.fields.values())
        self.alpha_plot, self.learning_plot = Plot(), Plot()
        self.traces = widgets.VBox()
        grid = row(widgets.VBox(choices[:3]), widgets.VBox(choices[3:6]), choices[6])
        buttons = widgets.HBox([self.launch_button, self.stop_button, self.estimate_button])
        runs = widgets.VBox([widgets.HBox([widgets.HTML(head, layout=_GROWING), beside]), self.rows])
        results = [self.alpha_plot, self.learning_plot, self.traces]
        self.widget = widgets.VBox([grid, self.cost, buttons, runs, *results])
        self.widget.add_class("covrl-ablation")
        self.sweep: Sweep | None = None
        for one in self.fields.values():
            one.observe(lambda _: self._choose(), names="value")
        self._choose()
        if self.sweep and "running" in self.sweep.statuses.values():  # another process drives it
            self._watch()

    # --- choosing

    def _choose(self) -> None:
        """Take the fields as they stand: a new sweep, its cost and its table."""
        values = {name: one.value for name, one in self.fields.items()}
        base = self.base | {name: values[name] for name in ("model", "task", "steps")}
        grid = {"method": values["methods"], "alpha": values["alphas"], "seed": values["seeds"]}
        try:
            self.sweep = Sweep(self.folder, base, grid, notebook=self.notebook)
            _check(next(iter(self.sweep.runs.values())))
        except ConfigError as error:
            self.sweep = None
            self._warn(error)
            self.rows.children = ()
        else:
            self._rows = {run_id: _Row(self, run_id) for run_id in self.sweep.runs}
            self.rows.children = tuple(line.box for line in self._rows.values())
            self._drawn = None
            self.refresh()
        self._enable()

    def _warn(self, error: ConfigError) -> None:
        self.cost.value = f"<b>⚠ {html.escape(str(error))}</b>"

    def _enable(self) -> None:
        driven = self.sweep is not None and self.sweep.driven
        for one in self.fields.values():
            one.disabled = driven
        self.launch_button.disabled = driven or self.sweep is None
        self.stop_button.disabled = not driven
        self.estimate_button.disabled = self.sweep is None

    def estimate(self) -> None:
        """Estimate a step of the grid's first run with ``plan``, which loads torch; takes seconds."""
        from ..train.plan import plan

        if self.sweep is None:
            return
        config = next(iter(self.sweep.runs.values()))
        self.estimate_button.disabled = True
        try:
            self._estimates[step_time_settings(config)] = 60 * plan(config).minutes
            self._show_cost()
        except ConfigError as error:
            self._warn(error)
        self.estimate_button.disabled = False

    def _show_cost(self) -> None:
        estimate = self._estimates.get(step_time_settings(next(iter(self.sweep.runs.values()))))
        text = describe_cost(self.sweep, self.fields["workers"].value, estimate)
        if self.sweep.error:
            text += f". {self.sweep.error}"
        self.cost.value = html.escape(text + ".")

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
            self._enable()

    def _act(self, run_id: str) -> None:
        """The row's button: cancel, or retry, which needs the sweep to be driven."""
        if self.sweep.retry(run_id):
            self.launch()
        else:
            self.sweep.cancel(run_id)
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
        self._enable()

    # --- showing

    def refresh(self) -> None:
        """Show what the run folders hold now."""
        if self.sweep is None:
            return
        records = self.sweep.table().to_dict("records")
        for record in records:
            self._rows[record["id"]].update(record, self.sweep.runs[record["id"]])
        self._show_cost()
        state = [(record["step"], str(record["accuracy"])) for record in records]
        if state == self._drawn:
            return
        self._drawn = state
        if any(record["step"] for record in records):
            self.alpha_plot.draw(plot_against_alpha(sweep_results(self.sweep)))
            self.learning_plot.draw(plot_evaluation_curve(sweep_curves(self.sweep)))
        else:
            self.alpha_plot.figure = self.learning_plot.figure = ""

    def show_traces(self, run_id: str) -> None:
        """Open a run's stored traces below the figures."""
        title = widgets.HTML(f"<h3>Traces of run {html.escape(self.sweep.describe(run_id))}</h3>")
        self.traces.children = (title, TraceExplorer(load_run(self.sweep.path(run_id))).widget)

    def static(self) -> list[Any]:
        """The cost and the table of runs as HTML."""
        return [HTML(self.cost.value if self.sweep is None else f"<p>{self.cost.value}</p>{table(self.sweep)}")]


def _listed(values: Any) -> str:
    return values if isinstance(values, str) else ", ".join(str(value) for value in values)
