"""Several processes train one run over gloo: the numbers of one process, and no rank waits for one that has ended."""

import dataclasses
import math
import multiprocessing
import os
import shutil
import signal
import subprocess
import sys
import time
from functools import cache, partial
from itertools import cycle
from pathlib import Path

import numpy as np
import pytest
from helpers import (
    CLOCK,
    TRAINED,
    adapter_change,
    assert_one_sentence,
    checkout_environment,
    flags,
    lines,
    make_trainer,
)
from safetensors.numpy import load_file

from covrl_lab import load_run
from covrl_lab.__main__ import main
from covrl_lab.runs.folder import steps_in
from covrl_lab.types import ConfigError, NotFinite

BASE = TRAINED | {"steps": 10, "questions_per_step": 3, "rollouts_per_question": 4, "max_trace_tokens": 8}
BASE |= {"eval_every": 0, "checkpoint_every": 4}
METHODS = "covrl covrl_published jlb verifree latro rlpr ravr_like grpo".split()
JOBS = {name: {"method": name} for name in METHODS}
JOBS["jepo"] = {"method": "jlb", "n_sample": 2}
# Credit that needs all groups, parts smaller than a group, a second update, sets of questions, judged traces.
JOBS["all else"] = {"alpha_rate": 0.5, "max_packed_tokens": 200, "updates_per_step": 2, "judge_traces": True}
JOBS["all else"] |= {"method": "covrl", "eval_task": "arithmetic, last_letters*2"}
ONE = {"run": {"method": "covrl"}}
ENDED = 420  # seconds within which all ranks must have ended, a job; it only ends a test that hangs

pytestmark = pytest.mark.skipif(os.name == "nt", reason="Windows forks no processes")


