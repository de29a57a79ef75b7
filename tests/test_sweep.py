"""Sweeps with real processes: killed drivers and workers, two drivers, a Dask cluster, submitit."""

import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from contextlib import suppress

import nbformat
import psutil
import pytest
from helpers import ROOT, TINY_RUN, checkout_environment, heed_signals, until
from helpers import numbers as steps_of
from nbclient import NotebookClient

from covrl_lab import ConfigError, RunConfig
from covrl_lab.runs import worker
from covrl_lab.runs.folder import read_lines, steps_in
from covrl_lab.runs.sweep import LocalExecutor, Sweep, gpus
from covrl_lab.runs.worker import status, supervise

SMALL = TINY_RUN | {"steps": 4, "checkpoint_every": 2}
GRID = {"alpha": [0.25, 0.5, 0.75], "seed": [0, 1]}
PATIENCE = 420  # seconds until a test gives up


@pytest.fixture(autouse=True)
def environment(monkeypatch):
    """What the processes inherit: this checkout, one thread each."""
    for name, value in checkout_environment().items():
        monkeypatch.setenv(name, value)


def alive(*processes):
    """Those that still run; a zombie is dead, it only waits to be counted."""
    return [p for p in processes if p.is_running() and p.status() != psutil.STATUS_ZOMBIE]


def numbers(folder):
    """What a run measured, without what no two runs share: its steps and its evaluations."""
    return steps_of(folder), (folder / "evaluations.jsonl").read_text()


@pytest.fixture
def lean(tmp_path):
    """The train notebook without what it draws, to save time."""
    notebook = nbformat.read(ROOT / "notebooks" / "03_train.ipynb", as_version=4)
    last = next(i for i, cell in enumerate(notebook.cells) if "for record in trainer" in cell.source)
    notebook.cells = notebook.cells[: last + 1]
    nbformat.write(notebook, tmp_path / "lean.ipynb")
    return tmp_path / "lean.ipynb"


@pytest.fixture(scope="module")
def reference(tmp_path_factory):
    """id -> numbers of every run of the grid, trained one after the other without papermill or sweep."""
    folder = tmp_path_factory.mktemp("reference")
    code = """
import itertools, json, sys
from covrl_lab import RunConfig, Trainer
small, grid, folder = json.loads(sys.argv[1])
for values in itertools.product(*grid.values()):
    settings = small | dict(zip(grid, values))
    run_id = RunConfig(**settings).run_id()
    Trainer(RunConfig(**settings, run_dir=f"{folder}/{run_id}"), progress=False).run()
"""
    argument = json.dumps([SMALL, GRID, str(folder)])
    environment = checkout_environment()
    subprocess.run([sys.executable, "-c", code, argument], check=True, env=environment)
    found = {path.name: numbers(path) for path in folder.iterdir()}
    assert len(found) == 6 and all(len(steps) == SMALL["steps"] for steps, _ in found.values())
    assert len({str(steps) for steps, _ in found.values()}) == 6, "runs cannot be told apart"
    return found


def assert_finished_once(sweep, reference, runs=6):
    """Every run is done, by one execution, with the numbers of uninterrupted training."""
    assert set(sweep.runs) <= set(reference) and len(sweep.runs) == runs
    reference = {run_id: reference[run_id] for run_id in sweep.runs}
    assert set(sweep.statuses.values()) == {"done"}, sweep.table()
    for run_id, expected in reference.items():
        assert (sweep.path(run_id) / "log.txt").read_text().count("--- done") == 1
        assert numbers(sweep.path(run_id)) == expected
    accuracies = sweep.table().set_index("id")["accuracy"]
    for run_id, (_, evaluations) in reference.items():
        assert accuracies[run_id] == json.loads(evaluations.splitlines()[-1])["accuracy"]


def holder(folder):
    """The living process that executes a run."""
    if status(folder)[0] != "running":
        return None
    text = (folder / "lock").read_text()
    with suppress(psutil.NoSuchProcess):  # it has just ended
        return psutil.Process(json.loads(text)["pid"]) if text else None
    return None


