"""A grid of papermill runs on any executor: resumable, one process a run, all state in files.

folder/
  0d1c2b3a/            one run folder a configuration, named by ``RunConfig.run_id``
    config.json        what to train; written before the run starts
    notebook.ipynb     the executed notebook, log.txt what its process wrote
    lock               held by the process that executes the run; says where that is
    done.json, failed.json, cancelled.json   how it ended; absent while it waits or runs

A run is executed by a process of its own. That process, its kernel and whoever watches it share the operating
system's lock on ``lock``, which is free when the last of them is gone. So nothing is left locked by a crash,
two sweeps on one folder never execute a run at the same time, and every process that sees the folder sees the
same table. A run that was interrupted goes on from its checkpoint.

``python -m covrl_lab.runs.sweep FOLDER --grid alpha=0,0.5,1 --grid seed=0,1 --steps 20`` does the same.
"""

from __future__ import annotations

import argparse
import ctypes
import fcntl
import itertools
import json
import math
import os
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import BrokenExecutor, Future
from contextlib import contextmanager
from dataclasses import fields
from pathlib import Path
from typing import Any, TextIO

import pandas as pd

from ..config import RunConfig
from ..files import write_whole
from ..types import ConfigError
from .folder import read_jsonl

NOTEBOOK = Path(__file__).resolve().parents[2] / "notebooks" / "03_train.ipynb"
ENDS = ("done", "cancelled", "failed")  # markers a run folder can hold, the first one present counts
POLL_SECONDS = 0.3
_THREAD_VARIABLES = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS", "RAYON_NUM_THREADS")


# --- one run folder


def _end(folder: Path, how: str, reason: str = "", **more: Any) -> None:
    write_whole(folder / f"{how}.json", json.dumps({"reason": reason, **more}) + "\n")


@contextmanager
def _lock(folder: Path) -> Iterator[TextIO | None]:
    """Try to hold the run; yields the locked file, or None where others hold it.

    Processes that inherit the file share the lock; it is free when all of them have closed it or died.
    """
    with open(folder / "lock", "a", encoding="utf-8") as file:
        for _ in range(20):  # a process that only looks holds the lock for an instant
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except OSError:
                time.sleep(0.05)
        else:
            yield None
            return
        yield file


def _locked(folder: Path) -> bool:
    """Whether some process executes the run now."""
    try:
        with open(folder / "lock", encoding="utf-8") as file:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except FileNotFoundError:
        return False
    except OSError:
        return True
    return False


def status(folder: str | Path) -> tuple[str, str]:
    """("queued" | "running" | "done" | "cancelled" | "failed", reason in one sentence) of a run folder."""
    folder = Path(folder)
    for how in ENDS:
        try:
            return how, json.loads((folder / f"{how}.json").read_text(encoding="utf-8"))["reason"]
        except FileNotFoundError:
            continue
    return ("running" if _locked(folder) else "queued"), ""


def _steps_done(folder: Path) -> int:
    return len(read_jsonl(folder / "metrics.jsonl"))


def _sentence(text: str) -> str:
    """The first line of a message, in at most 300 characters."""
    lines = str(text).strip().splitlines() or [""]
    return lines[0][:300]


# --- the process that executes a run


def _die_with_parent() -> None:
    """Ask the system to kill this process when its parent dies; on Linux only."""
    if sys.platform == "linux":
        pr_set_pdeathsig = 1
        ctypes.CDLL(None).prctl(pr_set_pdeathsig, signal.SIGKILL)


def _settings(config: RunConfig) -> dict[str, Any]:
    """The notebook's parameters: every setting that is not the field's default."""
    defaults = {field.name: field.default for field in fields(RunConfig)}
    return {name: value for name, value in config.to_dict().items() if value != defaults[name]}


