"""The monitor shows what the files hold, while they are written and when they are damaged or missing."""

import json
import os
import re
import shutil
import threading
import time
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from helpers import TINY_RUN, lines, start_training, until

from covrl_lab import RunConfig, load_run
from covrl_lab.files import Owner
from covrl_lab.runs import folder as folders
from covrl_lab.runs.folder import Run
from covrl_lab.views.monitor import (
    RunMonitor,
    numbers_html,
    snapshot,
    sparkline,
    status_html,
    traces_html,
)
from covrl_lab.views.report import report

SMALL = TINY_RUN | {"method": "covrl_published", "eval_every": 0, "steps": 2000}


def shown(page):
    """column -> text, of the cells that show a column's latest value."""
    return dict(re.findall(r'<b data-column="(\w+)">([^<]*)</b>', page))


@pytest.fixture
def folder(tmp_path):
    """A run folder with five of ten steps and an evaluation, written by hand."""
    run = tmp_path / "run"
    run.mkdir()
    RunConfig(model="tiny", steps=10, run_dir=str(run)).save(run / "config.json")
    steps = [
        {"step": k, "reward_prior": -5.0 + k, "reward_posterior": -1.25, "kl": 0.1, "nll": None}
        | {"trace_tokens_prior": 7.0, "finished_share": 0.75, "gradient_norm": 0.5}
        | {"seconds": 4.0 + k, "seconds_sampling": 1.0, "seconds_update": 3.0 + k}
        for k in range(1, 6)
    ]
    (run / "metrics.jsonl").write_text("".join(json.dumps(s) + "\n" for s in steps))
    evaluation = {"step": 0, "accuracy": 0.25, "accuracy_low": 0.125, "accuracy_high": 0.5}
    (run / "evaluations.jsonl").write_text(json.dumps(evaluation) + "\n")
    return run


def age(folder, seconds):
    """Let every file of the folder, and the folders in it, be written ``seconds`` ago."""
    then = time.time() - seconds
    for path in folder.rglob("*"):
        os.utime(path, (then, then))


def test_the_monitor_follows_stops_and_resumes_a_run_of_another_process(tmp_path):
    run = tmp_path / "run"
    monitor = RunMonitor(run, every=0.05)
    assert monitor.snapshot.status == "waiting" and monitor.button.disabled
    process = start_training(SMALL | {"run_dir": run})
    try:
        until(lambda: monitor.snapshot.step >= 5)
        assert monitor.snapshot.status == "running" and monitor.snapshot.steps == 2000

        monitor.button.click()
        assert (run / "STOP").exists() and monitor.snapshot.status in ("stopping", "stopped")
        assert process.wait(300) == 0
        until(lambda: monitor.snapshot.status == "stopped")
        records = lines(run / "metrics.jsonl")
        step = len(records)
        assert 5 <= step < 2000 and (run / f"checkpoints/step_{step:05d}").is_dir()
        assert monitor.snapshot.step == monitor.bar.value == step

        values, last = shown(monitor.numbers.value), records[-1]
        for name in ("reward_prior", "reward_posterior", "kl", "trace_tokens_prior", "gradient_norm"):
            assert values[name] == f"{last[name]:.4g}".replace("-", "−"), name
        assert values["finished_share"] == f"{last['finished_share']:.1%}"
        assert values["truncated_share"] == f"{1 - last['finished_share']:.1%}"
        (evaluation,) = lines(run / "evaluations.jsonl")
        assert shown(monitor.status.value)["accuracy"] == f"{evaluation['accuracy']:.1%}"
        curves = json.loads(monitor.curves.figure)["data"]
        assert any(curve["name"] == "prior" and len(curve["x"]["bdata"]) > 0 for curve in curves)

        monitor.button.click()
        assert not (run / "STOP").exists()
        process = start_training(SMALL | {"run_dir": run})
        until(lambda: monitor.snapshot.step > step)
        other = RunMonitor(run, every=0.05)  # as after a restart of the kernel
        until(lambda: other.snapshot.step > step + 1)
        other.button.click()
        assert process.wait(300) == 0
        after = lines(run / "metrics.jsonl")
        assert after[:step] == records and [r["step"] for r in after] == list(range(1, len(after) + 1))
        other.close()
    finally:
        process.kill()
        monitor.close()
    monitor._thread.join(30)
    assert not monitor._thread.is_alive()


def test_time_left_is_the_median_of_the_last_steps_times_those_to_go(folder):
    shot = snapshot(folder)
    assert shot.status == "running" and (shot.step, shot.steps) == (5, 10)
    assert shot.seconds_left == 7.0 * 5
    assert "about 35 s left, without evaluations" in status_html(shot) and "25.0%" in status_html(shot)
    assert "12.5% to 50.0%" in status_html(shot)
    assert "trace use" not in status_html(shot)  # an older run's evaluations do not hold it
    values = shown(numbers_html(shot))
    assert values["reward_prior"] == "0" and values["truncated_share"] == "25.0%"
    assert "nll" not in values, "a row without a single value"