def in_training(sweep):
    """(id, process) of a run that has trained a step and has not ended."""
    for run_id in sweep.runs:
        path = sweep.path(run_id)
        if (path / "metrics.jsonl").exists() and (process := holder(path)):
            return run_id, process
    return None


def driver(folder, *more):
    """A sweep of the grid in a process of its own."""
    grid = [f"--grid={name}={','.join(map(str, values))}" for name, values in GRID.items()]
    base = [f"--{name}={value}" for name, value in SMALL.items()]
    command = [sys.executable, "-m", "covrl_lab", "sweep", str(folder), *grid, *base, *more]
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True)


def test_killed_driver_and_killed_worker(reference, lean, tmp_path):
    sweep = Sweep(tmp_path / "sweep", SMALL, GRID, notebook=lean)
    first = driver(sweep.folder, f"--notebook={lean}", "--workers=2", "--threads=1")
    until(lambda: list(sweep.statuses.values()).count("done") >= 2, "two runs are done")
    busy = until(lambda: in_training(sweep), "a run is in training")[1]
    family = [busy, *busy.children(recursive=True)]
    assert len(family) >= 2, "the kernel is a process of its own"
    first.kill()
    first.communicate()
    until(lambda: not alive(*family), "orphans died")
    until(lambda: "running" not in sweep.statuses.values(), "locks are free")
    early = {i: (sweep.path(i) / "done.json").stat() for i, how in sweep.statuses.items() if how == "done"}
    assert 2 <= len(early) < 6

    # Two drivers at once go on; one of their workers is killed, which is no reason to stop for the others.
    both = [driver(sweep.folder, "--workers=1", "--threads=1") for _ in range(2)]
    victims = []

    def killed():
        found = in_training(sweep)
        if found and found[0] not in early:
            found[1].kill()
            until(lambda: status(sweep.path(found[0]))[0] in ("done", "failed"), "the killed run has ended")
            if status(sweep.path(found[0]))[0] == "failed":
                victims.append(found[0])
        return victims

    until(killed, "a worker is killed before its run is done")
    assert [process.wait(PATIENCE) for process in both] == [1, 1]
    outputs = [process.communicate()[0] for process in both]
    (victim,) = victims
    statuses = sweep.statuses
    assert statuses.pop(victim) == "failed" and set(statuses.values()) == {"done"}, outputs
    assert "SIGKILL" in status(sweep.path(victim))[1]
    assert (sweep.path(victim) / "notebook.ipynb").exists() and (sweep.path(victim) / "log.txt").exists()

    # Started again, the failed run stays failed until it is asked for.
    again = driver(sweep.folder)
    assert again.wait(PATIENCE) == 1 and "running" not in again.communicate()[0]
    assert driver(sweep.folder, "--retry", "--threads=1").wait(PATIENCE) == 0
    assert_finished_once(sweep, reference)
    for run_id, before in early.items():
        after = (sweep.path(run_id) / "done.json").stat()
        assert (after.st_ino, after.st_mtime_ns) == (before.st_ino, before.st_mtime_ns), "done twice"


def test_dask_cluster_with_a_killed_worker(reference, lean, tmp_path):
    distributed = pytest.importorskip("distributed", reason="needs the dask extra")
    sweep = Sweep(tmp_path / "sweep", SMALL, GRID | {"alpha": [0.25, 0.5]}, notebook=lean)
    cluster = distributed.LocalCluster(n_workers=2, threads_per_worker=1, resources={"GPU": 1}, dashboard_address=None)
    with cluster, distributed.Client(cluster) as client:
        sweep.submit(client.get_executor(resources={"GPU": 1}))
        until(lambda: list(sweep.statuses.values()).count("done") >= 2, "two runs are done")
        run_id, process = until(lambda: in_training(sweep), "a run is in training")
        worker = process.parent()
        assert worker.pid in {info["pid"] for info in client.run(_identity).values()}
        worker.kill()
        sweep.wait(PATIENCE)
        assert sweep.error is None and not sweep.driven
    assert_finished_once(sweep, reference, runs=4)


def _identity():
    return {"pid": os.getpid()}


