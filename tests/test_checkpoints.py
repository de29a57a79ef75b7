"""Run folders and checkpoints: no interruption or crash changes a number, and nothing foreign is touched."""

import errno
import os
import shutil
import signal
import subprocess
import sys
import time
from collections import namedtuple
from pathlib import Path

import pandas as pd
import pytest
from helpers import ROOT, TRAINED, contents, flags, lines, make_trainer, numbers
from safetensors import SafetensorError

from covrl_lab.runs.folder import read_lines, step_file, steps_in
from covrl_lab.train import checkpoints
from covrl_lab.train import step as step_module
from covrl_lab.train import trainer as trainer_module
from covrl_lab.types import ConfigError

# Four quick steps with two updates each; only the last one makes a checkpoint.
SHORT = TRAINED | {
    "steps": 4,
    "eval_every": 2,
    "updates_per_step": 2,
    "checkpoint_every": 10,
    "eval_samples": 0,
    "max_trace_tokens": 12,
}


def frames(folder: Path) -> dict[str, str]:
    return {p.name: pd.read_parquet(p).to_json(double_precision=15) for p in sorted(folder.glob("*.parquet"))}


def assert_same_run(left, right) -> None:
    """Everything but clocks is identical, to the last bit of the adapter and the optimiser."""
    left, right = Path(left), Path(right)
    assert numbers(left) == numbers(right)
    assert lines(left / "evaluations.jsonl") == lines(right / "evaluations.jsonl")
    assert frames(left / "traces") == frames(right / "traces")
    assert frames(left / "evaluations") == frames(right / "evaluations")
    last = steps_in(left / "checkpoints")[-1]
    assert last == steps_in(right / "checkpoints")[-1]
    mine, theirs = (contents(step_file(run / "checkpoints", last, "")) for run in (left, right))
    assert mine == theirs and "adapter_config.json" in mine and "checksums.json" in mine
    assert not [p for run in (left, right) for p in run.rglob("*.tmp*")]


@pytest.fixture(scope="module")
def short_reference(tmp_path_factory):
    return make_trainer(tmp_path_factory.mktemp("short") / "run", SHORT).run()


def test_leaving_the_loop_and_a_stop_file_change_nothing(reference, tmp_path):
    trainer = make_trainer(tmp_path / "run")
    seen = []
    for record in trainer:
        seen.append(record.step)
        if record.step == 2:
            break
    assert steps_in(trainer.run_dir / "checkpoints") == [2]  # leaving saves
    for record in trainer:
        seen.append(record.step)
        if record.step == 4:
            (trainer.run_dir / "STOP").touch()
    assert seen == [1, 2, 3, 4] and len(lines(trainer.run_dir / "metrics.jsonl")) == 4
    assert list(trainer) == []  # still stopped
    (trainer.run_dir / "STOP").unlink()
    again = make_trainer(tmp_path / "run")  # as after a restart of the kernel
    seen += [record.step for record in again]
    assert seen == list(range(1, 9)) and len(again.records) == 8
    assert_same_run(again.run_dir, reference.run_dir)
    assert list(again) == []  # finished: nothing to do, nothing written twice
    assert_same_run(again.run_dir, reference.run_dir)


def start(run_dir, base, **settings) -> list[str]:
    return [sys.executable, "-m", "covrl_lab", "train", *flags(base | settings | {"run_dir": run_dir})]


