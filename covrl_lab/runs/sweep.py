"""A grid of papermill runs on any executor: resumable, one process a run, all state in files.

folder/
  0d1c2b3a/            one run folder a configuration, named by ``RunConfig.run_id``
    config.json        what to train; written before the run starts
    notebook.ipynb     the executed notebook, log.txt what its process wrote
    lock               held by the process that executes the run; says where that is
    done.json, failed.json, cancelled.json   how it ended; absent while it waits or runs

Every process that sees the folder sees the same table.
"""

import itertools
import math
import os
import re
import subprocess
import threading
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import BrokenExecutor, Future
from dataclasses import replace
from pathlib import Path
from typing import Any, Self

import pandas as pd

from ..config import RunConfig
from ..files import fcntl, refuse_links
from ..types import ConfigError
from .folder import read_lines, steps_done
from .worker import ENDS, POLL_SECONDS, first_line, status, supervise, write_end

# In a checkout the notebooks lie beside the package; an installed wheel holds this one inside it.
_PLACES = [Path(__file__).resolve().parents[up] / "notebooks" / "03_train.ipynb" for up in (2, 1)]
NOTEBOOK = next((place for place in _PLACES if place.is_file()), _PLACES[0])


class LocalExecutor:
    """Gives every call a thread at once; ``Sweep`` decides how many. The threads end with their process."""

    def submit(self, function: Any, *args: Any, **kwargs: Any) -> Future:
        future: Future = Future()
        future.set_running_or_notify_cancel()

        def work() -> None:
            try:
                future.set_result(function(*args, **kwargs))
            except BaseException as error:
                future.set_exception(error)

        threading.Thread(target=work, daemon=True).start()
        return future


