"""A run folder has one owner, and the signals that end a process cost it nothing."""

import errno
import os
import shutil
import signal
import subprocess
import sys

import pytest
from helpers import (
    ROOT,
    TRAINED,
    checkout_environment,
    contents,
    flags,
    heed_signals,
    lines,
    make_trainer,
    numbers,
    until,
)

from covrl_lab import files
from covrl_lab.files import Owner
from covrl_lab.runs.folder import read_lines, steps_in
from covrl_lab.types import ConfigError

pytestmark = pytest.mark.skipif(os.name == "nt", reason="these locks and signals are Unix's")
BASE = TRAINED | {"eval_samples": 0, "checkpoint_every": 100, "eval_every": 0}


ENDINGS = [("SIGTERM", 143), ("SIGHUP", 129), ("SIGINT", 130)]  # by name: Windows lacks some


def start(*arguments):
    command = [sys.executable, "-m", "covrl_lab", *arguments]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    return subprocess.Popen(command, env=checkout_environment(), preexec_fn=heed_signals, **pipes)


def train(run_dir, **settings):
    return start("train", *flags(BASE | settings | {"run_dir": run_dir}))


def steps(run_dir):
    return len(read_lines(run_dir / "metrics.jsonl").records)


@pytest.mark.parametrize(("name", "status"), ENDINGS)
def test_a_signal_saves_and_the_run_resumes_to_the_same_numbers(reference_numbers, tmp_path, name, status):
    run = tmp_path / "run"
    process = train(run)
    until(lambda: steps(run) >= 2 or process.poll() is not None, "two steps")
    process.send_signal(getattr(signal, name))
    _, said = process.communicate(timeout=300)
    assert process.returncode == status
    last = said.decode().replace("\r", "\n").strip().splitlines()[-1]
    assert last == f"covrl-lab train: ended by {name}; the same command resumes it" and b"Traceback" not in said
    done = len(lines(run / "metrics.jsonl"))
    assert 2 <= done < 8 and (steps_in(run / "checkpoints") in ([done], []))  # [] where a step was in hand
    make_trainer(run, BASE).run()
    assert numbers(run) == reference_numbers


@pytest.mark.parametrize(("name", "status"), ENDINGS)
def test_an_evaluation_that_is_ended_says_so_and_writes_nothing(whole, tmp_path, name, status):
    run, said = shutil.copytree(whole, tmp_path / "run"), b""
    process = start("evaluate", str(run), "--eval_samples", "1000")
    while b"evaluate:" not in said and (part := os.read(process.stderr.fileno(), 2**16)):  # its bar
        said += part
    process.send_signal(getattr(signal, name))
    said += process.communicate(timeout=300)[1]
    assert process.returncode == status, said.decode()
    assert said.decode().endswith(f"covrl-lab evaluate: ended by {name}\n") and b"Traceback" not in said
    assert contents(run) == contents(whole)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    return make_trainer(tmp_path_factory.mktemp("whole") / "run", BASE).run().run_dir


@pytest.fixture(scope="module")
def reference_numbers(whole):
    return numbers(whole)


def test_a_second_process_is_refused_with_the_name_of_the_first(tmp_path):
    run = tmp_path / "run"
    first = train(run, steps=100_000)
    try:
        until(lambda: steps(run) >= 1 or first.poll() is not None, "a step")
        _, said = train(run, steps=100_000).communicate(timeout=300)
        assert f"is being trained by process {first.pid} on " in said.decode() and b"Traceback" not in said
        with pytest.raises(ConfigError, match=f"process {first.pid} on"):
            make_trainer(run, BASE, steps=100_000).setup()
        written = [record["step"] for record in read_lines(run / "metrics.jsonl").records]
        assert written == list(range(1, len(written) + 1))
    finally:
        first.kill()  # the lock is the system's: a killed owner holds nothing
        first.communicate()
    saved = max(steps_in(run / "checkpoints"), default=0)
    for record in make_trainer(run, BASE, steps=100_000):
        assert record.step == saved + 1
        break