def test_a_killed_process_resumes_to_the_same_numbers(tmp_path):
    """On the 4-bit base; killed without warning, resumed by the same command."""
    base = TRAINED | {"quantization": "nf4", "eval_samples": 0}
    log = open(tmp_path / "log", "w")
    process = subprocess.Popen(start(tmp_path / "run", base), cwd=ROOT, stdout=log, stderr=log)
    # Meanwhile, the same run without interruption.
    uninterrupted = make_trainer(tmp_path / "uninterrupted", base).setup()
    metrics, deadline = tmp_path / "run" / "metrics.jsonl", time.monotonic() + 500
    while len(read_lines(metrics).records) < 4 and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.01)
    assert process.poll() is None, (tmp_path / "log").read_text()
    os.kill(process.pid, signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    done = len(read_lines(metrics).records)
    saved = steps_in(tmp_path / "run" / "checkpoints")
    assert 4 <= done < 8 and saved[-1] in (3, 6)
    killed = shutil.copytree(tmp_path / "run", tmp_path / "killed")

    finished = subprocess.run(start(tmp_path / "run", base), cwd=ROOT, capture_output=True, text=True)
    assert finished.returncode == 0, finished.stderr
    assert finished.stdout.strip() == f"Run folder: {tmp_path / 'run'}"
    uninterrupted.run()
    assert_same_run(tmp_path / "run", uninterrupted.run_dir)

    # The same crash with everything half-written that a crash can leave.
    for name in ("metrics.jsonl", "evaluations.jsonl"):
        with (killed / name).open("a") as file:
            file.write('{"step": 5, "loss": -0.')
    half = killed / "checkpoints" / "step_00006.tmp"
    half.mkdir(exist_ok=True)
    (half / "adapter_model.safetensors").write_bytes(b"\x00half")
    (killed / "traces" / "step_00005.parquet.99.tmp").write_bytes(b"PAR1half")
    resumed = make_trainer(killed, base)
    first = next(record.step for record in resumed)
    assert first == saved[-1] + 1
    resumed.run()
    assert_same_run(killed, uninterrupted.run_dir)


def test_what_killed_writers_leave_is_removed_and_nothing_else(short_reference, tmp_path):
    run = shutil.copytree(short_reference.run_dir, tmp_path / "run")
    kept = [*contents(run), "owner.lock", "draft.tmp", "chapter.v2.tmp"]
    for name in ("draft.tmp", "chapter.v2.tmp"):
        (run / name).write_text("somebody's own")
    for name in ("report.html", "traces_cache.parquet", "notes.json", "metrics.jsonl", "config.json", "STOP"):
        (run / f"{name}.4711.tmp").write_bytes(b"half")
    for name in ("traces/step_00004.parquet.4711.tmp", "evaluations/step_00004.parquet.4711.tmp"):
        (run / name).write_bytes(b"half")
    (run / "checkpoints" / "step_00005.tmp").mkdir()
    assert make_trainer(run, SHORT).setup().step == 4
    assert sorted(str(p.relative_to(run)) for p in run.rglob("*") if p.is_file()) == sorted(kept)
    assert not (run / "checkpoints" / "step_00005.tmp").exists()


def test_killed_before_the_first_checkpoint(short_reference, tmp_path):
    """All begins again, and the evaluation before training is there once."""
    run = shutil.copytree(short_reference.run_dir, tmp_path / "run")
    shutil.rmtree(run / "checkpoints")
    trainer = make_trainer(run, SHORT)
    for _ in trainer:
        break
    assert [e["step"] for e in lines(run / "evaluations.jsonl")] == [0]
    assert [m["step"] for m in lines(run / "metrics.jsonl")] == [1]
    trainer.run()
    assert_same_run(run, short_reference.run_dir)


@pytest.mark.parametrize("place", ["sample_traces", "trace_logprobs", "evaluate_sets", "step_record", "append_line"])
def test_an_interruption_anywhere_changes_nothing(short_reference, tmp_path, monkeypatch, place):
    """Ctrl-C while sampling, in the second update, in an evaluation, or before the record is written."""
    trainer, calls = make_trainer(tmp_path / "run", SHORT), []
    module = step_module if hasattr(step_module, place) else trainer_module
    working = getattr(module, place)
    # The call that falls into step 2; a step of two updates scores twice, steps 0 and 2 are evaluated.
    fatal = {"sample_traces": 2, "trace_logprobs": 4, "evaluate_sets": 2, "step_record": 2, "append_line": 4}[place]

    def interrupted(*args, **kwargs):
        calls.append(trainer.step)
        if len(calls) == fatal:
            raise KeyboardInterrupt
        return working(*args, **kwargs)

    monkeypatch.setattr(module, place, interrupted)
    with pytest.raises(KeyboardInterrupt):
        trainer.run()
    assert calls[-1] == (1 if place in ("sample_traces", "trace_logprobs") else 2)
    # Whatever happened, the files agree with each other: no checkpoint is ahead of the records.
    assert max(steps_in(tmp_path / "run" / "checkpoints"), default=0) <= len(lines(tmp_path / "run" / "metrics.jsonl"))
    if place == "sample_traces":
        assert steps_in(tmp_path / "run" / "checkpoints") == [1]  # a whole step is not lost
    trainer.run()
    assert_same_run(tmp_path / "run", short_reference.run_dir)


@pytest.mark.parametrize("again", ["same object", "new object"])
def test_a_full_disk_is_one_sentence_and_costs_nothing(short_reference, tmp_path, monkeypatch, again):
    trainer, working = make_trainer(tmp_path / "run", SHORT), Path.write_bytes

    def full(path, content):
        if path.name.startswith("step_00003"):
            working(path, content[:4])
            raise OSError(errno.ENOSPC, "No space left on device")
        working(path, content)

    monkeypatch.setattr(Path, "write_bytes", full)
    trainer_steps = iter(trainer)
    next(trainer_steps), next(trainer_steps)
    before = contents(tmp_path / "run")
    with pytest.raises(ConfigError, match=r"no space left for .*; free some and run again"):
        next(trainer_steps)
    after = contents(tmp_path / "run")
    assert {k: after.get(k) for k in before} == before
    monkeypatch.setattr(Path, "write_bytes", working)
    trainer = trainer if again == "same object" else make_trainer(tmp_path / "run", SHORT)
    trainer.run()
    assert_same_run(tmp_path / "run", short_reference.run_dir)


def test_a_full_disk_under_a_checkpoint(short_reference, tmp_path, monkeypatch):
    """safetensors reports it in its own way; the half checkpoint never counts."""
    trainer, working = make_trainer(tmp_path / "run", SHORT), checkpoints.save_file

    def full(tensors, path):
        Path(path).write_bytes(b"half")
        raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")

    monkeypatch.setattr(checkpoints, "save_file", full)
    with pytest.raises(ConfigError, match="no space left"):
        trainer.run()
    assert steps_in(tmp_path / "run" / "checkpoints") == []
    monkeypatch.setattr(checkpoints, "save_file", working)
    trainer.run()
    assert_same_run(tmp_path / "run", short_reference.run_dir)


def test_another_configuration_in_the_folder_is_refused(reference, no_model):
    before = contents(reference.run_dir)
    with pytest.raises(ConfigError, match=r"another configuration \(alpha is 0.5 there, 0.25 here\)"):
        make_trainer(reference.run_dir, alpha=0.25)
    assert contents(reference.run_dir) == before
    make_trainer(reference.run_dir, checkpoint_every=1, tracker="tensorboard")  # these change no number


def test_a_foreign_folder_is_refused(tmp_path, no_model):
    (tmp_path / "thesis.txt").write_text("mine")
    with pytest.raises(ConfigError, match="not empty and not a run folder; choose another run_dir"):
        make_trainer(tmp_path)
    assert contents(tmp_path) == {"thesis.txt": b"mine"}
    for inside in ("thesis.txt", "thesis.txt/run"):
        with pytest.raises(ConfigError, match="is a file"):
            make_trainer(tmp_path / inside)
    (tmp_path / "empty").mkdir()
    make_trainer(tmp_path / "empty")
    assert not list((tmp_path / "empty").iterdir())  # looking leaves no trace


def test_too_little_space_is_refused(tmp_path, monkeypatch, no_model):
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(checkpoints.shutil, "disk_usage", lambda path: usage(10**12, 10**12, 10**6))
    with pytest.raises(ConfigError, match="less than 200 MiB are free for .*; free some space"):
        make_trainer(tmp_path / "deep" / "run")
    assert not (tmp_path / "deep").exists()