def test_submitit_local_executor(reference, lean, tmp_path):
    submitit = pytest.importorskip("submitit", reason="needs the slurm extra")
    executor = submitit.AutoExecutor(tmp_path / "jobs", cluster="local")
    executor.update_parameters(timeout_min=10)
    sweep = Sweep(tmp_path / "sweep", SMALL, GRID | {"alpha": [0.75]}, notebook=lean, threads=1)
    table = sweep.run(executor, workers=2, progress=False)
    assert list(table["status"]) == ["done"] * 2
    assert_finished_once(sweep, reference, runs=2)


# --- a target without a model: what happens depends on the seed


TARGET = """
import json, os, pathlib, time
folder = pathlib.Path(run_dir)
folder.joinpath("threads.txt").write_text(os.environ.get("OMP_NUM_THREADS", ""))
folder.joinpath("gpu.txt").write_text(os.environ.get("CUDA_VISIBLE_DEVICES", ""))
step = json.dumps({"step": 1, "seconds": 0.5}) + chr(10)
if seed == 1:
    raise ValueError("<b>too</b> hot" + chr(10) + "second line")
if seed == 2:
    os._exit(3)
folder.joinpath("metrics.jsonl").write_text(step * steps if seed != 4 else step)
while seed == 3 and not folder.joinpath("enough").exists():
    time.sleep(0.05)
"""


@pytest.fixture
def toy(tmp_path):
    """A sweep over seeds of ``TARGET``, by seed: 0 works, 1 fails, 2 dies, 3 waits, 4 stops early."""
    parameters = nbformat.v4.new_code_cell("steps: int = 0\nseed: int = 0\nrun_dir: str = None")
    parameters.metadata["tags"] = ["parameters"]
    cells = [parameters, nbformat.v4.new_code_cell(TARGET)]
    nbformat.write(nbformat.v4.new_notebook(cells=cells), tmp_path / "target.ipynb")

    def make(*seeds, **options):
        options = {"notebook": tmp_path / "target.ipynb", "threads": 3} | options
        return Sweep(tmp_path / "sweep", {"model": "tiny", "steps": 2}, {"seed": seeds}, **options)

    return make


def test_failures_have_reasons_and_wait_for_a_retry(toy, capsys):
    sweep = toy(0, 1, 2, 4)
    ids = dict(zip((0, 1, 2, 4), sweep.runs, strict=True))
    table = sweep.run(workers=2)
    assert list(table["status"]) == ["done", "failed", "failed", "cancelled"]
    assert list(table["step"]) == [2, 0, 0, 1] and list(table["seconds"]) == [1.0, 0, 0, 0.5]
    assert table["reason"][1] == "ValueError: <b>too</b> hot"
    assert "died" in table["reason"][2].lower()
    assert "step 1 of 2" in table["reason"][3] and "STOP" in table["reason"][3]
    assert (sweep.path(ids[0]) / "threads.txt").read_text() == "3"
    executed = nbformat.read(sweep.path(ids[1]) / "notebook.ipynb", as_version=4)
    assert "too" in str(executed.cells) and "too" in (sweep.path(ids[1]) / "log.txt").read_text()
    assert f"{ids[1]} seed=1: failed (ValueError: <b>too</b> hot)" in capsys.readouterr().out

    # Nothing starts again by itself; a retry starts what was named, a second process sees the same table.
    started = [(sweep.path(i) / "log.txt").read_text() for i in sweep.runs]
    assert toy(0, 1, 2, 4).run().equals(table)
    assert [(sweep.path(i) / "log.txt").read_text() for i in sweep.runs] == started
    assert Sweep(sweep.folder).table().set_index("id").loc[list(sweep.runs)].reset_index().equals(table)
    assert sweep.retry(ids[1], ids[0]) == [ids[1]] and sweep.statuses[ids[1]] == "queued"
    assert list(sweep.run()["status"]) == list(table["status"])
    logs = [(sweep.path(i) / "log.txt").read_text().count("--- started") for i in sweep.runs]
    assert logs == [1, 2, 1, 1]