def execute(folder: Path, notebook: Path, lock: int, sockets: str) -> None:
    """Execute a run in this process, and write down how it ended; raises what the notebook raised.

    lock: file descriptor of the run's lock, which the kernel inherits. The kernel dies with this process.
    sockets: folder for the kernel's sockets, which whoever watches this process removes.
    """
    import papermill
    from jupyter_client.manager import AsyncKernelManager

    class Kernel(AsyncKernelManager):
        """Talks through sockets in a folder: TCP ports found free may be taken by a run beside this one."""

        def __init__(self, **kwargs: Any) -> None:
            super().__init__(transport="ipc", ip=f"{sockets}/kernel", **kwargs)

        async def start_kernel(self, **kwargs: Any) -> None:
            await super().start_kernel(preexec_fn=_die_with_parent, pass_fds=(lock,), **kwargs)

    config = RunConfig.load(folder / "config.json")
    started, first = time.time(), _steps_done(folder)
    print(f"--- started after step {first} of {config.steps}", flush=True)
    try:
        papermill.execute_notebook(
            notebook,
            folder / "notebook.ipynb",
            _settings(config) | {"run_dir": str(folder)},
            kernel_name="python3",
            language="python",
            start_timeout=300,
            progress_bar=False,
            log_output=True,
            kernel_manager_class=Kernel,
            store_widget_state=False,
        )
    except papermill.PapermillExecutionError as error:
        _end(folder, "failed", _sentence(f"{error.ename}: {error.evalue}"))
        raise
    except Exception as error:
        _end(folder, "failed", _sentence(f"{type(error).__name__}: {error}"))
        raise
    steps = _steps_done(folder)
    if steps < config.steps:
        _end(folder, "cancelled", f"stopped after step {steps} of {config.steps} by a file STOP")
    else:
        _end(folder, "done", seconds=round(time.time() - started, 1), first_step=first)
        print("--- done", flush=True)


# --- what an executor calls


def supervise(
    folder: str,
    notebook: str,
    threads: int | None = None,
    timeout_minutes: float | None = None,
    stop: threading.Event | None = None,
) -> str:
    """Execute one run in a process of its own and watch it; returns the run's status.

    Does nothing for a run that has ended or is at work elsewhere. threads: of the run's numerical libraries;
    None leaves the environment's. The process is killed when the run is cancelled, after ``timeout_minutes``,
    or when ``stop`` is set, which leaves the run queued.
    """
    path = Path(folder)
    with _lock(path) as lock:
        if lock is not None and status(path)[0] not in ENDS:
            # Here, as the process that executes the run may be killed. Its kernel may live an instant longer.
            with tempfile.TemporaryDirectory(prefix="covrl", ignore_cleanup_errors=True) as sockets:
                child = _start(path, notebook, threads, lock, sockets)
                why = _watch(path, child, timeout_minutes, stop)
            if why is not None and status(path)[0] not in ENDS:
                _end(path, "failed", why)
    return status(path)[0]


def _start(path: Path, notebook: str, threads: int | None, lock: TextIO, sockets: str) -> subprocess.Popen:
    """The process that executes a run."""
    environment = dict(os.environ, JUPYTER_PREFER_ENV_PATH="1", COVRL_LAB_PARENT=str(os.getpid()))
    if threads is None and "SLURM_CPUS_PER_TASK" in os.environ:
        threads = int(os.environ["SLURM_CPUS_PER_TASK"])
    if threads is not None:
        environment |= {name: str(threads) for name in _THREAD_VARIABLES}
    command = [sys.executable, "-m", "covrl_lab.runs.sweep", "--execute"]
    command += [str(path), notebook, str(lock.fileno()), sockets]
    with open(path / "log.txt", "ab") as log:
        child = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            env=environment,
            pass_fds=(lock.fileno(),),
            start_new_session=True,  # Ctrl-C reaches the driver only, which ends its runs itself
        )
    lock.truncate(0)
    lock.write(json.dumps({"host": socket.gethostname(), "pid": child.pid}))
    lock.flush()
    return child


