"""One HTML file of a run that opens without a network.

Everything comes from the run folder's files, and the same files and versions give the same bytes. The page
asks nothing of any server, and a Content-Security-Policy holds it to that: only the two scripts whose hashes
it names may run, plotly.js and the lines that draw.
"""

import base64
import hashlib
import platform
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pandas as pd
import plotly.graph_objects as go
from plotly.offline import get_plotlyjs

from .. import __version__
from ..files import write_whole
from ..runs.folder import Run, load_run, steps_in
from ..runs.notes import noted, place, read_notes
from ..runs.questions import between, history
from ..runs.reweight import Settings, Traces, answer_logprob, summarise_traces
from ..types import ConfigError
from .evaluations import change_html, plot_questions
from .figures import plot_answer_logprobs, plot_training_curves
from .html import accuracy_table, alarms_html, html_passage, html_text, reward_unit, summary_table, trace_table
from .token_view import token_html
from .widgets import static_text

QUESTIONS = 3  # of a step, whose traces are shown

_STYLE, _DRAW = static_text("report.css"), static_text("saving.js") + static_text("report.js")


def report(run: Run | str | Path, path: str | Path | None = None) -> Path:
    """Write the report of a run, finished or not, and return where it is (default: in the run folder).

    Configuration, training curves, held-out accuracy with 95% intervals, questions gained and lost, starred traces,
    those of the first and the last stored step, what mixing the two sources comes to, and the versions that drew it.
    About 5 MB, nearly all of it plotly.js. Raises ConfigError for a folder that is not a run, and where the file
    cannot be written.
    """
    run = (run if isinstance(run, Run) else load_run(run)).forgiving()
    if run.foreign:
        raise ConfigError(run.foreign)
    path = run.path / "report.html" if path is None else Path(path)
    if not path.parent.is_dir():
        raise ConfigError(f"the folder {str(path.parent)!r} does not exist; make it or choose another file")
    content = page(run)
    try:
        write_whole(path, content)
    except OSError as error:
        raise ConfigError(f"{str(path)!r} cannot be written ({error.strerror}); choose another file") from error
    return path


def page(run: Run) -> str:
    """The report as one HTML document."""
    config, metrics, evaluations = run.config, run.metrics, run.evaluations
    starred = _starred(run)  # first: what is damaged stands in the head
    traces = {step: run.traces(step) for step in sorted({*run.steps[:1], *run.steps[-1:]})}
    traces = {step: frame for step, frame in traces.items() if len(frame)}
    settings = {step: Settings.at(config, frame) for step, frame in traces.items()}
    rows = history(run) if len(steps_in(run.path / "evaluations")) > 1 else pd.DataFrame({"step": []})
    curves = _figure(plot_training_curves(metrics, evaluations, reward_unit(config)))
    parts = [_head(run, config, metrics, evaluations), "<h2>Training</h2>", curves]
    if len(evaluations):
        parts += ["<h2>Held-out accuracy</h2>", f'<div class="wide">{accuracy_table(evaluations)}</div>']
    if len(asked := rows["step"].unique().tolist()) > 1:
        pair = asked[0], asked[-1]
        change = change_html(between(rows, *pair), *pair)
        parts += ["<h2>Held-out questions</h2>", f'<div class="wide">{change}</div>', _figure(plot_questions(rows))]
    parts += starred
    for step, frame in traces.items():
        parts += [f"<h2>Traces of step {step}</h2>", *_traces(frame, settings[step])]
    if traces:
        header = ["", *(f"step {n}: α = {s.alpha:g}, w = {s.composite_weight:g}" for n, s in settings.items())]
        numbers = [summarise_traces(Traces.of(frame), settings[step]) for step, frame in traces.items()]
        parts += ["<h2>Prior against posterior</h2>", f'<div class="wide">{summary_table(header, numbers)}</div>']
    versions = {"python": platform.python_version(), "covrl_lab": __version__}
    versions |= {name: version(name) for name in ("numpy", "pandas", "plotly")}
    parts += ["<h2>Configuration</h2>", _facts(config), "<h2>Drawn with</h2>", _facts(versions)]
    plotly = get_plotlyjs()
    policy = (
        f"default-src 'none'; script-src {_hash(plotly)} {_hash(_DRAW)}; style-src 'unsafe-inline'; "
        "img-src data: blob:; base-uri 'none'; form-action 'none'"
    )
    return (
        '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{policy}">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{html_text(run.path.absolute().name)}</title>\n<style>{_STYLE}</style></head>\n<body>\n"
        + "\n".join(parts)
        + f"\n<script>{plotly}</script>\n<script>{_DRAW}</script>\n</body></html>\n"
    )