def test_cancel_stop_and_timeout(toy, tmp_path, monkeypatch):
    (tmp_path / "t").mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "t"))
    monkeypatch.setattr(worker, "STOP_SECONDS", 0.5)  # the target does not heed a file STOP
    sweep = toy(3, 0)
    waiting, fine = sweep.runs
    sweep.submit()
    started = sweep.path(waiting) / "metrics.jsonl"
    until(started.exists, "the first run is at work")
    assert list((tmp_path / "t").glob("covrl*/kernel-*"))
    child = holder(sweep.path(waiting))
    kernel = child.children()[0]

    # Another process cancels a running and a queued run.
    other = Sweep(sweep.folder, notebook=sweep.notebook)
    other.cancel(waiting, fine)
    sweep.wait(PATIENCE)
    until(lambda: not alive(child, kernel), "run and kernel died")
    assert not list((tmp_path / "t").iterdir()), "the folder of the kernel's sockets is left"
    assert list(sweep.table()["status"]) == ["cancelled", "cancelled"]
    assert not (sweep.path(fine) / "log.txt").exists(), "started though cancelled"

    # stop() ends the run here and leaves it queued.
    sweep.retry(waiting)
    started.unlink()
    sweep.submit()
    until(started.exists, "the run is at work again")
    child = holder(sweep.path(waiting))
    sweep.stop()
    assert not alive(child) and not sweep.driven
    assert sweep.statuses == {waiting: "queued", fine: "cancelled"}
    assert not (sweep.path(waiting) / "STOP").exists()

    assert "longer than 0.001 minutes" in toy(3, 0, timeout_minutes=0.001).run()["reason"][0]

    # The driver sees what somebody else retries while it works.
    (sweep.path(waiting) / "enough").touch()
    other.retry(waiting)
    sweep.submit()
    other.retry(fine)
    sweep.wait(PATIENCE)
    assert set(sweep.statuses.values()) == {"done"}


def test_a_run_cancelled_while_it_is_stopped_stays_cancelled(toy):
    sweep = toy(3)
    (run_id,) = sweep.runs
    sweep.path(run_id).mkdir(parents=True)
    (sweep.path(run_id) / "STOP").write_text(worker.STOPPED)  # of a driver that died: the run starts all the same
    sweep.submit()
    until((sweep.path(run_id) / "metrics.jsonl").exists, "the run is at work")
    assert not (sweep.path(run_id) / "STOP").exists()
    stopping = threading.Thread(target=sweep.stop)
    stopping.start()
    until((sweep.path(run_id) / "STOP").exists, "it is asked to stop")
    sweep.cancel(run_id)
    stopping.join(PATIENCE)
    assert not stopping.is_alive() and sweep.statuses == {run_id: "cancelled"}
    assert not (sweep.path(run_id) / "STOP").exists()


def test_stop_lets_a_run_save_its_step(tmp_path):
    """Its settings ask for no checkpoint on the way, and none of its steps is lost."""
    sweep = Sweep(tmp_path / "sweep", SMALL | {"steps": 500, "eval_every": 0, "checkpoint_every": 1000}, {"seed": [0]})
    (run_id,) = sweep.runs
    path = sweep.path(run_id)
    sweep.submit()
    until(lambda: len(read_lines(path / "metrics.jsonl").records) > 1, "it trains")
    sweep.stop()
    steps = len(read_lines(path / "metrics.jsonl").records)
    assert steps_in(path / "checkpoints") == [steps] and 2 <= steps < 500
    assert sweep.statuses == {run_id: "queued"} and not (path / "STOP").exists()