class Sweep:
    """Every combination of ``grid``'s values over the settings ``base``, one run folder each.

    folder: holds the run folders. Without base and grid, the sweep is what the folder holds already.
    base, grid: fields of ``RunConfig`` but ``run_dir``; a configuration given twice is one run.
    notebook: the papermill target, ``03_train.ipynb`` unless given.
    threads: of each run's numerical libraries; None: this machine's cores shared by the runs of the default
    executor, and with another executor what its workers' environment says.
    timeout_minutes: a run that takes longer is killed and counts as failed.

    ConfigError: a setting, a combination or a folder that cannot work; nothing has been written then.
    """

    def __init__(
        self,
        folder: str | Path,
        base: Mapping[str, Any] | None = None,
        grid: Mapping[str, Sequence[Any]] | None = None,
        *,
        notebook: str | Path | None = None,
        threads: int | None = None,
        timeout_minutes: float | None = None,
    ) -> None:
        self.folder, self.notebook, self.base = Path(folder), Path(notebook or NOTEBOOK), dict(base or {})
        self.threads, self.timeout_minutes = threads, timeout_minutes
        for name, value in (("threads", threads), ("timeout_minutes", timeout_minutes)):
            if value is not None and not 0 < value < math.inf:
                raise ConfigError(f"{name} must be above 0, not {value!r}")
        if not self.notebook.is_file():
            raise ConfigError(f"there is no notebook {str(self.notebook)!r}; give notebook= its path")
        self.runs: dict[str, RunConfig] = {}  # id -> configuration
        if base is None and grid is None:
            stored = {path.parent.name: RunConfig.load(path) for path in sorted(self.folder.glob("*/config.json"))}
            self.runs = {name: config for name, config in stored.items() if config.run_id() == name}
            if not self.runs:
                raise ConfigError(f"{str(self.folder)!r} holds no runs of a sweep; give base and grid")
        else:
            for settings in (self.base | point for point in _points(grid or {})):
                if "run_dir" in settings:
                    raise ConfigError("a sweep names its run folders itself; leave run_dir out")
                try:
                    config = RunConfig(**settings)
                except ConfigError as error:
                    raise ConfigError(f"{error} (in the combination {settings})") from error
                self.runs[config.run_id()] = replace(config, run_dir=str(self.path(config.run_id())))
        self._driver: _Driver | None = None

    def path(self, run_id: str) -> Path:
        """The folder of a run."""
        return self.folder / run_id

    # --- looking

    @property
    def varied(self) -> list[str]:
        """The settings in which the runs differ, in the order of ``RunConfig``."""
        values = [config.to_dict() for config in self.runs.values()]
        return [name for name in values[0] if name != "run_dir" and len({v[name] for v in values}) > 1]

    def table(self) -> pd.DataFrame:
        """One row a run, from the files as they are now.

        Columns: id, the settings that vary, status (queued, running, done, cancelled, failed), reason (of a
        failed or cancelled run), step (finished so far), steps, accuracy (latest held-out share), seconds
        (spent on training steps).
        """
        rows, varied = [], self.varied
        for run_id, config in self.runs.items():
            path = self.path(run_id)
            how, reason = status(path)
            metrics, evaluations = (read_lines(path / name) for name in ("metrics.jsonl", "evaluations.jsonl"))
            row = {"id": run_id} | {name: getattr(config, name) for name in varied}
            row |= {"status": how, "reason": reason or metrics.fault or evaluations.fault}
            row |= {"step": len(metrics.records), "steps": config.steps}
            row["accuracy"] = evaluations.records[-1]["accuracy"] if evaluations.records else None
            row["seconds"] = round(sum(record["seconds"] for record in metrics.records), 1)
            rows.append(row)
        return pd.DataFrame(rows)

    @property
    def statuses(self) -> dict[str, str]:
        """id -> status."""
        return {run_id: status(self.path(run_id))[0] for run_id in self.runs}

    # --- driving

    @property
    def driven(self) -> bool:
        """Whether this object is driving the sweep."""
        return self._driver is not None and self._driver.is_alive()

    @property
    def error(self) -> str | None:
        """Why the driver takes no more runs, if it does not."""
        return self._driver.error if self._driver is not None else None

    def submit(self, executor: Any = None, workers: int | None = None) -> Self:
        """Start driving in the background, if it is not driven already; returns at once.

        executor: anything with ``submit(function, *args)`` whose futures have ``done()`` and ``result()``
        and whose workers see ``folder``; None: processes on this machine, each with one of its GPUs. workers:
        runs at once; None: as many as the executor takes, and 1 on this machine.
        """
        if self.driven:
            return self
        if fcntl is None:
            raise ConfigError("a sweep needs Linux or macOS; train one run at a time here, or use WSL")
        if workers is not None and workers < 1:
            raise ConfigError(f"workers must be 1 or more, not {workers!r}")
        for run_id, config in self.runs.items():
            refuse_links(self.path(run_id))
            path = self.path(run_id) / "config.json"
            if not path.exists():
                path.parent.mkdir(parents=True, exist_ok=True)
                config.save(path)
            elif different := config.differences(RunConfig.load(path)):
                name = next(iter(different))
                raise ConfigError(f"{str(path.parent)!r} holds another configuration ({name} differs)")
        self._driver = _Driver(self, executor, workers)
        self._driver.start()
        return self

    def wait(self, timeout_seconds: float | None = None) -> Self:
        """Wait until the driver has nothing left to do, or for ``timeout_seconds``."""
        if self._driver is not None:
            self._driver.join(timeout_seconds)
        return self

    def run(self, executor: Any = None, workers: int | None = None, progress: bool = True) -> pd.DataFrame:
        """Drive to the end and return the table; ``progress`` prints a line when a run starts or ends.

        Ctrl-C ends the runs on this machine; they resume next time. RuntimeError where the executor broke.
        """
        self.submit(executor, workers)
        seen = dict.fromkeys(self.runs, "queued")
        try:
            while self.driven:
                self.wait(POLL_SECONDS)
                changed = {i: how for i, how in self.statuses.items() if how != seen[i]}
                seen |= changed
                for run_id in changed if progress else ():
                    print(self.describe(run_id), flush=True)
        except BaseException:
            self.stop()
            raise
        if self.error:
            raise RuntimeError(f"{self.error}; run again with a new executor, finished runs are kept")
        return self.table()

    def describe(self, run_id: str) -> str:
        """One line: id, what varies, status and its reason."""
        values = [f"{name}={getattr(self.runs[run_id], name)}" for name in self.varied]
        how, reason = status(self.path(run_id))
        return f"{' '.join([run_id, *values])}: {how}{f' ({reason})' if reason else ''}"

    def stop(self) -> None:
        """End the driver and, after their step, the runs it started on this machine; they stay queued and resume.

        What waits on a cluster is withdrawn; what has begun there continues unless it is cancelled.
        """
        if self._driver is not None:
            self._driver.stop()

    def cancel(self, *run_ids: str) -> None:
        """Leave runs out: a queued one does not start, a running one is killed within a second, anywhere."""
        for run_id in self._known(run_ids):
            path = self.path(run_id)
            if status(path)[0] not in ENDS:
                write_end(path, "cancelled", f"after step {steps_done(path)}")

    def retry(self, *run_ids: str) -> list[str]:
        """Queue failed or cancelled runs again (without arguments all that failed); returns their ids."""
        chosen = self._known(run_ids) or [i for i, how in self.statuses.items() if how == "failed"]
        chosen = [i for i in chosen if status(self.path(i))[0] in ("failed", "cancelled")]
        for run_id in chosen:
            for name in ("failed.json", "cancelled.json", "STOP"):
                (self.path(run_id) / name).unlink(missing_ok=True)
        return chosen

    def _known(self, run_ids: Iterable[str]) -> list[str]:
        unknown = [i for i in run_ids if i not in self.runs]
        if unknown:
            raise ConfigError(f"there is no run {unknown[0]!r} in this sweep; table() lists them")
        return list(run_ids)


