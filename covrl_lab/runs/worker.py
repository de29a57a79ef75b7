"""One run of a sweep: its lock, its status, the process that executes it and the function that watches it.

A run is executed by a process of its own, ``python -m covrl_lab.runs.worker``. That process, its kernel and
whoever watches it share the operating system's lock on ``lock``, which is free when the last of them is gone.
So a crash leaves nothing locked, and two sweeps on one folder never execute a run at the same time.
"""

import ctypes
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
from dataclasses import fields
from pathlib import Path
from typing import Any, TextIO

from ..config import RunConfig
from ..files import lock, locked, read_object, write_whole
from ..types import ConfigError
from .folder import steps_done

ENDS = ("done", "cancelled", "failed")  # markers a run folder can hold, the first one present counts
POLL_SECONDS = 0.3
STOP_SECONDS = 60.0  # that a stopped run has to finish its step and save a checkpoint
STOPPED = "its sweep was stopped"  # what a sweep writes into a run's file STOP: such a run stays queued
_THREAD_VARIABLES = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS", "RAYON_NUM_THREADS")


def first_line(text: str) -> str:
    """The first line of a message, in at most 300 characters."""
    return (text.strip().splitlines() or [""])[0][:300]


def write_end(folder: Path, how: str, reason: str = "", **more: Any) -> None:
    """Mark a run as ended; the first line of the reason stands in the table."""
    write_whole(folder / f"{how}.json", json.dumps({"reason": first_line(reason), **more}) + "\n")


def status(folder: str | Path) -> tuple[str, str]:
    """("queued" | "running" | "done" | "cancelled" | "failed", reason in one sentence) of a run folder."""
    folder = Path(folder)
    for how in ENDS:
        try:
            return how, str(read_object(folder / f"{how}.json", "delete it to run again").get("reason", ""))
        except ConfigError as error:
            if not isinstance(error.__cause__, FileNotFoundError):
                return how, str(error)
    return ("running" if locked(folder / "lock") else "queued"), ""


# --- the process that executes a run


def _die_with_parent() -> None:
    """Ask the system to kill this process when its parent dies; on Linux only."""
    if sys.platform == "linux":
        pr_set_pdeathsig = 1
        ctypes.CDLL(None).prctl(pr_set_pdeathsig, signal.SIGKILL)