def test_how_much_the_traces_are_used_is_a_number_and_a_curve(folder):
    told = {"accuracy": 0.25, "accuracy_low": 0.125, "accuracy_high": 0.5}
    uses = [{"step": step, "trace_dependence": use} | told for step, use in ((0, 6.25), (5, 2.5))]
    (folder / "evaluations.jsonl").write_text("".join(json.dumps(line) + "\n" for line in uses))
    monitor = RunMonitor(folder, every=1000)
    assert shown(monitor.status.value)["trace_dependence"] == "2.5"
    assert [6.25, 2.5] in [list(curve.y) for curve in monitor.figure().data]
    monitor.close()


@pytest.mark.parametrize("method, unit", [("grpo", "share"), ("rlpr", "probability"), ("latro", "nats")])
def test_rewards_are_in_the_method_s_unit(folder, method, unit):
    RunConfig(model="tiny", steps=5, method=method, run_dir=str(folder)).save(folder / "config.json")
    monitor = RunMonitor(folder, every=0.01)
    cells = re.search(r'data-column="reward_prior".*?</tr>', monitor.numbers.value)[0]
    assert f">{unit}<" in cells
    titles = {axis.title.text for axis in monitor.figure().select_yaxes()}
    assert unit in titles
    monitor.close()


def test_time_left_counts_the_evaluations_to_come(folder):
    def write(kind, step, second):
        path = folder / kind / f"step_{step:05d}.parquet"
        path.parent.mkdir(exist_ok=True)
        path.touch()
        os.utime(path, (second, second))

    config = json.loads((folder / "config.json").read_text())

    def seconds_left(**changes):
        (folder / "config.json").write_text(json.dumps(config | changes))
        return snapshot(folder).seconds_left

    write("evaluations", 0, 900)  # a model was loaded before it: what it took is not known
    assert seconds_left(eval_every=2) == 7.0 * 5
    for step, second, evaluated in ((2, 1000, 1020), (3, 1030, None), (4, 1040, 1070), (5, 1090, 1080)):
        write("traces", step, second)
        if evaluated:
            write("evaluations", step, evaluated)
    evaluations = {k: sum(s % k == 0 or s == 10 for s in range(6, 11)) for k in (1, 2, 3, 4, 5, 6, 20)}
    assert evaluations == {1: 5, 2: 3, 3: 3, 4: 2, 5: 1, 6: 2, 20: 1}
    for every, count in evaluations.items():
        assert seconds_left(eval_every=every) == 7.0 * 5 + 25.0 * count, every
    assert seconds_left(eval_every=0) == 7.0 * 5 + 25.0
    assert "about 1 min 00 s left, with evaluations" in status_html(snapshot(folder))
    age(folder, 200)
    assert snapshot(folder).status == "stalled", "an evaluation that took no time"
    for kind, second in (("traces", 1000), ("evaluations", 1100)):
        os.utime(folder / kind / "step_00004.parquet", (second, second))
    assert snapshot(folder).status == "running", "it may be within an evaluation"
    assert snapshot(folder, now=time.time() + 150).status == "stalled"


def test_silence_is_a_stall_and_after_a_stop_the_end(folder):
    assert snapshot(folder).status == "running"
    age(folder, 100)
    assert snapshot(folder).status == "running"
    assert snapshot(folder, now=time.time() + 60).status == "stalled"
    assert "2 min 40 s" in snapshot(folder, now=time.time() + 60).message
    (folder / "STOP").touch()
    assert snapshot(folder).status == "stopping"
    assert snapshot(folder, now=time.time() + 60).status == "stopped", "no process is left to answer"


def test_a_stop_is_heard_once_the_step_and_its_checkpoint_are_written(folder):
    age(folder, 10)
    (folder / "STOP").touch()
    os.utime(folder / "STOP", (time.time() - 5,) * 2)
    assert snapshot(folder).status == "stopping"
    (folder / "checkpoints/step_00004").mkdir(parents=True)
    assert snapshot(folder).status == "stopping", "the checkpoint of an earlier step"
    (folder / "checkpoints/step_00005").mkdir()
    assert snapshot(folder).status == "stopped"


def test_a_stop_before_the_first_step_is_heard_after_the_evaluation(folder):
    evaluation = (folder / "evaluations.jsonl").read_text()
    for name in ("metrics.jsonl", "evaluations.jsonl"):
        (folder / name).unlink()
    age(folder, 10)
    (folder / "STOP").touch()
    os.utime(folder / "STOP", (time.time() - 5,) * 2)
    assert snapshot(folder).status == "stopping"
    (folder / "evaluations.jsonl").write_text(evaluation)
    assert snapshot(folder).status == "stopped"
    os.utime(folder / "STOP")
    os.utime(folder / "evaluations.jsonl", (time.time() - 8,) * 2)
    assert snapshot(folder).status == "stopping", "asked during the first step"


