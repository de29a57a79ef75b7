"""Two traces side by side: how their tokens are matched, and the numbers that the panel shows."""

import numpy as np
import pytest
from helpers import made_up_run

from covrl_lab import ConfigError, TraceComparison
from covrl_lab.runs import folder
from covrl_lab.runs.folder import load_run, step_file, write_parquet
from covrl_lab.views.token_view import align


def test_matching_tokens_by_hand():
    """3 + 4 = 7. against 3 + 5 = 8.: four tokens agree, and the differences are antisymmetric."""
    a = {"tokens": ["3", "+", "4", "=", "7", "."], "values": {"logp": [-1.0, -0.5, -2.0, -0.25, -4.0, -0.125]}}
    b = {"tokens": ["3", "+", "5", "=", "8", "."], "values": {"logp": [-0.5, -0.5, -3.0, -1.0, -2.0, None]}}
    assert align(a, b) == 4
    assert a["values"]["difference"] == [-0.5, 0.0, None, 0.75, None, None]
    assert b["values"]["difference"] == [0.5, 0.0, None, -0.75, None, None]
    longer = {"tokens": ["so", "3", "+", "3", "+"], "values": {"logp": [-1.0] * 5}}
    assert align(a, longer) == 2 and longer["values"]["difference"] == [None, 0.0, -0.5, None, None]


@pytest.fixture
def runs(tmp_path):
    """Two runs on the same questions, whose traces share three of their four tokens."""
    first = made_up_run(tmp_path / "first", length=4)
    other = made_up_run(tmp_path / "second", length=4)
    for run, word in ((first, "4"), (other, "<b>5</b>")):
        for step in run.steps:
            frame = run.traces(step)
            frame["tokens"] = [["3", "+", word, "."] for _ in range(len(frame))]
            frame["trace"] = f"3+{word}."
            frame["logp"] = [(np.array(row) * (1 if run is first else 0.5)).tolist() for row in frame["logp"]]
            write_parquet(frame, step_file(run.path / "traces", step))
    return first, other


def test_two_runs_show_what_their_files_say(runs):
    panel = TraceComparison(*runs, step_a=1, step_b=2)
    assert panel.colour.value == panel.view.colour == "difference"
    panel.questions.picked = "q2"
    found = []
    for run, step in zip(runs, (1, 2), strict=True):
        frame = load_run(run.path).traces(step).query("example_id == 'q2' and source == 'prior'")
        totals = frame["answer_logp"].map(sum)
        assert {row["id"]: row["a" if step == 1 else "b"] for row in panel.questions.rows}["q2"] == totals.mean()
        found.append(frame.loc[totals.idxmax()])  # the likeliest is shown first
    moved = sum(found[1]["logp"][t] - found[0]["logp"][t] for t in (0, 1, 3))
    assert panel.agreement == (3, pytest.approx(moved, abs=1e-5))  # rounded to 6 digits a token
    assert [t["title"] for t in panel.view.traces] == ["A: prior trace, step 1", "B: prior trace, step 2"]
    assert panel.view.traces[0]["values"]["difference"][2] is None
    page = panel.static()[0].data
    assert "<b>3</b> tokens in common, of 4 in A and 4 in B" in page and "in this trace only" in page
    assert "&lt;b&gt;5&lt;/b&gt;" in page and "<b>5" not in page
    # Another trace and another source.
    panel.b.source.value = "posterior"
    assert all("posterior" in text for text, _ in panel.b.trace.options)
    panel.b.trace.value = panel.b.trace.options[1][1]
    step, rollout = panel.b.trace.value
    frame = load_run(runs[1].path).traces(step).set_index("rollout")
    assert panel.view.traces[1]["values"]["logp"] == np.round(frame["logp"][rollout], 6).tolist()


def test_one_run_shows_prior_against_posterior(runs):
    panel = TraceComparison(runs[0])
    assert [side.source.value for side in (panel.a, panel.b)] == ["prior", "posterior"]
    assert panel.agreement[0] == 4 and len(panel.listed) == 4


def test_of_many_files_the_first_view_reads_one(tmp_path, monkeypatch):
    run, other = (made_up_run(tmp_path / name, steps=6, question="1 + 1?") for name in ("run", "other"))
    whole, read, original = TraceComparison(run, step_a=6, step_b=6), [], folder.read_table
    monkeypatch.setattr("covrl_lab.runs.folder.CACHE_FROM", 5)
    monkeypatch.setattr(folder, "read_table", lambda file, *rest: read.append(file.stem) or original(file, *rest))
    panel = TraceComparison(run)
    assert set(read) == {"step_00006"} and panel.a.step.value == panel.b.step.value == 6
    assert panel.questions.rows == whole.questions.rows and panel.view.traces == whole.view.traces
    panel.a.step.value = 0
    assert len(set(read)) == 6 and {step for _, (step, _) in panel.a.trace.options} == {1, 2, 3, 4, 5, 6}

    last = step_file(other.path / "traces", 6)
    write_parquet(other.traces(6).assign(example_id="asked here alone"), last)
    panel = TraceComparison(run, other)
    assert panel.a.step.value == panel.b.step.value == 0 and len(panel.questions.rows) == 4
    assert TraceComparison(run, other, question="q2", step_a=1).questions.picked == "q2"


def test_nothing_in_common_is_said(runs, tmp_path):
    with pytest.raises(ConfigError, match="no question in common"):
        TraceComparison(runs[0], made_up_run(tmp_path / "else", example_id="other"))
    with pytest.raises(ConfigError, match="no question 'q9'; choose one of: q0"):
        TraceComparison(*runs, question="q9")
    with pytest.raises(ConfigError, match="no traces of step 7"):
        TraceComparison(*runs, step_a=7)
