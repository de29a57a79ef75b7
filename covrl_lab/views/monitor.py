"""Follow a run folder while it is written, from this process or another, and stop the run gracefully.

Everything shown comes from files, so a closed browser tab or a restarted kernel loses nothing: a new
``RunMonitor`` shows the same. No torch.
"""

import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import ipywidgets as widgets
import numpy as np
import pandas as pd
import plotly.graph_objects as go
from IPython.display import HTML

from ..files import Owner, refuse_links, written
from ..runs.folder import Run, step_file, steps_in
from ..types import ConfigError
from .figures import plot_training_curves
from .html import alarms_html, helped, html_number, html_table, html_text, reward_unit, trace_table
from .style import BOTH, GREY, POSTERIOR, PRIOR, text_colour
from .widgets import Panel, Plot, aside, button, in_turn, named, row

_SIGNS = {
    "waiting": ("○", GREY),
    "running": ("●", BOTH),
    "stalled": ("▲", POSTERIOR),
    "stopping": ("◐", POSTERIOR),
    "stopped": ("■", GREY),
    "finished": ("✔", BOTH),
}
# column of metrics.jsonl -> label, unit, colour, format
_ROWS = {
    "reward_prior": ("reward, prior traces", "", PRIOR, ".4g"),  # its unit is the method's
    "reward_posterior": ("reward, posterior traces", "", POSTERIOR, ".4g"),
    "right_prior": ("right, prior traces", "of all", PRIOR, ".1%"),
    "right_posterior": ("right, posterior traces", "of all", POSTERIOR, ".1%"),
    "kl": ("KL(p′‖p)", "nats a token", BOTH, ".4g"),
    "nll": ("answer term (NLL)", "nats", BOTH, ".4g"),
    "trace_tokens_prior": ("trace length, prior", "tokens", PRIOR, ".4g"),
    "trace_tokens_posterior": ("trace length, posterior", "tokens", POSTERIOR, ".4g"),
    "finished_share": ("finished traces", "of all", BOTH, ".1%"),
    "truncated_share": ("truncated traces", "of all", BOTH, ".1%"),
    "one_token_share": ("traces of one token", "of all", BOTH, ".1%"),
    "equal_reward_share": ("questions whose traces earn the same", "of all", BOTH, ".1%"),
    "log_ratio_extreme_share": ("tokens with q/p beyond e¹⁰ or e⁻¹⁰", "of all", BOTH, ".1%"),
    "sampler_mismatch": ("sampler against trainer", "nats a token", BOTH, ".2g"),
    "skipped": ("left out, loss or gradient not finite", "steps", BOTH, ".2g"),
    "clipped_share": ("tokens held back by the clip", "of all", BOTH, ".1%"),
    "gradient_norm": ("gradient norm", "before clipping", BOTH, ".4g"),
    "seconds_sampling": ("time of a step, sampling", "seconds", GREY, ".4g"),
    "seconds_update": ("time of a step, update", "seconds", GREY, ".4g"),
}


@dataclass(frozen=True)
class Snapshot:
    """What a run folder's files say at one moment."""

    run: Run
    # waiting (no run yet), running, stalled (nothing written for long), stopping (asked to stop), stopped, finished
    status: str
    message: str  # the status in a sentence
    step: int = 0  # finished steps
    steps: int = 0  # all of them; 0 while waiting
    metrics: pd.DataFrame = field(default_factory=pd.DataFrame)  # ``Run.metrics`` with ``truncated_share``
    evaluations: pd.DataFrame = field(default_factory=pd.DataFrame)
    # Median time of the last five steps times the steps to go, and likewise of the evaluations.
    seconds_left: float | None = None  # None before the first step and after the last
    # Median time of an evaluation; None before the first one after a step, and seconds_left leaves them out.
    evaluation_seconds: float | None = None
    alarms: dict[str, str] = field(default_factory=dict)  # ``Run.alarms``