def test_a_refresh_reads_each_file_of_lines_once_and_a_run_sees_what_is_new(folder, monkeypatch):
    read, original = [], folders.read_lines
    monkeypatch.setattr(folders, "read_lines", lambda path: read.append(path.name) or original(path))
    assert len(snapshot(folder).alarms) == 0 and sorted(read) == ["evaluations.jsonl", "metrics.jsonl"]
    run, text = load_run(folder), (folder / "metrics.jsonl").read_text()
    assert len(run.metrics) == len(run.forgiving().metrics) == 5
    (folder / "metrics.jsonl").write_text(text + '{"step": 6, "seconds": 1.0}\n')
    assert len(run.metrics) == len(run.forgiving().metrics) == len(run.forgiving().forgiving().metrics) == 6


def test_a_click_that_comes_after_the_run_s_end_leaves_no_order_to_stop(folder):
    monitor = RunMonitor(folder, every=1000)
    assert not monitor.button.disabled
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"steps": 5}))
    monitor.button.click()
    assert monitor.snapshot.status == "finished" and not (folder / "STOP").exists()


def test_a_finished_run_needs_no_thread_and_no_button(folder):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"steps": 5}))
    monitor = RunMonitor(folder, every=0.01)
    monitor._thread.join(30)
    assert monitor.snapshot.status == "finished" and not monitor._thread.is_alive()
    assert monitor.button.disabled and "5 of 5" in monitor.status.value
    page, figure = monitor.static()  # for where no kernel runs
    assert shown(page.data) == shown(monitor.status.value + monitor.numbers.value)
    assert list(next(line for line in figure.data if line.name == "prior").y) == [-4, -3, -2, -1, 0]
    monitor.close()


def test_half_written_and_replaced_files_are_read_again(folder):
    with (folder / "metrics.jsonl").open("a") as file:
        file.write('{"step": 6, "reward_pr')
    monitor = RunMonitor(folder, every=0.02)
    assert monitor.snapshot.step == 5
    text = (folder / "config.json").read_text()
    (folder / "config.json").write_text('{"steps": <b>')  # somebody else's editor
    until(lambda: "reading again" in monitor.status.value)
    assert "<b>" not in monitor.status.value
    (folder / "config.json").write_text(text)
    until(lambda: "running" in monitor.status.value)
    shutil.rmtree(folder)
    until(lambda: monitor.snapshot.status == "waiting")
    monitor.close()


def test_the_file_s_text_is_shown_as_text(folder):
    hostile = "<script>alert(1)</script>\u202e\x1b[31m"
    row = {"step": 5, "example_id": "a", "question": hostile, "answer": "<img onerror=alert(1)>"}
    row |= {"source": "prior", "finished": True, "trace": hostile, "answer_logp": [-1.0], "rollout": 0, "reward": -1.0}
    row |= {"tokens": [hostile], "advantage": 0.0, "answer_weight": 0.0}
    row |= dict.fromkeys(("token_ids", "logp", "logq", "log_ratio"), [0])
    (folder / "traces").mkdir()
    pd.DataFrame([row]).to_parquet(folder / "traces/step_00005.parquet")
    page = traces_html(snapshot(folder))
    assert "Traces of step 5" in page and "&lt;script&gt;" in page and "⟨U+202E⟩" in page
    assert "<script" not in page and "<img" not in page and "\x1b" not in page


def test_how_the_policy_computes_is_one_line_where_the_folder_says_so(folder, monkeypatch):
    monkeypatch.setattr("covrl_lab.views.report.get_plotlyjs", lambda: "")
    (folder / "evaluations.jsonl").unlink()
    pages = (lambda: status_html(snapshot(folder))), (lambda: Path(report(folder)).read_text(encoding="utf-8"))
    assert not any("attention" in page() for page in pages)  # a run of an older version
    known = {"scores": "packed trees", "attention": "<b>FlexAttention"}
    (folder / "policy.json").write_text(json.dumps(known))
    assert all("scores: packed trees; attention: &lt;b&gt;FlexAttention" in page() for page in pages)
    (folder / "policy.json").write_text("[]")
    assert all("policy.json" in page() and "it holds no object" in page() for page in pages)


def test_sparklines_hold_the_values_in_order_and_skip_gaps():
    points = re.search(r'points="([^"]*)"', sparkline([1.0, None, 3.0, 2.0], width=126, height=26)).group(1)
    assert [tuple(map(float, p.split(","))) for p in points.split()] == [(3, 23), (83, 3), (123, 13)]
    assert sparkline([1.0]) == sparkline([]) == "" and "points" in sparkline([2.0, 2.0])