class _Driver(threading.Thread):
    """Keeps up to ``workers`` runs of a sweep with an executor until all have ended, here or elsewhere."""

    def __init__(self, sweep: Sweep, executor: Any, workers: int | None) -> None:
        super().__init__(daemon=True)
        self.sweep, self.local = sweep, executor is None
        self.executor = executor or LocalExecutor()
        self.workers, self.threads = workers or (1 if self.local else len(sweep.runs)), sweep.threads
        if self.threads is None and self.local:
            cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
            self.threads = max(1, cores // self.workers)
        self.error: str | None = None  # why it takes no more runs, if it does not
        self.stopped = threading.Event()
        self.submitted: dict[str, tuple[Any, str | None]] = {}  # id -> future, and the run's GPU on this machine
        self.gpus = gpus() if self.local else []

    def run(self) -> None:
        while not self.stopped.is_set():
            statuses = self.sweep.statuses
            for run_id, (future, _) in list(self.submitted.items()):
                if future.done():
                    del self.submitted[run_id]
                    self._note_end(run_id, future)
            waiting = [i for i, how in statuses.items() if how == "queued" and i not in self.submitted]
            for run_id in waiting[: max(0, self.workers - len(self.submitted))]:
                if not self.error:
                    self._submit(run_id)
            if not self.submitted and (self.error or set(statuses.values()) <= set(ENDS)):
                return
            time.sleep(POLL_SECONDS)

    def _submit(self, run_id: str) -> None:
        sweep, busy = self.sweep, [gpu for _, gpu in self.submitted.values()]
        gpu = min(self.gpus, key=busy.count, default=None)  # the first of those with the fewest runs
        arguments = (str(sweep.path(run_id)), str(sweep.notebook), self.threads, sweep.timeout_minutes)
        here = {"stop": self.stopped, "gpu": gpu} if self.local else {}
        try:
            self.submitted[run_id] = self.executor.submit(supervise, *arguments, **here), gpu
        except Exception as error:
            self.error = first_line(f"the executor takes no more runs: {type(error).__name__}: {error}")

    def _note_end(self, run_id: str, future: Any) -> None:
        """Take note of a future that has ended; what the run came to stands in its folder."""
        path = self.sweep.path(run_id)
        try:
            future.result()
        except BrokenExecutor as error:  # nobody knows which run it was: they stay queued
            self.error = first_line(f"the executor broke: {error}")
        except Exception as error:
            if status(path)[0] not in ENDS:
                write_end(path, "failed", f"lost by its executor: {type(error).__name__}: {error}")

    def stop(self) -> None:
        """End the thread; withdraw what waits, and wait for what runs on this machine."""
        self.stopped.set()
        self.join()
        for future, _ in self.submitted.values():
            if not future.cancel() and isinstance(future, Future):
                future.exception()
        self.submitted.clear()


def gpus() -> list[str]:
    """The GPUs of this machine that this process may use, as CUDA_VISIBLE_DEVICES names them; found without torch."""
    if "CUDA_VISIBLE_DEVICES" in os.environ:
        return listed(os.environ["CUDA_VISIBLE_DEVICES"])
    try:
        found = subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True).stdout
    except OSError:
        return []
    return re.findall(r"^GPU (\d+):", found, re.MULTILINE)


def listed(text: str) -> list[str]:
    """The values of a comma-separated list."""
    return [value.strip() for value in text.split(",") if value.strip()]


def _points(grid: Mapping[str, Sequence[Any]]) -> Iterator[dict[str, Any]]:
    """Every combination of one value a name; a list of one may be the value itself, as papermill passes it on."""
    columns = {}
    for name, values in grid.items():
        values = listed(values) if isinstance(values, str) else [values] if type(values) in (int, float) else values
        columns[name] = values
        if not isinstance(values, Sequence) or not values:
            raise ConfigError(f"grid {name!r} needs a list of values, not {values!r}")
    return (dict(zip(columns, point, strict=True)) for point in itertools.product(*columns.values()))