def snapshot(run_dir: str | Path, now: float | None = None) -> Snapshot:
    """Read a run folder as it stands; ``now`` is the time in seconds since the epoch, for tests."""
    run, now = Run(Path(run_dir)).forgiving(), time.time() if now is None else now
    if not (run.path / "config.json").is_file():
        return Snapshot(run, "waiting", f"waiting for a run in {str(run.path.absolute())!r}")
    if run.foreign:
        return Snapshot(run, "waiting", run.foreign)
    held = Owner.held(run.path)  # before the files are read: a process that has ended writes nothing more
    config, metrics, evaluations = run.config, run.metrics, run.evaluations
    step, steps, left, median = 0, int(config["steps"]), None, 0.0
    # Nothing is written while an evaluation runs, and before the first step a model is loaded as well.
    evaluation, patience = _evaluation_seconds(run), 600.0
    if len(metrics):
        metrics["truncated_share"] = 1 - metrics.get("finished_share", np.nan)
        step, median = int(metrics["step"].iloc[-1]), float(metrics["seconds"].tail(5).median())
        patience = max(120.0, 10 * median, 3 * (evaluation or 0.0))
    if step and step < steps:
        every = config.get("eval_every", 0)
        # The steps to go that end with an evaluation: every so often, and the last.
        to_evaluate = 1 + ((steps - 1) // every - step // every if every else 0)
        left = median * (steps - step) + (evaluation or 0.0) * to_evaluate
    names = ("config.json", "metrics.jsonl", "evaluations.jsonl", "traces", "checkpoints")
    newest = max(written(run.path / name) for name in names)
    silent, done = held is False or now - newest > patience, f"step {step} of {steps}"
    if step >= steps and (step or len(evaluations)):
        status, message = "finished", f"finished: {step} of {steps} steps"
    elif (run.path / "STOP").exists():
        # What a run writes last: the checkpoint of its last step, or before any step an evaluation.
        last = step in steps_in(run.path / "checkpoints") if step else len(evaluations) > 0
        ends = f"and saves a checkpoint after step {step + 1}" if step or last else "after its first evaluation"
        status, message = "stopping", f"asked to stop: it ends {ends}"
        if not held and (silent or (last and newest >= written(run.path / "STOP"))):
            status, message = "stopped", f"stopped after {done}; allow it to resume, then start it again as before"
    elif held is False:
        status, message = "stopped", f"its process has ended, after {done}; start it again as before, and it resumes"
    elif silent:
        since = f"{time.strftime('%H:%M:%S', time.localtime(newest))} ({_duration(now - newest)})"
        why = "it takes long, or its process has ended; start it again and it resumes from its last checkpoint"
        why = "its process is there, and takes long or hangs" if held else why
        status, message = "stalled", f"nothing written since {since}: {why}"
    else:
        status, message = "running", f"running: {step} of {steps} steps" if step else "running: before its first step"
    return Snapshot(run, status, message, step, steps, metrics, evaluations, left, evaluation, run.alarms)


def _evaluation_seconds(run: Run) -> float | None:
    """Median time between a step's traces and its evaluation, which a run writes one after the other."""
    folder, stored = run.path / "evaluations", set(run.steps)
    took = [
        written(step_file(folder, step)) - written(step_file(run.path / "traces", step))
        for step in steps_in(folder)
        if step in stored
    ]
    took = [seconds for seconds in took if seconds > 0]  # else the traces are those of a second attempt
    return float(np.median(took)) if took else None


def _duration(seconds: float) -> str:
    """``1 h 05 min``, ``3 min 20 s`` or ``12 s``."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours} h {minutes:02d} min"
    return f"{minutes} min {rest:02d} s" if minutes else f"{rest} s"


# --- a snapshot as HTML


def sparkline(values: Sequence[float | None], colour: str = GREY, width: int = 130, height: int = 22) -> str:
    """An SVG line of the values that are there, scaled to their range; empty below two of them."""
    y = np.array(values, dtype=float)
    x, there = np.linspace(3, width - 3, len(y)), np.isfinite(y)
    if there.sum() < 2:
        return ""
    x, y = x[there], y[there]
    if len(y) > 4 * width:  # several points a pixel: of each the lowest and the highest
        pixels = np.array_split(np.arange(len(y)), width)
        kept = {part[find(y[part])] for part in pixels for find in (np.argmin, np.argmax)} | {len(y) - 1}
        x, y = x[sorted(kept)], y[sorted(kept)]
    low, high = y.min(), y.max()
    place = (y - low) / (high - low) if high > low else np.full(len(y), 0.5)
    points = [f"{a:.1f},{b:.1f}" for a, b in zip(x, height - 3 - place * (height - 6), strict=True)]
    last_x, last_y = points[-1].split(",")
    title = f"from {low:.4g} to {high:.4g}"
    return (
        f'<svg width="{width}" height="{height}" role="img" aria-label="{title}"><title>{title}</title>'
        f'<polyline points="{" ".join(points)}" fill="none" stroke="{colour}" stroke-width="1.5"/>'
        f'<circle cx="{last_x}" cy="{last_y}" r="2.5" fill="{colour}"/></svg>'
    )


def status_html(shot: Snapshot) -> str:
    """Status, time left and the latest accuracy, on one line; below it what goes wrong, if anything does."""
    sign, colour = _SIGNS[shot.status]
    parts = [f'<b style="color: {text_colour(colour)}">{sign} {html_text(shot.message)}</b>']
    if shot.seconds_left is not None and shot.status == "running":
        known = shot.evaluation_seconds is not None
        parts.append(f"about {_duration(shot.seconds_left)} left, {'with' if known else 'without'} evaluations")
    if len(shot.evaluations):
        last = shot.evaluations.iloc[-1]
        value = f'held-out accuracy <b data-column="accuracy">{last.accuracy:.1%}</b> after step {last.step:.0f}'
        parts.append(f"{value} (95% interval {last.accuracy_low:.1%} to {last.accuracy_high:.1%})")
        if (use := last.get("trace_dependence", np.nan)) == use:
            parts.append(f'trace use <b data-column="trace_dependence">{use:.1f}</b> nats')
    can = f"<br>{html_text(line)}" if (line := shot.run.abilities) else ""
    return f'<div style="line-height: 1.5">{" &nbsp;·&nbsp; ".join(parts)}{can}</div>{alarms_html(shot.alarms)}'


def numbers_html(shot: Snapshot) -> str:
    """A table of the latest step's numbers, their mean over five steps, and a line over all steps."""
    if shot.metrics.empty:
        return "<p>no finished step yet</p>"
    rows, reward = [], reward_unit(shot.run.config)
    for column, (label, unit, colour, form) in _ROWS.items():
        if column in shot.metrics and shot.metrics[column].notna().any():
            values = shot.metrics[column].astype(float)
            last, mean = (html_number(x, form) for x in (values.iloc[-1], values.tail(5).mean()))
            shown = f'<b data-column="{column}">{last}</b>'
            rows.append([helped(label), shown, mean, unit or reward, sparkline(values, colour)])
    return html_table(["", f"step {shot.step}", "mean of last 5", "", "all steps"], rows)


def traces_html(shot: Snapshot, questions: int = 2) -> str:
    """Traces of the first questions of the latest stored step, read now."""
    stored = shot.run.steps
    if not stored:
        return "<p>no traces yet</p>"
    traces = shot.run.traces(stored[-1])
    if traces.empty:
        return alarms_html(shot.run.damage)
    shown = traces[traces["example_id"].isin(traces["example_id"].unique()[:questions])]
    return f"<b>Traces of step {stored[-1]}</b>{trace_table(shown)}"


class RunMonitor(Panel):
    """A live view of the run in ``run_dir``; reads files only, and waits where there is none yet.

    A thread reads the folder every ``every`` seconds, so the kernel stays free and a training loop in this
    very kernel is followed as well. It ends with the run, or with ``close()``. ``snapshot`` holds what is
    shown; ``widget`` is the panel. The button writes the file STOP, which ends the run after its present
    step with a checkpoint, or takes it away again.
    """

    def __init__(self, run_dir: str | Path, every: float = 2.0) -> None:
        self.run_dir, self.every = Path(run_dir), every
        self.status, self.numbers, self.traces = (widgets.HTML() for _ in range(3))
        self.bar = widgets.IntProgress(layout={"width": "260px"})
        self.button = button("", self._toggle_stop)
        self.curves = Plot(layout={"min_height": "600px"})
        self.traces.layout.flex = "1 1 420px"
        tables, control = row(self.numbers, self.traces), row(named(self.run_dir), self.bar, self.button)
        self.widget = widgets.VBox([control, self.status, tables, self.curves])
        self.widget.add_class("covrl-monitor")
        self._drawn: tuple[int, int] | None = None
        self._refused: dict[str, str] = {}  # why the button did nothing
        self._closed = threading.Event()
        self.refresh()
        self._thread = aside(self._follow)

    @in_turn
    def refresh(self) -> None:
        """Read the folder and show what it holds, now."""
        self.snapshot = shot = snapshot(self.run_dir)
        self.status.value = status_html(shot) + alarms_html(self._refused)
        self.bar.max, self.bar.value = max(1, shot.steps), shot.step
        asked = (self.run_dir / "STOP").exists()
        self.button.disabled = shot.status in ("waiting", "finished")
        if asked:
            looks = ("Allow it to resume", "play", "Remove the file STOP from the run folder")
        else:
            looks = ("Stop after this step", "stop", "Write the file STOP to the run folder")
        self.button.description, self.button.icon, self.button.tooltip = looks
        drawn = len(shot.metrics), len(shot.evaluations)
        if drawn != self._drawn:
            self._drawn = drawn
            self.numbers.value = numbers_html(shot)
            self.traces.value = traces_html(shot)
            self.curves.draw(self.figure().update_layout(uirevision="kept"))  # a reader's zoom

    def figure(self) -> go.Figure:
        """The training curves."""
        shot = self.snapshot
        unit = "nats" if shot.status == "waiting" else reward_unit(shot.run.config)
        return plot_training_curves(shot.metrics, shot.evaluations, unit)

    def html(self) -> str:
        """Status, numbers and traces as plain HTML."""
        return status_html(self.snapshot) + numbers_html(self.snapshot) + traces_html(self.snapshot)

    def close(self) -> None:
        """End the thread and take the panel away; the run itself continues."""
        self._closed.set()
        self.widget.close()

    def _follow(self) -> None:
        while self.snapshot.status != "finished" and not self._closed.wait(self.every):
            if self.widget.comm is None:  # closed by other means
                return
            try:
                self.refresh()
            except (OSError, ValueError, KeyError) as error:  # a file was replaced under our hands: read again
                self.status.value = f"<i>{html_text(f'reading again: {error}')}</i>"

    def _toggle_stop(self) -> None:
        stop, self._refused = self.run_dir / "STOP", {}
        self.refresh()
        if self.button.disabled:  # the run ended before the kernel came to the click
            return
        try:
            if stop.exists():
                stop.unlink()
            else:
                refuse_links(self.run_dir.resolve())  # else a dangling one would be followed
                stop.touch()
        except (OSError, ConfigError) as error:
            self._refused["STOP"] = str(error)
        self.refresh()

    def static(self) -> list[Any]:
        """What the run folder held a moment ago, as HTML and a plotly figure."""
        return [HTML(f"<p>as it was at {time.strftime('%H:%M:%S')}</p>{self.html()}"), self.figure()]
