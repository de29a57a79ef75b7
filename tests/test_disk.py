"""Disks that fill up, turn read-only or vanish, and clocks that go back: a sentence each, and nothing lost."""

import contextlib
import errno
import os
import shutil
import subprocess
import time
from pathlib import Path

import pytest
from helpers import TINY_RUN, assert_one_sentence, contents, made_up_run, make_trainer, numbers

from covrl_lab import load_run
from covrl_lab.files import Owner
from covrl_lab.runs.folder import steps_in
from covrl_lab.types import ConfigError
from covrl_lab.views.monitor import snapshot, status_html
from covrl_lab.views.report import report

RUN = TINY_RUN | {"steps": 6, "checkpoint_every": 2, "eval_every": 3, "device": "cpu", "difficulty": 1}


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    return make_trainer(tmp_path_factory.mktemp("whole") / "run", RUN).run().run_dir


@pytest.fixture
def disk(tmp_path):
    """A small disk of its own, mounted at a folder."""
    place = tmp_path / "disk"
    place.mkdir()
    if os.geteuid() or subprocess.run(["mount", "-t", "tmpfs", "-o", "size=220m", "tmpfs", place]).returncode:
        pytest.skip("mounting a disk needs root")
    yield place
    subprocess.run(["umount", "-l", place], check=True)


def fill(disk):
    with contextlib.suppress(OSError), open(disk / "filler", "wb", buffering=0) as file:
        while True:
            file.write(bytes(2**20))
    with contextlib.suppress(OSError), open(disk / "rest", "wb", buffering=0) as file:
        while True:
            file.write(bytes(512))


def sentence(action, *words):
    with pytest.raises(ConfigError) as caught:
        action()
    assert_one_sentence(str(caught.value))
    assert all(word in str(caught.value) for word in words), str(caught.value)


def test_a_disk_that_fills_up_costs_nothing(disk, whole):
    run = disk / "run"
    trainer = make_trainer(run, RUN)
    steps = iter(trainer)
    next(steps), next(steps), next(steps)
    fill(disk)
    before = contents(run)
    sentence(lambda: list(steps), "no space left for", "free some and run again, it resumes from step 2")
    after = contents(run)
    assert {name: after.get(name) for name in before} == before
    (disk / "filler").unlink(), (disk / "rest").unlink()
    assert numbers(make_trainer(run, RUN).run().run_dir) == numbers(whole)
    assert not [path for path in run.rglob("*.tmp*")]


def test_a_report_on_a_full_disk_leaves_the_old_one(disk, whole):
    run = shutil.copytree(whole, disk / "run")
    old = report(run).read_bytes()
    fill(disk)
    sentence(lambda: report(run), f"{str(run / 'report.html')!r} cannot be written (No space left on device)")
    assert (run / "report.html").read_bytes() == old and not list(run.glob("*.tmp"))


def test_a_read_only_disk_is_refused_and_can_be_looked_at(disk, whole):
    run = shutil.copytree(whole, disk / "run")
    (run / "STOP").touch()
    before = contents(run)
    subprocess.run(["mount", "-o", "remount,ro", disk], check=True)
    sentence(lambda: make_trainer(run, RUN).run(), str(run), "cannot be written")
    sentence(lambda: make_trainer(disk / "new", RUN).run(), "cannot be written", "choose another run_dir")
    assert len(load_run(run).traces()) == 24 and snapshot(run).status == "finished"
    sentence(lambda: report(run), "report.html", "cannot be written (Read-only file system); choose another file")
    assert contents(run) == before


def test_a_disk_that_turns_read_only_under_a_run(tmp_path, whole, monkeypatch):
    """As Linux does it after an error of the disk."""
    steps = iter(make_trainer(tmp_path / "run", RUN))
    next(steps), next(steps), next(steps)

    def refuse(path, content):
        raise OSError(errno.EROFS, "Read-only file system", str(path))

    with monkeypatch.context() as patched:
        patched.setattr(Path, "write_bytes", refuse)
        sentence(lambda: list(steps), "cannot be written", "Read-only file system", "resumes from step 2")
    assert numbers(make_trainer(tmp_path / "run", RUN).run().run_dir) == numbers(whole)


def test_a_folder_that_vanishes_is_not_made_anew(tmp_path, whole):
    run, aside = tmp_path / "run", tmp_path / "aside"
    steps = iter(make_trainer(run, RUN))
    next(steps), next(steps), next(steps)
    run.rename(aside)
    sentence(lambda: list(steps), "has vanished", "bring it back and run again, it resumes from step 2")
    assert not run.exists() and steps_in(aside / "checkpoints") == [2]
    aside.rename(run)
    assert numbers(make_trainer(run, RUN).run().run_dir) == numbers(whole)


def test_a_clock_that_goes_back_changes_no_number(tmp_path, whole, monkeypatch):
    now, real = [time.time()], time.time
    steps = iter(make_trainer(tmp_path / "run", RUN))
    for record in steps:
        now[0] = real() - 10**7 * record.step
        monkeypatch.setattr(time, "time", lambda: now[0])
        for path in (tmp_path / "run").rglob("*"):
            os.utime(path, (now[0], now[0]))
        shot = snapshot(tmp_path / "run")
        assert shot.status in ("running", "finished") and "-" not in status_html(shot).split("left")[0][-12:]
        assert record.seconds > 0
    assert numbers(tmp_path / "run") == numbers(whole)


def test_a_run_from_the_future_is_running(tmp_path):
    """Written on a machine whose clock is ahead."""
    run = made_up_run(tmp_path / "run")
    (run.path / "config.json").write_text('{"method": "covrl", "steps": 9, "alpha": 0.5, "composite_weight": 0.5}')
    with Owner(run.path):
        assert snapshot(run.path, now=0.0).status == "running"