def test_a_folder_trained_by_another_process_meanwhile_is_read_again(tmp_path):
    mine = make_trainer(tmp_path / "run", BASE).setup()
    make_trainer(tmp_path / "run", BASE).run()
    assert list(mine) == [] and mine.step == 8 and len(lines(tmp_path / "run" / "metrics.jsonl")) == 8


def test_two_trainers_of_one_process_take_turns(tmp_path):
    first, second = (make_trainer(tmp_path / "run", BASE) for _ in range(2))
    for record in first:
        with pytest.raises(ConfigError, match=f"process {os.getpid()} on"):
            second.setup()
        if record.step == 3:
            break
    assert next(record.step for record in second) == 4


def test_without_locks_a_file_that_one_process_alone_can_make_stands_in(tmp_path, monkeypatch):
    def none(*_):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(files.fcntl, "flock", none)
    with Owner(tmp_path):
        assert Owner.held(tmp_path) is None, "nobody can know"
        with pytest.raises(ConfigError, match=f"process {os.getpid()} on .*; if it was killed, delete 'held.lock'"):
            Owner(tmp_path).__enter__()
    with Owner(tmp_path):
        pass
    assert [path.name for path in tmp_path.iterdir()] == ["owner.lock"] and Owner.held(tmp_path) is None


@pytest.mark.parametrize("name", ["SIGTERM", "SIGHUP"])
def test_a_script_that_is_ended_saves_first(name, reference_numbers, tmp_path):
    run = tmp_path / "run"
    code = f"from covrl_lab import RunConfig, Trainer; Trainer(RunConfig(**{BASE | {'run_dir': str(run)}!r})).run()"
    process = subprocess.Popen(
        [sys.executable, "-c", code], env=checkout_environment(), preexec_fn=heed_signals, stderr=subprocess.DEVNULL
    )
    until(lambda: steps(run) >= 2 or process.poll() is not None, "two steps")
    process.send_signal(getattr(signal, name))
    assert process.wait(300) == -getattr(signal, name)
    done = len(lines(run / "metrics.jsonl"))
    assert 2 <= done < 8 and (steps_in(run / "checkpoints") in ([done], []))  # [] where a step was in hand
    make_trainer(run, BASE).run()
    assert numbers(run) == reference_numbers


@pytest.mark.slow
def test_a_notebook_under_papermill_that_is_ended_saves_first(reference_numbers, tmp_path):
    """As Slurm does it: the signal goes to papermill and to its kernel."""
    run, secret = tmp_path / "run", "s3cr3t-b7f1"
    parameters = [word for name, value in (BASE | {"run_dir": run}).items() for word in ("-p", name, str(value))]
    command = [sys.executable, "-m", "papermill", "notebooks/03_train.ipynb", str(tmp_path / "out.ipynb")]
    process = subprocess.Popen(
        [*command, "--kernel", "python3", *parameters],
        env=checkout_environment(HF_TOKEN=secret, JUPYTER_PREFER_ENV_PATH="1"),
        cwd=ROOT,
        preexec_fn=heed_signals,
        stderr=subprocess.DEVNULL,
    )
    until(lambda: steps(run) >= 2 or process.poll() is not None, "two steps")
    children = [int(p) for p in subprocess.run(["pgrep", "-P", str(process.pid)], capture_output=True).stdout.split()]
    for pid in (*children, process.pid):
        os.kill(pid, signal.SIGTERM)
    assert process.wait(300) != 0
    until(lambda: Owner.held(run) is False, "the kernel's end")
    done = len(lines(run / "metrics.jsonl"))
    assert 2 <= done < 8 and (steps_in(run / "checkpoints") in ([done], []))
    assert not any(secret.encode() in path.read_bytes() for path in tmp_path.rglob("*") if path.is_file())
    make_trainer(run, BASE).run()
    assert numbers(run) == reference_numbers