def test_sparklines_of_many_steps_keep_their_peaks_and_the_last_value():
    """130 pixels hold no more: 5,000 points in each of 18 lines were a megabyte a step."""
    values = np.random.default_rng(0).random(5000)
    values[[1234, 2500, -1]] = -7.0, 9.0, 1.0
    points = re.search(r'points="([^"]*)"', sparkline(values)).group(1).split()
    assert 200 < len(points) <= 261 and points == sorted(points, key=lambda p: float(p.split(",")[0]))
    assert f"{3 + 124 * 1234 / 4999:.1f},19.0" in points and f"{3 + 124 * 2500 / 4999:.1f},3.0" in points
    assert points[-1] == "127.0,11.0"  # half way from -7 to 9
    few = re.search(r'points="([^"]*)"', sparkline(values[:520])).group(1).split()
    assert len(few) == 520


def test_threads_end_with_their_widget(folder):
    before = threading.active_count()
    for _ in range(3):
        RunMonitor(folder, every=0.01).close()
    until(lambda: threading.active_count() <= before)


def test_a_living_process_is_neither_stopped_nor_gone(folder):
    """Its last step's checkpoint is there before that step's evaluation, which may take long."""
    with Owner(folder):
        assert snapshot(folder, now=time.time() + 600).status == "stalled"
        message = snapshot(folder, now=time.time() + 600).message
        assert "its process is there" in message and "start it again" not in message
        age(folder, 10)
        (folder / "STOP").touch()
        os.utime(folder / "STOP", (time.time() - 5,) * 2)
        (folder / "checkpoints/step_00005").mkdir(parents=True)
        assert snapshot(folder).status == "stopping"
    assert snapshot(folder).status == "stopped"
    for name in ("metrics.jsonl", "evaluations.jsonl", "checkpoints"):
        path = folder / name
        shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)
    with Owner(folder):
        assert snapshot(folder).message == "asked to stop: it ends after its first evaluation"


def test_a_run_whose_process_has_died_is_not_running(folder):
    held = Owner(folder)
    held.__enter__()
    assert snapshot(folder).status == "running"
    (folder / "STOP").touch()
    assert snapshot(folder).status == "stopping"
    held.__exit__()  # as the system does for a process that dies
    assert snapshot(folder).status == "stopped"
    monitor = RunMonitor(folder, every=0.02)
    monitor.button.click()  # allow it to resume
    assert not (folder / "STOP").exists() and monitor.snapshot.status == "stopped"
    assert "process has ended" in monitor.status.value and "left" not in monitor.status.value
    held.__enter__()
    until(lambda: monitor.snapshot.status == "running")
    held.__exit__()
    monitor.close()


def test_a_killed_training_is_seen_at_once(tmp_path):
    run = tmp_path / "run"
    process = start_training(SMALL | {"run_dir": run})
    try:
        until(lambda: snapshot(run).step >= 2)
        assert snapshot(run).status == "running"
    finally:
        process.kill()
    process.wait(300)
    shot = snapshot(run)
    assert shot.status == "stopped" and f"after step {shot.step} of 2000" in shot.message


def test_a_folder_of_somebody_else_and_a_wrong_path_are_named(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    shot = snapshot("runs/typo")
    assert shot.status == "waiting" and str(tmp_path / "runs" / "typo") in shot.message
    (tmp_path / "config.json").write_text('{"architectures": ["LlamaForCausalLM"]}')
    monitor = RunMonitor(tmp_path, every=0.02)
    assert monitor.snapshot.status == "waiting" and monitor.button.disabled
    assert f"{str(tmp_path)!r} is not a run" in monitor.snapshot.message
    assert len(monitor.static()) == 2
    monitor.close()


def test_a_monitor_waits_where_there_is_no_run_yet(tmp_path):
    monitor = RunMonitor(tmp_path / "run", every=1000)
    assert monitor.snapshot.status == "waiting" and str(tmp_path / "run") in monitor.status.value
    assert monitor.snapshot.alarms == {}
    monitor.close()


def test_a_run_that_ends_while_it_is_read_is_not_called_ended_with_old_numbers(folder, monkeypatch):
    """The lock is looked at first: the last line and the end may come between two reads."""
    held, metrics = Owner(folder), Run.metrics.fget
    held.__enter__()

    def read(run):
        found = metrics(run)
        with (folder / "metrics.jsonl").open("a") as file:
            file.write('{"step": 6, "seconds": 1.0}\n')
        held.__exit__()
        return found

    with monkeypatch.context() as patch:
        patch.setattr(Run, "metrics", property(read))
        shot = snapshot(folder)
    assert (shot.step, shot.status) == (5, "running")
    assert "after step 6 of" in snapshot(folder).message and snapshot(folder).status == "stopped"
