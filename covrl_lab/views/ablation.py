"""An ablation of the mixing ratio: choose a grid, see its cost, launch it, watch it, read the results.

Frames and figures come from the run folders of a ``sweeps.Sweep``; the panel adds no numbers of its own.
"""

from __future__ import annotations

import html
import threading
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import ipywidgets as widgets
import numpy as np
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
from .html import html_row, html_table, html_text
from .sweep_cost import describe_cost, step_time_settings
from .widgets import Panel, Plot

SIGNS = {"queued": "◦", "running": "▸", "done": "✓", "cancelled": "⊘", "failed": "✗"}
REFRESH_SECONDS = 1.0


# --- frames


def sweep_results(sweep: Sweep) -> pd.DataFrame:
    """One row a run that has finished a step: its table's columns, method, alpha, seed, and its rewards.

    reward_prior and reward_posterior are means over the last fifth of the finished steps, at least one.
    """
    rows = []
    for row in sweep.table().to_dict("records"):
        config = sweep.runs[row["id"]]
        row |= {"method": config.method, "alpha": config.alpha, "seed": config.seed}
        if row["step"]:
            metrics = load_run(sweep.path(row["id"])).metrics
            last = metrics.tail(max(1, len(metrics) // 5))
            for name in ("reward_prior", "reward_posterior"):
                row[name] = last[name].astype(float).mean()
            rows.append(row)
    columns = ["id", "method", "alpha", "seed", "accuracy", "reward_prior", "reward_posterior"]
    return pd.DataFrame(rows) if rows else pd.DataFrame(columns=columns)


def sweep_curves(sweep: Sweep) -> dict[str, pd.DataFrame]:
    """ "method, alpha" -> evaluations of its runs with their seed, for ``plot_evaluation_curve``."""
    methods: dict[str, list[Run]] = {}
    for run_id, config in sorted(sweep.runs.items(), key=lambda item: (item[1].method, item[1].alpha)):
        path = sweep.path(run_id)
        if (path / "evaluations.jsonl").exists():
            methods.setdefault(f"{config.method}, α {config.alpha:g}", []).append(load_run(path))
    return next(iter(curves(methods).values()), {})  # a grid has one task


# --- figures and tables


def _state(row: Mapping[str, Any]) -> str:
    """Status in words: with its step while it runs, with the reason where it did not end well."""
    words = f"{SIGNS[row['status']]} {row['status']}"
    if row["status"] == "running":
        words += f", step {row['step']} of {row['steps']}"
    return words + (f": {row['reason']}" if row["reason"] else "")


def _cells(row: Mapping[str, Any], config: RunConfig) -> list[str]:
    """A run's row as text: id, method, alpha, seed, status, accuracy, seconds."""
    accuracy = row["accuracy"]
    shown = "–" if accuracy is None or np.isnan(accuracy) else f"{accuracy:.1%}"
    return [
        row["id"],
        config.method,
        f"{config.alpha:g}",
        str(config.seed),
        _state(row),
        shown,
        f"{row['seconds']:.1f}",
    ]


HEADER = ["run", "method", "α", "seed", "status", "accuracy", "seconds"]


def table(sweep: Sweep) -> str:
    """HTML table of the runs as their files say now."""
    rows = [_cells(row, sweep.runs[row["id"]]) for row in sweep.table().to_dict("records")]
    texts = [[html_text(cell) for cell in row] for row in rows]
    return html_table(HEADER, [html_row(row) for row in texts])


# --- the panel

_STYLE = """<style>
.covrl-run { display: grid; grid-template-columns: 5.5em 5em 3em 3em minmax(12em, 1fr) 6em 5.5em 5.5em;
  column-gap: 10px; padding-right: 10px; align-items: center; line-height: 1.35;
  font-variant-numeric: tabular-nums; }
.covrl-run > * { overflow-wrap: anywhere; } .covrl-run code { background: none; padding: 0; }
.covrl-run progress { width: 100%; } .covrl-run .n { text-align: right; }
.covrl-head { font-weight: 600; }
</style>"""


class _Row:
    """One run in the table: its cells, a button to cancel or retry, a button to its traces."""

    def __init__(self, panel: Ablation, run_id: str) -> None:
        self.cells = widgets.HTML(layout={"flex": "1 1 auto", "margin": "0"})
        layout = {"width": "76px", "height": "26px", "flex": "0 0 auto"}
        self.action = widgets.Button(description="Cancel", layout=layout)
        self.traces = widgets.Button(description="Traces", layout=layout)
        self.action.on_click(lambda _: panel._act(run_id))
        self.traces.on_click(lambda _: panel.show_traces(run_id))
        self.box = widgets.HBox([self.cells, self.action, self.traces], layout={"align_items": "center"})
        self.box.add_class("covrl-run-row")

    def update(self, row: Mapping[str, Any], config: RunConfig) -> None:
        texts = [html_text(text) for text in _cells(row, config)]
        run, method, alpha, seed, state, accuracy, seconds = texts
        bar = f'<progress value="{row["step"]}" max="{max(1, row["steps"])}"></progress>'
        cells = [f"<code>{run}</code>", method, alpha, seed, state, bar]
        inside = "".join(f"<span>{cell}</span>" for cell in cells)
        inside += "".join(f'<span class="n">{number}</span>' for number in (accuracy, seconds))
        value = f'<div class="covrl-run" data-status="{row["status"]}">{inside}</div>'
        if value != self.cells.value:
            self.cells.value = value
        again = row["status"] in ("failed", "cancelled")
        self.action.description = "Retry" if again else "Cancel"
        self.action.disabled = row["status"] == "done"
        self.traces.disabled = not row["step"]


def _fields(
    alphas: Any, methods: Any, seeds: Any, steps: int, model: str, task: str, workers: int
) -> dict[str, widgets.Widget]:
    """The fields that choose a grid, by name."""
    from ..train.builtin_tasks import TASKS

    wide = {"style": {"description_width": "60px"}, "layout": {"width": "280px"}}
    chosen = [m for m in _listed(methods).split(", ") if m in METHOD_DEFAULTS]
    return {
        "alphas": widgets.Text(_listed(alphas), description="α", continuous_update=False, **wide),
        "seeds": widgets.Text(_listed(seeds), description="seeds", continuous_update=False, **wide),
        "steps": widgets.BoundedIntText(steps, min=1, max=10**6, description="steps", **wide),
        "model": widgets.Combobox(
            value=model,
            options=("smollm2-135m", "tiny"),
            description="model",
            continuous_update=False,
            **wide,
        ),
        "task": widgets.Combobox(
            value=task, options=tuple(TASKS), description="task", continuous_update=False, **wide
        ),
        "workers": widgets.BoundedIntText(workers, min=1, max=256, description="at once", **wide),
        "methods": widgets.SelectMultiple(
            value=chosen,
            options=tuple(METHOD_DEFAULTS),
            rows=7,
            description="methods",
            **(wide | {"layout": {"width": "240px"}}),
        ),
    }


def _table_head() -> widgets.HBox:
    head = ["run", "method", "α", "seed", "status", "progress", "accuracy", "seconds"]
    heads = "".join(f"<span{' class=n' if name in ('accuracy', 'seconds') else ''}>{name}</span>" for name in head)
    return widgets.HBox(
        [
            widgets.HTML(
                f'{_STYLE}<div class="covrl-run covrl-head">{heads}</div>',
                layout={"flex": "1 1 auto", "margin": "0"},
            ),
            widgets.HTML(layout={"width": "160px", "flex": "0 0 auto"}),
        ]
    )


class Ablation(Panel):
    """Widgets that choose a grid and drive it: cost, Launch, a live table, results, traces of any run.

    folder: holds the run folders; what it holds of the chosen grid already is shown and not done again.
    alphas, methods, seeds: comma-separated lists, or sequences. base: further fields of ``RunConfig``.
    ``sweep`` is the present ``Sweep``; it runs in the background and ends with the kernel, and launching the
    same grid again resumes it.
    """

    def __init__(
        self,
        folder: str | Path,
        *,
        alphas: Any = "0, 0.25, 0.5, 0.75, 1",
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
        self.estimate_button = widgets.Button(
            description="Estimate", tooltip="from the settings and a short measurement of this machine"
        )
        self.launch_button.on_click(lambda _: self.launch())
        self.stop_button.on_click(lambda _: self._aside(self.stop))
        self.estimate_button.on_click(lambda _: self._aside(self.estimate))
        self._head = _table_head()
        self.rows = widgets.VBox()
        self.alpha_plot, self.learning_plot = Plot(), Plot()
        self.traces = widgets.VBox()
        fields = self.fields
        self.widget = widgets.VBox(
            [
                widgets.HBox(
                    [
                        widgets.VBox([fields[name] for name in ("alphas", "seeds", "steps")]),
                        widgets.VBox([fields[name] for name in ("model", "task", "workers")]),
                        fields["methods"],
                    ],
                    layout={"flex_flow": "row wrap"},
                ),
                self.cost,
                widgets.HBox([self.launch_button, self.stop_button, self.estimate_button]),
                self._head,
                self.rows,
                self.alpha_plot,
                self.learning_plot,
                self.traces,
            ]
        )
        self.widget.add_class("covrl-ablation")
        self.sweep: Sweep | None = None
        for field in fields.values():
            field.observe(lambda _: self._choose(), names="value")
        self._choose()
        if self.sweep and "running" in self.sweep.statuses.values():  # another process drives it
            self._watch()

    # --- choosing

    def _choose(self) -> None:
        """Take the fields as they stand: a new sweep, its cost and its table."""
        values = {name: field.value for name, field in self.fields.items()}
        base = self.base | {name: values[name] for name in ("model", "task", "steps")}
        grid = {"method": values["methods"], "alpha": values["alphas"], "seed": values["seeds"]}
        try:
            self.sweep = Sweep(self.folder, base, grid, notebook=self.notebook)
        except ConfigError as error:
            self.sweep = None
            self.cost.value = f"<b>⚠ {html.escape(str(error))}</b>"
            self.rows.children = ()
        else:
            self._rows = {run_id: _Row(self, run_id) for run_id in self.sweep.runs}
            self.rows.children = tuple(row.box for row in self._rows.values())
            self._drawn = None
            self.refresh()
        self._enable()

    def _enable(self) -> None:
        driven = self.sweep is not None and self.sweep.driven
        for field in self.fields.values():
            field.disabled = driven
        self.launch_button.disabled = driven or self.sweep is None
        self.stop_button.disabled = not driven
        self.estimate_button.disabled = self.sweep is None

    @staticmethod
    def _aside(function: Any) -> None:
        """Call without making the kernel wait."""
        threading.Thread(target=function, daemon=True).start()

    def estimate(self) -> None:
        """Estimate a step of the grid's first run with ``plan``, which loads torch; takes seconds."""
        from ..train.plan import plan

        if self.sweep is None:
            return
        config = next(iter(self.sweep.runs.values()))
        self.estimate_button.disabled = True
        try:
            self._estimates[step_time_settings(config)] = 60 * plan(config).minutes
        except ConfigError as error:
            self.cost.value = f"<b>⚠ {html.escape(str(error))}</b>"
        else:
            self._show_cost()
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
        except ConfigError as error:
            self.cost.value = f"<b>⚠ {html.escape(str(error))}</b>"
            return
        self._watch()

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
            self._watcher = threading.Thread(target=self._follow, daemon=True)
            self._watcher.start()

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
        if self.sweep is None:
            return [HTML(self.cost.value)]
        return [HTML(f"<p>{self.cost.value}</p>{table(self.sweep)}")]


def _listed(values: Any) -> str:
    return values if isinstance(values, str) else ", ".join(str(value) for value in values)
