"""Run folders read into frames: many files in one pass, and what is kept of them."""

import time

import numpy as np
import pandas as pd
import pyarrow.parquet as pq
import pytest
from helpers import EXAMPLE_RUN, made_up_run

from covrl_lab import TraceExplorer, load_run
from covrl_lab.runs import folder as folders
from covrl_lab.runs.folder import CACHE, Run, step_file

LIGHT = ["step", "rollout", "question", "answer_logp", "logq", "reward"]


def one_by_one(run):
    """Every step's file read by pandas alone."""
    return pd.concat([pd.read_parquet(step_file(run.path / "traces", s)) for s in run.steps], ignore_index=True)


@pytest.fixture
def run(tmp_path):
    """Four steps; those of the second have no log q, the third lacks a column and the fourth has one more."""
    run = made_up_run(tmp_path / "run", steps=4)
    for step, change in ((2, {"logq": None}), (3, None), (4, {"verdict": 1.0})):
        path = step_file(run.path / "traces", step)
        frame = pd.read_parquet(path)
        frame = frame.drop(columns="reward") if change is None else frame.assign(**change)
        frame.to_parquet(path)
    return run


def test_traces_are_those_of_every_file(run):
    pd.testing.assert_frame_equal(load_run(EXAMPLE_RUN).traces(), one_by_one(load_run(EXAMPLE_RUN)))
    found, expected = run.traces(), one_by_one(run)
    assert list(found) == list(expected) and len(found) == 64
    for name in found:
        missing = expected[name].isna()
        assert (found[name].isna() == missing).all(), name
        assert [*map(str, found[name][~missing])] == [*map(str, expected[name][~missing])], name
    assert list(run.traces(3, 1)["step"].unique()) == [3, 1]


@pytest.mark.parametrize("least", [2, 500])
def test_some_columns_are_those_of_the_whole_frames(run, least, monkeypatch):
    monkeypatch.setattr(folders, "CACHE_FROM", least)
    whole = one_by_one(run)
    for columns in (LIGHT, LIGHT, ["step", "verdict"], LIGHT):  # the second time from what was kept
        found = run.trace_columns(columns)
        assert list(found) == columns
        for name in columns:
            assert [*map(str, found[name].fillna("–"))] == [*map(str, whole[name].fillna("–"))], name
        assert (run.path / CACHE).exists() == (least == 2)
    assert list(run.trace_columns(["nothing"])) == ["nothing"]


def test_only_what_has_changed_is_read_again(tmp_path, monkeypatch):
    monkeypatch.setattr(folders, "CACHE_FROM", 2)
    read, original = [], folders.read_table

    def read_table(file, *rest):
        read.extend([int(file.stem[5:])] if file.name != CACHE else [])
        return original(file, *rest)

    monkeypatch.setattr(folders, "read_table", read_table)
    run = made_up_run(tmp_path / "run", steps=3)

    def steps_read():
        read.clear()
        found = run.trace_columns(LIGHT)
        pd.testing.assert_frame_equal(found, one_by_one(run)[LIGHT])
        return sorted(read)

    assert steps_read() == [1, 2, 3] and steps_read() == []
    made_up_run(tmp_path / "other", steps=5)
    for step in (4, 5):
        step_file(tmp_path / "other" / "traces", step).rename(step_file(run.path / "traces", step))
    assert steps_read() == [4, 5] and steps_read() == []
    path = step_file(run.path / "traces", 2)
    pd.read_parquet(path).assign(reward=7.0).to_parquet(path)  # a second attempt at a step
    assert steps_read() == [1, 2, 3, 4, 5] and steps_read() == []
    step_file(run.path / "traces", 5).unlink()
    assert steps_read() == [1, 2, 3, 4]
    for content in (b"", b"PAR1 no more", pd.DataFrame({"a": [1]}).to_parquet()):
        (run.path / CACHE).write_bytes(content)
        assert steps_read() == [1, 2, 3, 4]

    def full(*_):
        raise OSError("read-only file system")

    (run.path / CACHE).unlink()
    monkeypatch.setattr(folders, "write_whole", full)
    assert steps_read() == steps_read() == [1, 2, 3, 4]


def test_a_run_without_traces_has_columns(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    assert list(Run(tmp_path).trace_columns(LIGHT)) == LIGHT and Run(tmp_path).traces().empty


@pytest.mark.slow
def test_a_hundred_thousand_traces_open(tmp_path, capsys):
    """Printed, not asserted, in seconds of one core: 100,000 traces of 64 tokens in 6,250 files."""
    run = made_up_run(tmp_path / "run", steps=1, length=64)
    table = pq.read_table(step_file(run.path / "traces", 1))
    place, rows = table.schema.get_field_index("step"), np.ones(table.num_rows, int)
    for step in range(2, 6251):
        pq.write_table(table.set_column(place, "step", [step * rows]), step_file(run.path / "traces", step))
    resource, opened, times, peaks = pytest.importorskip("resource"), [], {}, {}
    for name, use in (
        ("explorer, first", lambda: opened.append(TraceExplorer(run))),
        ("all its steps, first", lambda: opened[0].step.set_trait("value", 0)),
        ("explorer, again", lambda: opened.append(TraceExplorer(run))),
        ("all its steps, again", lambda: opened[1].step.set_trait("value", 0)),
        ("traces()", run.traces),
    ):
        started = time.process_time()
        found = use()
        times[name] = time.process_time() - started
        peaks[name] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    with capsys.disabled():
        measured = (f"{name} {seconds:.1f} s (peak {peaks[name]:.2f} GiB)" for name, seconds in times.items())
        print("\n100,000 traces: " + ", ".join(measured))
    assert len(found) == 100_000 and found["step"].nunique() == 6250
    assert [len(explorer.index) for explorer in opened] == [100_000, 100_000]
