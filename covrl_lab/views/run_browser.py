"""Every run below some folders in one table, and the chosen one in any panel."""

import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import ipywidgets as widgets
import pandas as pd
from IPython.display import HTML

from ..files import written
from ..runs.folder import FOLDERS, run_folders
from ..types import ConfigError
from .bench import PromptBench
from .evaluations import EvaluationBrowser
from .explorer import TraceExplorer
from .html import html_text
from .mixing import MixingRatio
from .monitor import RunMonitor, snapshot
from .side_by_side import TraceComparison
from .widgets import Panel, Table, button, in_turn, row, table_column

_COLUMNS = [  # the accuracies first: a narrow page scrolls to the others
    table_column("name", "run", "text"),
    table_column("before", "before, %", "number", "held-out accuracy at the first evaluation", 1),
    table_column("accuracy", "accuracy, %", "number", "held-out accuracy at the last evaluation", 1),
    table_column("method", "method", "text"),
    table_column("task", "task", "text"),
    table_column("state", "state", "text"),
    table_column("step", "step", "number"),
    table_column("alarms", "alarms", "number", "signs that the run goes wrong; the monitor says which"),
    table_column("written", "last written", "text"),
]
_OPEN: dict[str, Callable[[Path], Panel]] = {
    "Traces": TraceExplorer,
    "Side by side": TraceComparison,
    "Held-out questions": EvaluationBrowser,
    "Mixing": MixingRatio,
    "Monitor": RunMonitor,
    "Prompt bench": lambda path: PromptBench(checkpoint=path),
}


def list_runs(folders: Sequence[str | Path] = FOLDERS, depth: int = 3) -> pd.DataFrame:
    """The runs in ``folders`` and up to ``depth`` folders below them, the last written first.

    Columns: id (the run folder's path), name (the same below its folder), before and accuracy (per cent, first and last
    evaluation), method, task, state (as in the monitor), step, alarms (their number), written (local time). A folder
    that cannot be read has its reason as state.
    """
    rows = []
    for path, name in run_folders(folders, depth).items():
        line = {"id": path.as_posix(), "name": name}
        try:
            shot = snapshot(path)
            config, scores = shot.run.config, 100 * shot.evaluations.get("accuracy", pd.Series(dtype=float))
            line |= {name: str(config.get(name, "")) for name in ("method", "task")}
            state = shot.status if shot.steps else shot.message
            line |= {"state": state, "step": shot.step, "alarms": len(shot.alarms)}
            line |= {"before": scores.iloc[0], "accuracy": scores.iloc[-1]} if len(scores) else {}
        except (OSError, ValueError, KeyError, TypeError) as error:
            line["state"] = f"cannot be read: {error}"
        files = path.iterdir() if path.is_dir() else ()  # a run may be moved meanwhile
        rows.append(line | {"time": max(map(written, files), default=0.0)})
    columns = [column["name"] for column in _COLUMNS]
    frame = pd.DataFrame(rows, columns=["id", *columns[:-1], "time"]).sort_values("time", ascending=False)
    times = [time.strftime("%Y-%m-%d %H:%M", time.localtime(moment)) for moment in frame.pop("time")]
    return frame.assign(written=times).reset_index(drop=True)


class RunBrowser(Panel):
    """The runs below some folders, and panels of the one that is picked.

    folders: where to look (default: ``runs`` here, beside and below this folder). A click on a run picks it, a click on
    a button opens it below. ``picked`` is the run's path; ``panel`` what is open.
    """

    def __init__(self, *folders: str | Path) -> None:
        self.folders = folders or FOLDERS
        self.table = Table(label="runs", columns=_COLUMNS)
        about = "search names, methods, tasks, states"
        self.search = widgets.Text(placeholder=about, layout={"flex": "0 1 400px"})
        self.buttons = [button(name, partial(self.open, name)) for name in _OPEN]
        self.chosen, self.below = widgets.HTML(), widgets.VBox()
        self.panel: Panel | None = None
        self.search.observe(self._list, names="value")
        self.table.observe(self._list, names="sort")
        self.table.observe(self._pick, names="picked")
        parts = [row(self.search, self.refresh_button()), self.table, row(self.chosen, *self.buttons), self.below]
        self.widget = widgets.VBox(parts)
        self.widget.add_class("covrl-runs")
        self._pick()
        self.refresh()

    @property
    def picked(self) -> str:
        """The picked run's folder; empty where there is none."""
        return self.table.picked

    def refresh(self) -> None:
        """Look through the folders again."""
        self.runs = list_runs(self.folders)
        self._list()
        if self.picked not in set(self.runs["id"]):
            self.table.picked = self.runs["id"].iloc[0] if len(self.runs) else ""

    @in_turn
    def _list(self, change: Any = None) -> None:
        sought, texts = self.search.value.strip().lower(), self.runs[["name", "method", "task", "state"]].fillna("")
        fits = [sought in " ".join(line).lower() for line in texts.itertuples(index=False)]
        self.kept = self.runs.loc[pd.Series(fits, self.runs.index, dtype=bool)]
        places = ", ".join(str(Path(folder).absolute()) for folder in self.folders)
        empty = "no run fits; clear the search" if len(self.runs) else f"no runs in {places}"
        self.table.fill(self.kept, len(self.kept), empty=empty)

    @in_turn
    def _pick(self, change: Any = None) -> None:
        self.table.marked = [self.picked]
        self.chosen.value = f"open <code>{html_text(self.picked)}</code> in"
        for one in self.buttons:
            one.disabled = not self.picked

    def open(self, name: str) -> None:
        """Show the picked run below, in the panel of the button ``name``."""
        if isinstance(self.panel, RunMonitor):
            self.panel.close()
        try:
            self.panel = _OPEN[name](Path(self.picked))
            self.below.children = (self.panel.widget,)
        except (ConfigError, OSError, ValueError, KeyError) as error:
            self.panel = None
            self.below.children = (widgets.HTML(f"<p>⚠ {html_text(error)}</p>"),)

    def static(self) -> list[Any]:
        """The table of runs as HTML."""
        return [HTML(self.table.html())]