@pytest.mark.parametrize(("name", "code"), [("SIGTERM", 143), ("SIGHUP", 129), ("SIGINT", 130)])
def test_a_sweep_that_is_ended_lets_its_run_end_and_says_so(toy, name, code):
    sweep = toy(3)
    (run_id,) = sweep.runs
    path, settings = sweep.path(run_id), ["--model=tiny", "--steps=2", "--grid=seed=3"]
    command = [
        sys.executable,
        "-m",
        "covrl_lab",
        "sweep",
        str(sweep.folder),
        *settings,
        f"--notebook={sweep.notebook}",
    ]
    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.PIPE, "text": True}
    process = subprocess.Popen(command, preexec_fn=heed_signals, **quiet)
    until(lambda: (path / "metrics.jsonl").exists() or process.poll() is not None, "the run is at work")
    process.send_signal(getattr(signal, name))
    until(lambda: (path / "STOP").exists() or process.poll() is not None, "it is asked to stop")
    (path / "enough").touch()
    said = process.communicate(timeout=PATIENCE)[1]
    assert process.returncode == code, said
    assert said == f"covrl-lab sweep: ended by {name}; the same command resumes it\n"
    assert sweep.statuses[run_id] in ("done", "queued")


def test_runs_at_once_on_this_machine_have_a_gpu_each(toy, tmp_path, monkeypatch):
    """The GPUs of a made-up nvidia-smi; a run that starts later takes the one that is free."""
    program = tmp_path / "nvidia-smi"
    program.write_text("#!/bin/sh\necho 'GPU 0: Some GPU (UUID: GPU-a)'\necho 'GPU 1: Some GPU (UUID: GPU-b)'\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    sweep = toy(3, 0, 5)
    first, *others = sweep.runs
    sweep.submit(workers=2)
    until(lambda: {sweep.statuses[i] for i in others} == {"done"}, "the other two are done")
    (sweep.path(first) / "enough").touch()
    sweep.wait(PATIENCE)
    assert [(sweep.path(i) / "gpu.txt").read_text() for i in sweep.runs] == ["0", "1", "1"]
    for allowed, found in (("2,GPU-b", ["2", "GPU-b"]), ("-1", ["-1"]), ("", [])):
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", allowed)
        assert gpus() == found


def test_a_held_run_is_left_to_its_holder(toy):
    sweep = toy(3)
    (run_id,) = sweep.runs
    sweep.submit()
    until(lambda: holder(sweep.path(run_id)), "the run has started")
    assert supervise(str(sweep.path(run_id)), str(sweep.notebook)) == "running"
    second = toy(3).submit()
    time.sleep(1)
    assert second.driven and second.statuses == {run_id: "running"}
    until((sweep.path(run_id) / "metrics.jsonl").exists, "the run is at work")
    (sweep.path(run_id) / "enough").touch()
    second.wait(PATIENCE)
    assert second.statuses == {run_id: "done"}
    assert (sweep.path(run_id) / "log.txt").read_text().count("--- started") == 1


def test_a_broken_executor_leaves_runs_queued(toy):
    from concurrent.futures import ProcessPoolExecutor
    from multiprocessing import get_context

    sweep = toy(3, 0)
    first, second = sweep.runs
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        sweep.submit(pool)
        child = until(lambda: holder(sweep.path(first)), "the first run has started")
        child.parent().send_signal(signal.SIGKILL)
        sweep.wait(PATIENCE)
    until(lambda: set(sweep.statuses.values()) == {"queued"}, "the run died with its worker")
    assert "broke" in sweep.error and not alive(child)
    with pytest.raises(RuntimeError, match="new executor"):
        sweep.run(pool)
    (sweep.path(first) / "enough").touch()
    assert list(sweep.run()["status"]) == ["done", "done"]


def test_an_exception_of_the_executor_is_a_reason(toy):
    class Lossy(LocalExecutor):
        def submit(self, function, *args, **kwargs):
            return super().submit(lambda: 1 / 0)

    table = toy(0).run(Lossy())
    assert list(table["reason"]) == ["lost by its executor: ZeroDivisionError: division by zero"]


# --- the limit of a cell


def test_a_cell_that_runs_too_long_fails_and_the_next_one_has_its_own_time(monkeypatch):
    """In a real kernel: the alarm is set while a cell runs, and off between cells."""
    monkeypatch.setenv("JUPYTER_PREFER_ENV_PATH", "1")
    sources = [
        "import signal, time\nfrom covrl_lab.runs.worker import limit_cells\nlimit_cells(60)\nbetween = []",
        "after = lambda _: between.append(signal.getitimer(signal.ITIMER_REAL)[0])\n"
        "get_ipython().events.register('post_run_cell', after)",
        "print(0 < signal.getitimer(signal.ITIMER_REAL)[0] <= 3600, between)",
        "limit_cells(0.002)",
        "try:\n    time.sleep(120)\nfinally:\n    limit_cells(0)",
        "print(signal.getitimer(signal.ITIMER_REAL)[0], between)",
    ]
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(source) for source in sources])
    NotebookClient(notebook, timeout=PATIENCE, allow_errors=True, kernel_name="python3").execute()
    outputs = [cell.outputs for cell in notebook.cells]
    assert [len(found) for found in outputs] == [0, 0, 1, 0, 1, 1], outputs
    assert outputs[2][0].text == "True [0.0]\n"
    assert outputs[4][0].ename == "TimeoutError" and "longer than 0.002 minutes" in outputs[4][0].evalue
    assert outputs[5][0].text == "0.0 [0.0, 0.0, 0.0, 0.0]\n"