def _watch(
    path: Path, child: subprocess.Popen, timeout_minutes: float | None, stop: threading.Event | None
) -> str | None:
    """Wait for the process, or kill it; why the run counts as failed, if it has not written an end itself."""
    deadline = math.inf if timeout_minutes is None else time.monotonic() + 60 * timeout_minutes
    try:
        while child.poll() is None:
            if stop is not None and stop.is_set():
                return None
            if (path / "cancelled.json").exists():
                return None
            if time.monotonic() > deadline:
                return f"ran for longer than {timeout_minutes:g} minutes"
            time.sleep(POLL_SECONDS)
    finally:
        child.kill()
        code = child.wait()
    killed = f"killed by {signal.Signals(-code).name}" if code < 0 else f"exit status {code}"
    return f"{killed} after step {_steps_done(path)}; log.txt has what it wrote"


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


# --- the sweep


class Sweep:
    """Every combination of ``grid``'s values over the settings ``base``, one run folder each.

    folder: holds the run folders. Without a grid, the sweep is what the folder holds already.
    base, grid: fields of ``RunConfig``; a point given twice, also by two spellings of the same configuration,
    is one run. ``run_dir`` is the sweep's own.
    notebook: the papermill target, ``notebooks/03_train.ipynb`` unless given.
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
        self.folder, self.notebook = Path(folder), Path(notebook or NOTEBOOK)
        self.base = dict(base or {})
        self.threads, self.timeout_minutes = threads, timeout_minutes
        if not self.notebook.is_file():
            raise ConfigError(f"there is no notebook {str(self.notebook)!r}; give notebook= its path")
        self.runs: dict[str, RunConfig] = {}  # id -> configuration
        if base is None and grid is None:
            for path in sorted(self.folder.glob("*/config.json")):
                config = RunConfig.load(path)
                if config.run_id() == path.parent.name:
                    self.runs[path.parent.name] = config
            if not self.runs:
                raise ConfigError(f"{str(self.folder)!r} holds no runs of a sweep; give base and grid")
        else:
            for point in _points(grid or {}):
                self._add(self.base | point)
        self.error: str | None = None  # why the driver takes no more runs, if it does not
        self._flying: dict[str, Any] = {}  # id -> future
        self._stop = threading.Event()
        self._driver: threading.Thread | None = None

    def _add(self, settings: dict[str, Any]) -> None:
        if "run_dir" in settings:
            raise ConfigError("a sweep names its run folders itself; leave run_dir out")
        try:
            run_id = RunConfig.from_dict(settings).run_id()
            self.runs[run_id] = RunConfig.from_dict(settings | {"run_dir": str(self.path(run_id))})
        except ConfigError as error:
            raise ConfigError(f"{error} (in the combination {settings})") from error

    def path(self, run_id: str) -> Path:
        """The folder of a run."""
        return self.folder / run_id

    # --- looking

    @property
    def varied(self) -> list[str]:
        """The settings in which the runs differ, in the order of ``RunConfig``."""
        values = [config.to_dict() for config in self.runs.values()]
        names = [field.name for field in fields(RunConfig) if field.name != "run_dir"]
        return [name for name in names if len({v[name] for v in values}) > 1]

    def table(self) -> pd.DataFrame:
        """One row a run, from the files as they are now.

        Columns: id, the settings that vary, status (queued, running, done, cancelled, failed), reason (of a
        failed or cancelled run), step (finished so far), steps, accuracy (latest held-out share), seconds
        (spent on training steps).
        """
        rows = []
        for run_id, config in self.runs.items():
            path = self.path(run_id)
            how, reason = status(path)
            metrics, evaluations = read_jsonl(path / "metrics.jsonl"), read_jsonl(path / "evaluations.jsonl")
            row = {"id": run_id} | {name: getattr(config, name) for name in self.varied}
            rows.append(
                row
                | {
                    "status": how,
                    "reason": reason,
                    "step": len(metrics),
                    "steps": config.steps,
                    "accuracy": evaluations[-1]["accuracy"] if evaluations else None,
                    "seconds": round(sum(record["seconds"] for record in metrics), 1),
                }
            )
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

    def submit(self, executor: Any = None, workers: int | None = None) -> Sweep:
        """Start driving in the background; returns at once. A sweep that is being driven goes on as it is.

        executor: anything with ``submit(function, *args)`` whose futures have ``done()`` and ``result()``
        and whose workers see ``folder``; None: processes on this machine. workers: runs at once; None: as
        many as the executor takes, and 1 on this machine.
        """
        if self.driven:
            return self
        for run_id, config in self.runs.items():
            self._prepare(self.path(run_id), config)
        self._stop, self.error = threading.Event(), None
        local = executor is None
        workers = workers or (1 if local else len(self.runs))
        threads = self.threads
        if threads is None and local:
            threads = max(1, _cores() // workers)
        arguments = (executor or LocalExecutor(), workers, threads, self._stop if local else None)
        self._driver = threading.Thread(target=self._drive, args=arguments, daemon=True)
        self._driver.start()
        return self

    @staticmethod
    def _prepare(path: Path, config: RunConfig) -> None:
        """Write the run's configuration, unless the folder holds it already."""
        existing = path / "config.json"
        if existing.exists():
            different = config.differences(RunConfig.load(existing))
            if different:
                raise ConfigError(
                    f"{str(path)!r} holds another configuration ({next(iter(different))} differs)"
                )
        else:
            path.mkdir(parents=True, exist_ok=True)
            config.save(existing)

    def _drive(self, executor: Any, workers: int, threads: int | None, stop: Any) -> None:
        """Keep up to ``workers`` runs with the executor until every run has ended, here or elsewhere."""
        while not self._stop.is_set():
            statuses = self.statuses
            for run_id, future in list(self._flying.items()):
                if future.done():
                    del self._flying[run_id]
                    self._land(run_id, future)
            waiting = [i for i, how in statuses.items() if how == "queued" and i not in self._flying]
            for run_id in waiting[: max(0, workers - len(self._flying))] if not self.error else ():
                arguments = (str(self.path(run_id)), str(self.notebook), threads, self.timeout_minutes)
                extra = {} if stop is None else {"stop": stop}
                try:
                    self._flying[run_id] = executor.submit(supervise, *arguments, **extra)
                except Exception as error:
                    self.error = _sentence(
                        f"the executor takes no more runs: {type(error).__name__}: {error}"
                    )
                    break
            if not self._flying and (self.error or set(statuses.values()) <= set(ENDS)):
                return
            time.sleep(POLL_SECONDS)

    def _land(self, run_id: str, future: Any) -> None:
        """Take note of a future that has ended; what the run came to stands in its folder."""
        try:
            future.result()
        except BrokenExecutor as error:  # nobody knows which run it was: they stay queued
            self.error = _sentence(f"the executor broke: {error}")
        except Exception as error:
            if status(self.path(run_id))[0] not in ENDS:
                why = f"lost by its executor: {type(error).__name__}: {error}"
                _end(self.path(run_id), "failed", _sentence(why))

    def wait(self, timeout_seconds: float | None = None) -> Sweep:
        """Wait until the driver has nothing left to do, or for ``timeout_seconds``."""
        if self._driver is not None:
            self._driver.join(timeout_seconds)
        return self

    def run(self, executor: Any = None, workers: int | None = None, progress: bool = True) -> pd.DataFrame:
        """Drive to the end and return the table. Ctrl-C ends the runs on this machine; they go on next time.

        progress: print a line when a run starts or ends. RuntimeError where the executor broke; the runs it
        had not finished stay queued.
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
        """End the driver and the runs it started on this machine; they stay queued and go on next time.

        What waits on a cluster is withdrawn; what has begun there may go on, unless it is cancelled.
        """
        self._stop.set()
        self.wait()
        for future in self._flying.values():
            if not future.cancel() and isinstance(future, Future):
                future.exception()
        self._flying.clear()

    def cancel(self, *run_ids: str) -> None:
        """Leave runs out: a queued one does not start, a running one is killed within a second, anywhere."""
        for run_id in self._known(run_ids):
            if status(self.path(run_id))[0] in ("queued", "running"):
                _end(self.path(run_id), "cancelled", f"after step {_steps_done(self.path(run_id))}")

    def retry(self, *run_ids: str) -> list[str]:
        """Queue failed or cancelled runs again (without arguments all that failed); returns their ids.

        They go on from their last checkpoint as soon as the sweep is driven.
        """
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


def _cores() -> int:
    """Cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def listed(text: str) -> list[str]:
    """The values of a comma-separated list."""
    return [value.strip() for value in text.split(",") if value.strip()]