def _hash(script: str) -> str:
    """The source expression that lets one inline script run."""
    return f"'sha256-{base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()}'"


def _figure(figure: go.Figure) -> str:
    """A place for a figure, and its data in a block that no parser of HTML or scripts reads as such."""
    data = figure.to_json()
    for character in "<>&\u2028\u2029":
        data = data.replace(character, f"\\u{ord(character):04x}")
    height = figure.layout.height or 450
    return f'<div class="figure" style="min-height: {height}px"></div><script type="application/json">{data}</script>'


def _facts(values: dict[str, Any]) -> str:
    rows = (f"<div><code>{html_text(k)} = <b>{html_text(v)}</b></code></div>" for k, v in sorted(values.items()))
    return f'<div class="facts">{"".join(rows)}</div>'


def _head(run: Run, config: dict[str, Any], metrics: pd.DataFrame, evaluations: pd.DataFrame) -> str:
    done, steps = len(metrics), config.get("steps", len(metrics))
    facts = [html_text(config.get(name, "?")) for name in ("method", "model", "task")]
    facts += [f"seed {html_text(config.get('seed', '?'))}", f"{done} of {html_text(steps)} steps"]
    facts += filter(None, [html_text(run.abilities)])
    found = ""
    if len(evaluations):
        first, last = evaluations.iloc[0], evaluations.iloc[-1]
        found = f"<p>Held-out accuracy <b>{last.accuracy:.1%}</b> after step {last.step:.0f}"
        found += f" (95% interval {last.accuracy_low:.1%} to {last.accuracy_high:.1%})"
        if len(evaluations) > 1:
            found += f", from {first.accuracy:.1%} after step {first.step:.0f}"
        found += f", on {last.eval_questions:.0f} questions, greedy, from the prior prompt."
        if "trace_dependence" in evaluations:
            found += (
                f" Exchanging the trace for another question's moves log p(y|x,z) by {last.trace_dependence:.1f} "
                f"nats ({first.trace_dependence:.1f} before training)."
            )
        if "guess_accuracy" in evaluations:
            found += f" On other questions the same answers would score {last.guess_accuracy:.1%}."
        found += "</p>"
    title = html_text(run.path.absolute().name)
    return f'<h1>{title}</h1>\n<div class="soft">{" · ".join(facts)}</div>\n{found}{alarms_html(run.alarms)}'


def _question(group: pd.DataFrame, where: str = "") -> str:
    """A question's heading."""
    question, answer = (group[name].iloc[0] for name in ("question", "answer"))
    return f"<h3>{where}{html_passage(question)}reference answer <code>{html_text(answer)}</code></h3>"


def _starred(run: Run) -> list[str]:
    """The traces that readers starred, with their notes; also a note whose trace is gone."""
    notes = {key: entry for key, entry in read_notes(run).items() if entry["starred"]}
    parts, stored = ["<h2>Starred traces</h2>"] * bool(notes), set(run.steps)
    for key in sorted(notes, key=place):
        step, rollout = place(key)
        frame = run.traces(step) if step in stored else pd.DataFrame({"rollout": []})
        own, where = frame[frame["rollout"] == rollout], f"step {step}, rollout {rollout}: "
        gone = f"<h3>{where}its trace is not stored</h3><p>★ <i>{html_text(notes[key]['note'])}</i></p>"
        settings = Settings.at(run.config, frame)
        parts += [_question(own, where), token_html(noted(own, notes), settings)] if len(own) else [gone]
    return parts


def _traces(frame: pd.DataFrame, settings: Settings) -> list[str]:
    """The first questions' traces that make the answer most probable, token by token, and all as text."""
    parts = [_figure(plot_answer_logprobs(frame, 2 * QUESTIONS))]
    chosen = frame[frame["example_id"].isin(frame["example_id"].unique()[:QUESTIONS])]
    for _, group in chosen.assign(total=answer_logprob(chosen)).groupby("example_id", sort=False):
        best = group.loc[[own["total"].idxmax() for _, own in group.groupby("source", sort=False)]]
        parts += [_question(group), token_html(best, settings)]
    summary = f"<summary>all traces of these {chosen['example_id'].nunique()} questions</summary>"
    return [*parts, f'<details>{summary}<div class="wide">{trace_table(chosen)}</div></details>']
