"""The table of runs against their files, and the panels it opens."""

import json
import os
import shutil

import pytest
from helpers import EXAMPLE_RUN, made_up_run

from covrl_lab import RunBrowser, list_runs, load_run


@pytest.fixture
def runs(tmp_path, monkeypatch):
    """Runs here and in a sweep's folder below, one that cannot be read, and one reached by two ways."""
    monkeypatch.chdir(tmp_path)
    made_up_run(tmp_path / "runs" / "first")
    made_up_run(tmp_path / "runs" / "sweep" / "0d1c2b3a", steps=3)
    for name, settings in (("first", {"method": "jlb", "task": "<b>shop</b>", "steps": 2}), ("sweep/0d1c2b3a", {})):
        file = tmp_path / "runs" / name / "config.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | settings), encoding="utf-8")
    evaluations = [{"step": step, "accuracy": value} for step, value in ((0, 0.125), (2, 0.5))]
    bounds = {"accuracy_low": 0.1, "accuracy_high": 0.6, "eval_questions": 8}
    text = "".join(json.dumps(line | bounds) + "\n" for line in evaluations)
    (tmp_path / "runs" / "first" / "evaluations.jsonl").write_text(text)
    (tmp_path / "runs" / "torn").mkdir()
    (tmp_path / "runs" / "torn" / "config.json").write_text("{")
    os.utime(tmp_path / "runs" / "torn" / "config.json", (0, 0))
    return tmp_path / "runs"


def test_the_table_says_what_the_files_say(runs):
    found = list_runs(["runs", str(runs), "nowhere"]).set_index("name")  # the same folder by two names: listed once
    assert sorted(found.index) == ["first", "sweep/0d1c2b3a", "torn"]
    first = found.loc["first"]
    assert (first["method"], first["task"], first["before"], first["accuracy"]) == ("jlb", "<b>shop</b>", 12.5, 50)
    assert "not a run of covrl_lab" in found.loc["sweep/0d1c2b3a", "state"]  # its config.json has no steps
    assert load_run(found.loc["sweep/0d1c2b3a", "id"]).steps == [1, 2, 3]
    assert found.loc["torn", "state"].startswith("cannot be read") and found.index[-1] == "torn"  # the oldest

    browser = RunBrowser()  # ./runs is one of the places where it looks
    assert {line["name"] for line in browser.table.rows} == set(found.index)
    page = browser.static()[0].data
    assert "&lt;b&gt;shop&lt;/b&gt;" in page and "<b>shop" not in page and "12.5" in page
    browser.search.value = "JLB"
    assert [line["name"] for line in browser.table.rows] == ["first"]
    browser.search.value = "nothing like it"
    assert browser.table.note == "no run fits; clear the search"


def test_the_picked_run_opens_in_every_panel(tmp_path):
    run = shutil.copytree(EXAMPLE_RUN, tmp_path / "runs" / "one")
    browser = RunBrowser(tmp_path / "runs")
    browser.table.picked = run.as_posix()
    assert run.name in browser.chosen.value
    (*buttons, bench) = browser.buttons
    for button in buttons:
        button.click()
        assert browser.below.children == (browser.panel.widget,)
        shown = browser.panel.snapshot.run if button.description == "Monitor" else None
        shown = shown or getattr(browser.panel, "run", None) or browser.panel.a.run
        assert shown.path == run
    browser.panel.close()
    bench.click()
    assert browser.panel is None and "holds no checkpoint yet" in browser.below.children[0].value
    (run / "checkpoints" / "step_00002").mkdir(parents=True)
    bench.click()
    assert browser.below.children == (browser.panel.widget,)
    assert (browser.panel.source.value, browser.panel.step.value) == (str(run), 2)


def test_what_a_panel_lacks_is_said_below(runs):
    browser = RunBrowser(runs)
    browser.table.picked = (runs / "sweep" / "0d1c2b3a").as_posix()
    browser.open("Held-out questions")  # none was asked
    assert browser.panel is None and "has no evaluations yet" in browser.below.children[0].value
    empty = RunBrowser(runs / "nowhere")
    assert empty.picked == "" and "no runs in" in empty.table.note and all(b.disabled for b in empty.buttons)


def test_a_file_that_goes_while_the_folder_is_listed_hides_no_run(runs):
    (runs / "first" / "notes.json.123.tmp").symlink_to("nowhere")
    found = list_runs(["runs"])
    assert len(found) == 3 and (found["written"] != "").all()