def _points(grid: Mapping[str, Sequence[Any]]) -> Iterator[dict[str, Any]]:
    """Every combination of one value a name."""
    columns = {name: listed(values) if isinstance(values, str) else values for name, values in grid.items()}
    for name, values in columns.items():
        if not isinstance(values, Sequence) or not values:
            raise ConfigError(f"grid {name!r} needs a list of values, not {values!r}")
    return (dict(zip(columns, point, strict=True)) for point in itertools.product(*columns.values()))


def limit_cells(minutes: float) -> None:
    """From the next cell on, a cell of this notebook that runs for longer fails; 0: no limit.

    The limit is the kernel's own, so that it holds by hand and under papermill alike.
    """
    from IPython import get_ipython

    def expired(*_: Any) -> None:
        raise TimeoutError(f"the cell ran for longer than {minutes:g} minutes (cell_minutes)")

    signal.signal(signal.SIGALRM, expired)
    events = get_ipython().events
    events.register("pre_run_cell", lambda _: signal.setitimer(signal.ITIMER_REAL, 60 * minutes))
    events.register("post_run_cell", lambda _: signal.setitimer(signal.ITIMER_REAL, 0))


# --- command line


def main() -> None:
    """Parse the flags, drive the sweep and print its table; or execute one run for ``supervise``."""
    if sys.argv[1:2] == ["--execute"]:
        _die_with_parent()
        if os.getppid() != int(os.environ["COVRL_LAB_PARENT"]):
            sys.exit("the process that supervises this run has gone")
        folder, notebook, lock, sockets = sys.argv[2:]
        execute(Path(folder), Path(notebook), int(lock), sockets)
        return
    parser = argparse.ArgumentParser(prog="python -m covrl_lab.runs.sweep", allow_abbrev=False)
    parser.error = lambda message: parser.exit(2, f"{parser.prog}: {message}\n")
    parser.add_argument("folder", help="holds the runs; without further settings, they go on")
    parser.add_argument("--grid", action="append", default=[], metavar="NAME=VALUE,VALUE")
    parser.add_argument("--workers", type=int, default=1, help="runs at once")
    parser.add_argument("--threads", type=int, help="of each run; default: cores / workers")
    parser.add_argument("--timeout_minutes", type=float, help="of a run")
    parser.add_argument("--notebook", help="papermill target")
    parser.add_argument("--retry", action="store_true", help="also run again what failed")
    for field in fields(RunConfig):
        parser.add_argument(f"--{field.name}", default=argparse.SUPPRESS, metavar=field.type.split(" |")[0])
    options = vars(parser.parse_args())
    own = ("folder", "grid", "workers", "threads", "timeout_minutes", "notebook", "retry")
    words = {"None": None, "True": True, "False": False}
    base = {name: words.get(value, value) for name, value in options.items() if name not in own}
    grid = {}
    for argument in options["grid"]:
        name, _, values = argument.partition("=")
        grid[name] = [words.get(value, value) for value in listed(values)]
    named = {name: options[name] for name in ("notebook", "threads", "timeout_minutes")}
    try:
        sweep = Sweep(options["folder"], base or None, grid or None, **named)
        if options["retry"]:
            sweep.retry()
        table = sweep.run(workers=options["workers"])
    except (ConfigError, RuntimeError) as error:
        parser.exit(2, f"{parser.prog}: {error}\n")
    except KeyboardInterrupt:
        parser.exit(130, "interrupted; the same command goes on\n")
    print(table.to_string(index=False))
    sys.exit(int((table["status"] != "done").any()))


if __name__ == "__main__":
    main()