@cache
def forking():
    """Starts ranks; imports once for all of them, of all tests."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["covrl_lab.train.trainer"])
    return context


def work(folder, jobs, environment, kind="", faulty=0, step=0):
    """What a rank does: it trains the jobs. On one rank something happens in the loss of one step."""
    import torch

    os.environ.update(environment)
    torch.set_num_threads(1)
    for name, settings in jobs.items():
        trainer = make_trainer(Path(folder) / name, BASE, **settings)
        try:
            # A random model is never right; so that grpo has something to learn:
            trainer.task = dataclasses.replace(trainer.setup().task, score=lambda answer, _: float(len(answer) % 2))
            if trainer.ranks.rank == faulty:
                loss = partial(broken, trainer, trainer.method, kind, step)
                trainer.method = dataclasses.replace(trainer.method, loss=loss)
            trainer.run()
        except (ConfigError, ArithmeticError, KeyboardInterrupt) as error:
            said = f"{type(error).__name__}: {error}"
            (Path(folder) / f"said_{trainer.ranks.rank}").write_text(said)
            os._exit(2)
        assert kind or adapter_change(trainer.policy) > 0.1, "it learns"
        weights = torch.cat([p.detach().flatten() for _, p in trainer.policy.trainable()])
        np.save(Path(folder) / f"{name}_{trainer.ranks.rank}.npy", weights.numpy())


def broken(trainer, method, kind, step, *arguments):
    """A loss with a fault in it."""
    if now := trainer.step + 1 == step:
        if kind == "killed":
            os.kill(os.getpid(), signal.SIGKILL)
        if kind == "STOP":
            (trainer.run_dir / "STOP").touch()
        faults = {"error": ZeroDivisionError("of a test"), "interrupted": KeyboardInterrupt("of a test")}
        faults["not finite"] = NotFinite("the probabilities of a test are not finite")
        if kind in faults:
            raise faults[kind]
    loss, parts = method.loss(*arguments)
    return (loss * math.nan if kind == "nan" and now else loss), parts


def train(folder, count, jobs, *fault):
    """Exit statuses of ``count`` ranks that train jobs. This process holds their store, so that no port is guessed."""
    from torch.distributed import TCPStore

    folder.mkdir(parents=True, exist_ok=True)
    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    place = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(store.port), "TORCHELASTIC_USE_AGENT_STORE": "True"}
    place |= {"WORLD_SIZE": str(count)}
    ranks = [
        forking().Process(target=work, args=(str(folder), jobs, place | {"RANK": str(rank)}, *fault), daemon=True)
        for rank in range(count)
    ]
    for process in ranks:
        process.start()
    deadline = time.monotonic() + ENDED * len(jobs)
    for process in ranks:
        process.join(max(0, deadline - time.monotonic()))
    found = [process.exitcode for process in ranks]
    for process in ranks:
        process.kill()
    return found


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """Every job in one process."""
    folder = tmp_path_factory.mktemp("alone")
    assert train(folder, 1, JOBS) == [0]
    return folder


def close(found, expected, place="", rel=1e-3, beside=0.0):
    """Equal but for float32 rounding; ``beside`` is allowed beside it, one number an entry of a column.

    Sums of some hundred terms in another order differ by about 1e-6 of the largest term. A loss that nearly cancels
    shows that 100 times larger. Adam divides a gradient by its own size, so that a weight whose gradient nearly
    cancels moves by up to the learning rate, 5e-3, times that. Seen: 2e-4 of a loss, 1e-5 of a column; in adapters of
    size 0.05 differences of 3e-7 in the mean square, and 3e-5 in single weights.
    """
    if isinstance(expected, float):
        assert found == pytest.approx(expected, rel=rel, abs=1e-5 + beside, nan_ok=True), place
    elif isinstance(expected, (list, tuple, np.ndarray)):
        assert len(found) == len(expected), place
        for one, other, more in zip(found, expected, np.broadcast_to(beside, len(expected)), strict=True):
            close(one, other, place, rel, more)
    else:
        assert found == expected, place


def advantage_rounding(traces):
    """What 1e-6 of the largest reward of a trace's group comes to where it is divided by the group's deviation.

    Rewards of -24 nats that differ by 0.02 have advantages that differ by 1e-4 (method jepo); seen: a fifth of this.
    """
    size = BASE["rollouts_per_question"]
    groups = traces["reward"].to_numpy().reshape(-1, size)
    deviation = groups.std(1)
    return np.repeat(np.where(deviation > 0, 1e-6 * np.abs(groups).max(1) / (deviation + 1e-4), 0.0), size)


def assert_same_numbers(folder, alone, name, count):
    """A run of ``count`` ranks against that of one process; the first rank's weights are every rank's, to the bit."""
    weights = [np.load(folder / f"{name}_{rank}.npy") for rank in range(count)]
    assert all(np.array_equal(weights[0], other) for other in weights[1:])
    difference = np.abs(weights[0] - np.load(alone / f"{name}_0.npy"))
    assert np.sqrt((difference**2).mean()) < 2e-6 and difference.max() < 2e-4, (name, difference.max())
    for file in ("metrics.jsonl", "evaluations.jsonl"):
        records = zip(lines(folder / name / file), lines(alone / name / file), strict=True)
        for found, expected in records:
            for key in expected.keys() - CLOCK:
                close(found[key], expected[key], (file, expected["step"], key))
    run, other = load_run(folder / name), load_run(alone / name)
    tables = [(run.traces(), other.traces())] + [(run.predictions(step), other.predictions(step)) for step in (0, 10)]
    for found, expected in tables:
        assert list(found.columns) == list(expected.columns)
        for column in expected:
            beside = advantage_rounding(expected) if column == "advantage" else 0.0
            close(found[column].tolist(), expected[column].tolist(), (name, column), 1e-4, beside)
    assert steps_in(folder / name / "checkpoints") == [8, 10]


@pytest.mark.parametrize("count", [2, 4])
def test_the_number_of_ranks_changes_nothing(alone, tmp_path, count):
    """With four, one rank has no question of a step, and one none to evaluate."""
    assert train(tmp_path, count, JOBS) == [0] * count
    for name in JOBS:
        assert_same_numbers(tmp_path, alone, name, count)
    moved = [np.load(alone / f"{name}_0.npy") for name in JOBS]
    assert all(not np.allclose(a, b, atol=1e-3) for a, b in zip(moved, moved[1:], strict=False)), "methods differ"


def test_a_killed_rank_ends_all_and_another_number_resumes(alone, tmp_path):
    """Every method and what it carries from step to step; rank 0, which writes, and rank 1 are killed in turn."""
    for victim, name in zip(cycle([0, 1]), JOBS):
        found = train(tmp_path, 2, {name: JOBS[name]}, "killed", victim, 7)
        assert found[victim] == -signal.SIGKILL and found[1 - victim] == 2, name
        said = tmp_path / f"said_{1 - victim}"
        assert said.read_text().endswith("another rank was killed, or did not answer in time; run again, it resumes")
        said.unlink()
        saved = [4] if victim == 0 else [4, 6]  # rank 0 saves what it has
        assert steps_in(tmp_path / name / "checkpoints") == saved, name
    again = shutil.copytree(tmp_path, tmp_path / "again")
    assert train(tmp_path, 3, JOBS) == [0] * 3
    assert train(again, 1, JOBS) == [0]
    for name in JOBS:
        assert_same_numbers(tmp_path, alone, name, 3)
        assert_same_numbers(again, alone, name, 1)


@pytest.mark.parametrize(
    ("kind", "words", "saved"),
    [
        ("error", "rank 1 has ended: ZeroDivisionError('of a test')", [2]),
        ("interrupted", "rank 1 has ended: KeyboardInterrupt('of a test')", [2]),
        ("nan", "of step 3 is not finite, so the run stops before its update", [2]),
        ("not finite", "of a test are not finite after step 2; lower learning_rate", []),  # its weights are not saved
    ],
)
def test_what_ends_one_rank_ends_all_with_its_sentence(tmp_path, kind, words, saved):
    assert train(tmp_path, 2, ONE, kind, 1, 3) == [2, 2]
    said = [(tmp_path / f"said_{rank}").read_text() for rank in (0, 1)]
    assert_one_sentence(said[0])
    assert words in said[0] and said[0].startswith(("ConfigError", "NotFinite"))
    assert kind == "nan" or words.split(": ")[-1].split("(")[0] in said[1]
    assert steps_in(tmp_path / "run" / "checkpoints") == saved
    assert len(lines(tmp_path / "run" / "metrics.jsonl")) == 2


def test_a_file_stop_ends_all_after_the_step(tmp_path):
    assert train(tmp_path, 2, ONE, "STOP", 1, 3) == [0, 0]
    assert steps_in(tmp_path / "run" / "checkpoints") == [3]


def test_a_folder_in_use_is_refused_on_every_rank(tmp_path):
    trainer = make_trainer(tmp_path / "run", BASE, method="covrl")
    trainer.run_dir.mkdir()
    with trainer._owner:
        assert train(tmp_path, 2, ONE) == [2, 2]
    for rank in (0, 1):
        assert f"is being trained by process {os.getpid()}" in (tmp_path / f"said_{rank}").read_text()


def test_accelerate_launch_trains_as_one_process_does(tmp_path):
    """The documented command on two CPU processes, over gloo; two steps, so that Adam's state is shared, too."""
    settings = BASE | {"method": "covrl", "steps": 2}
    launch = ["accelerate.commands.launch", "--multi_gpu", "--num_processes", "2", "--main_process_port", "0"]
    command = [sys.executable, "-m", *launch, "-m", "covrl_lab", "train", *flags(settings | {"run_dir": "two"})]
    done = subprocess.run(
        command, cwd=tmp_path, env=checkout_environment(), capture_output=True, text=True, timeout=ENDED
    )
    assert done.returncode == 0, done.stdout + done.stderr
    trainer = make_trainer(tmp_path / "one", settings).run()
    saved = [tmp_path / name / "checkpoints" / "step_00002" / "adapter_model.safetensors" for name in ("two", "one")]
    found, expected = (np.concatenate([v.ravel() for _, v in sorted(load_file(file).items())]) for file in saved)
    difference = np.abs(found - expected)
    assert np.sqrt((difference**2).mean()) < 2e-6 and difference.max() < 2e-4, difference.max()
    assert adapter_change(trainer.policy) > 0.01
    assert len(lines(tmp_path / "two" / "metrics.jsonl")) == 2


def test_a_launcher_that_starts_one_process_of_several_is_refused(monkeypatch):
    for name, value in {"ACCELERATE_USE_CPU": "True", "MASTER_ADDR": "127.0.0.1"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    with pytest.raises(ConfigError, match="one process only, .* add --multi_gpu"):
        make_trainer("unused", BASE)


def test_only_train_runs_on_several_processes(monkeypatch, capsys):
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(SystemExit):
        main(["report", "unused"])
    assert "only train, without --repair, runs on several processes" in capsys.readouterr().err