# --- the grid


def test_ids_come_from_the_resolved_configuration(tmp_path):
    sweep = Sweep(tmp_path, {"steps": 2}, {"method": ["covrl", "rlpr"], "alpha": [None, 0.5], "seed": "0, 1"})
    expected = {}
    for method, alpha, seed in [("covrl", 0.5, 0), ("covrl", 0.5, 1)] + [
        ("rlpr", alpha, seed) for alpha in (1.0, 0.5) for seed in (0, 1)
    ]:
        config = RunConfig(steps=2, method=method, alpha=alpha, seed=seed)
        expected[config.run_id()] = (method, alpha, seed)
    assert {i: (c.method, c.alpha, c.seed) for i, c in sweep.runs.items()} == expected
    assert {config.run_dir for config in sweep.runs.values()} == {str(tmp_path / i) for i in expected}
    assert sweep.varied[:2] == ["method", "alpha"] and "seed" in sweep.varied
    assert list(tmp_path.iterdir()) == [], "nothing is written before the start"
    one = [Sweep(tmp_path, {}, grid).runs for grid in ({"alpha": 0.3, "seed": 2}, {"alpha": [0.3], "seed": "2"})]
    assert one[0] == one[1] and len(one[0]) == 1, "as papermill -p alphas 0.3 has it"
    assert set(sweep.table()["status"]) == {"queued"}


@pytest.mark.parametrize(
    ("base", "grid", "message"),
    [
        ({}, {"alhpa": [0.1]}, "did you mean 'alpha'"),
        ({}, {"alpha": [0.1, 1.5]}, r"between 0 and 1.*'alpha': 1.5"),
        ({"run_dir": "x"}, {"seed": [0]}, "run_dir"),
        ({}, {"seed": []}, "needs a list"),
        ({}, {"seed": {3}}, "needs a list"),
        (None, None, "no runs"),
    ],
)
def test_bad_grids_are_refused(tmp_path, base, grid, message):
    with pytest.raises(ConfigError, match=message):
        Sweep(tmp_path, base, grid)
    assert list(tmp_path.iterdir()) == []


def test_other_refusals(tmp_path):
    with pytest.raises(ConfigError, match="no notebook"):
        Sweep(tmp_path, {}, {}, notebook="missing.ipynb")
    sweep = Sweep(tmp_path, {"model": "tiny"}, {})
    with pytest.raises(ConfigError, match="no run 'x'"):
        sweep.cancel("x")
    (run_id,) = sweep.runs
    sweep.path(run_id).mkdir()
    RunConfig(model="tiny", steps=1).save(sweep.path(run_id) / "config.json")
    with pytest.raises(ConfigError, match="another configuration"):
        sweep.submit()


def test_command_line_refuses_in_one_line(tmp_path):
    command = [sys.executable, "-m", "covrl_lab", "sweep", str(tmp_path), "--grid", "alhpa=1"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stderr.startswith("covrl-lab sweep: unknown setting 'alhpa'; did you mean 'alpha'?")
    assert len(done.stderr.splitlines()) == 1