def execute(folder: Path, notebook: Path, lock: int, sockets: str) -> None:
    """Execute a run in this process, and write down how it ended; raises what the notebook raised.

    lock: file descriptor of the run's lock, which the kernel inherits. sockets: folder for the kernel's sockets.
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
    defaults = {field.name: field.default for field in fields(RunConfig)}
    settings = {name: value for name, value in config.to_dict().items() if value != defaults[name]}
    started, first = time.time(), steps_done(folder)
    print(f"--- started after step {first} of {config.steps}", flush=True)
    try:
        papermill.execute_notebook(
            notebook,
            folder / "notebook.ipynb",
            settings | {"run_dir": str(folder)},
            kernel_name="python3",
            language="python",
            start_timeout=300,
            progress_bar=False,
            log_output=True,
            kernel_manager_class=Kernel,
            store_widget_state=False,
        )
    except Exception as error:
        of_a_cell = isinstance(error, papermill.PapermillExecutionError)
        name, text = (error.ename, error.evalue) if of_a_cell else (type(error).__name__, error)
        write_end(folder, "failed", f"{name}: {text}")
        raise
    steps = steps_done(folder)
    if steps < config.steps:
        if not _stopped_by_sweep(folder):
            write_end(folder, "cancelled", f"stopped after step {steps} of {config.steps} by a file STOP")
    else:
        write_end(folder, "done", seconds=round(time.time() - started, 1), first_step=first)
        print("--- done", flush=True)


def _stopped_by_sweep(folder: Path) -> bool:
    asked = folder / "STOP"
    return asked.exists() and asked.read_text(encoding="utf-8") == STOPPED


# --- what an executor calls


def supervise(
    folder: str,
    notebook: str,
    threads: int | None = None,
    timeout_minutes: float | None = None,
    stop: threading.Event | None = None,
    gpu: str | None = None,
) -> str:
    """Execute one run in a process of its own and watch it; returns the run's status.

    Does nothing for a run that has ended or is at work elsewhere. threads: of its numerical libraries; None: as the
    environment says. gpu: the only one that the run sees; None: all. The process is killed when the run is cancelled,
    or after ``timeout_minutes``. After ``stop`` the run ends its step, within STOP_SECONDS, and stays queued.
    """
    path = Path(folder)
    with open(path / "lock", "a", encoding="utf-8") as held:
        ours = lock(held) is not False and status(path)[0] not in ENDS
        if ours:
            if _stopped_by_sweep(path):  # by one that died meanwhile
                (path / "STOP").unlink()
            # Made here, as the process that executes the run may be killed.
            with tempfile.TemporaryDirectory(prefix="covrl", ignore_cleanup_errors=True) as sockets:
                child = _start(path, notebook, threads, gpu, held, sockets)
                why = _watch(path, child, timeout_minutes, stop)
            if why is not None and status(path)[0] not in ENDS:
                write_end(path, "failed", why)
    for _ in range(100 if ours else 0):  # a killed process's kernel holds the run for an instant longer
        if not locked(path / "lock"):
            break
        time.sleep(0.05)
    return status(path)[0]


def _start(
    path: Path, notebook: str, threads: int | None, gpu: str | None, lock: TextIO, sockets: str
) -> subprocess.Popen:
    """The process that executes a run."""
    environment = dict(os.environ, JUPYTER_PREFER_ENV_PATH="1", COVRL_LAB_PARENT=str(os.getpid()))
    if threads is None and "SLURM_CPUS_PER_TASK" in os.environ:
        threads = int(os.environ["SLURM_CPUS_PER_TASK"])
    if threads is not None:
        environment |= dict.fromkeys(_THREAD_VARIABLES, str(threads))
    if gpu is not None:
        environment["CUDA_VISIBLE_DEVICES"] = gpu
    command = [sys.executable, "-m", "covrl_lab.runs.worker", str(path), notebook, str(lock.fileno()), sockets]
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
    patience, asked = math.inf, path / "STOP"  # until when a stopped run may go on
    try:
        while child.poll() is None:
            now = time.monotonic()
            if now > patience or (path / "cancelled.json").exists():
                return None
            if now > deadline:
                return f"ran for longer than {timeout_minutes:g} minutes"
            if stop is not None and stop.is_set() and patience == math.inf:
                patience = now + STOP_SECONDS
                write_whole(asked, STOPPED)
            time.sleep(POLL_SECONDS)
        if patience < math.inf:
            return None
    finally:
        child.kill()
        code = child.wait()
        if patience < math.inf:
            asked.unlink(missing_ok=True)
    killed = f"killed by {signal.Signals(-code).name}" if code < 0 else f"exit status {code}"
    return f"{killed} after step {steps_done(path)}; log.txt has what it wrote"


def limit_cells(minutes: float) -> None:
    """From the next cell on, a cell of this notebook that runs for longer fails, also by hand; 0: no limit.

    ConfigError on Windows, which has no such alarm, unless ``minutes`` is 0.
    """
    if not hasattr(signal, "SIGALRM"):
        if minutes:
            raise ConfigError("cell_minutes needs Linux or macOS; set it to 0 here")
        return
    from IPython import get_ipython

    def expired(*_: Any) -> None:
        raise TimeoutError(f"the cell ran for longer than {minutes:g} minutes (cell_minutes)")

    signal.signal(signal.SIGALRM, expired)
    events = get_ipython().events
    events.register("pre_run_cell", lambda _: signal.setitimer(signal.ITIMER_REAL, 60 * minutes))
    events.register("post_run_cell", lambda _: signal.setitimer(signal.ITIMER_REAL, 0))


if __name__ == "__main__":  # as ``supervise`` starts it
    _die_with_parent()
    if os.getppid() != int(os.environ["COVRL_LAB_PARENT"]):
        sys.exit("the process that supervises this run has gone")
    execute(Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3]), sys.argv[4])
