"""The trace explorer without a browser: what it lists, shows and computes."""

import json
import time

import numpy as np
import plotly.graph_objects as go
import pytest
from helpers import EXAMPLE_RUN, HOSTILE, hostile_run, made_up_run

from covrl_lab import MixingRatio, TraceExplorer, load_run
from covrl_lab.runs.folder import Run, step_file
from covrl_lab.types import ConfigError
from covrl_lab.views.explorer import trace_index
from covrl_lab.views.html import visible
from covrl_lab.views.token_view import SCALES, token_html


@pytest.fixture(scope="module")
def example():
    return load_run(EXAMPLE_RUN)


def listed(table, name):
    return [row[name] for row in table.rows]


def test_the_index_agrees_with_the_whole_frames(example):
    index, whole = trace_index(example), example.traces()
    assert len(index) == len(whole) and "logp" not in index
    np.testing.assert_allclose(index["total"], [np.sum(row) for row in whole["answer_logp"]])
    for name in ("step", "rollout", "example_id", "source", "trace"):
        assert list(index[name]) == list(whole[name])


def test_questions_are_searched_filtered_and_sorted(example):
    explorer = TraceExplorer(example, 15)
    frame = example.traces(15)
    assert listed(explorer.questions, "question") == list(frame["question"].unique())
    totals = frame.assign(total=frame["answer_logp"].map(np.sum)).groupby(["example_id", "source"])["total"].mean()
    (picked, *_), first = frame["example_id"], explorer.questions.rows[0]
    assert first["prior"] == pytest.approx(totals[picked, "prior"])
    assert first["posterior"] == pytest.approx(totals[picked, "posterior"])

    explorer.questions.sort = ["posterior", True]
    values = listed(explorer.questions, "posterior")
    assert values == sorted(values, reverse=True) and values != sorted(values)
    word = frame["question"].iloc[-1].split()[2]
    explorer.search.value = word
    texts = frame["question"] + "\n" + frame["answer"] + "\n" + frame["trace"]
    assert set(listed(explorer.questions, "question")) == set(frame["question"][texts.str.contains(word)])
    explorer.search.value = "no trace says this"
    assert explorer.questions.rows == []
    explorer.search.value, explorer.step.value = "", 0
    assert len(explorer.questions.rows) == example.traces().groupby(["step", "example_id"]).ngroups
    explorer.source.value = "posterior"
    assert set(listed(explorer.questions, "prior")) == {None}
    assert set(listed(explorer.rollouts, "source")) == {"posterior"}


def test_a_question_shows_its_rollouts_and_the_likeliest_pair(example):
    explorer = TraceExplorer(example, 1)
    question = explorer.questions.rows[3]["id"]
    explorer.questions.picked = question
    frame = example.traces(1)
    own = frame[frame["example_id"] == question.split("/")[1]]
    assert set(listed(explorer.rollouts, "rollout")) == set(own["rollout"])
    totals = own.assign(total=own["answer_logp"].map(np.sum))
    best = totals.sort_values("total").groupby("source").tail(1)
    assert set(explorer.rollouts.marked) == set(best["rollout"].astype(str))
    assert [t["source"] for t in explorer.view.traces] == ["prior", "posterior"]

    other = next(r for r in own.itertuples() if str(r.rollout) not in explorer.rollouts.marked)
    explorer.rollouts.picked = str(other.rollout)
    side = ["prior", "posterior"].index(other.source)
    assert explorer.view.traces[side]["tokens"] == [visible(t, True) for t in other.tokens]
    assert explorer.view.traces[side]["values"]["logq"] == pytest.approx(list(other.logq), abs=1e-6)
    explorer.rollouts.sort = ["advantage", False]
    assert listed(explorer.rollouts, "advantage") == sorted(own["advantage"])


def test_one_step_is_read_at_a_time(example, monkeypatch):
    read, traces = [], Run.traces
    monkeypatch.setattr(Run, "traces", lambda self, *steps: read.append(steps) or traces(self, *steps))
    explorer = TraceExplorer(example)
    explorer.questions.picked = explorer.questions.rows[1]["id"]
    explorer.search.value = "what"
    assert read == [(30,)]
    explorer.step.value = 15
    explorer.questions.picked = explorer.questions.rows[0]["id"]
    assert read == [(30,), (15,)]


def test_a_growing_run_is_read_again_and_what_is_chosen_stays(tmp_path):
    run = made_up_run(tmp_path / "run", steps=2)
    explorer = TraceExplorer(run)
    explorer.search.value, explorer.source.value = "question 2", "posterior"
    explorer.questions.sort = ["posterior", True]
    explorer.questions.picked = "2/q2"
    explorer.rollouts.picked, explorer.rollouts.sort = explorer.rollouts.rows[-1]["id"], ["reward", False]
    explorer.view.selected = [1, 3]

    def chosen():
        e = explorer
        kept = [e.step.value, e.search.value, e.source.value, e.questions.picked, e.questions.sort]
        return [*kept, e.questions.marked, e.rollouts.rows, e.rollouts.marked, e.view.traces, e.view.selected]

    before, listed_before = chosen(), explorer.questions.rows
    explorer.again.click()
    assert chosen() == before and explorer.questions.rows == listed_before
    made_up_run(tmp_path / "run", steps=4)  # the same random numbers: steps 1 and 2 as they were
    step_file(run.path / "traces", 4).rename(run.path / "traces" / "step_00004.tmp.parquet")
    explorer.again.click()
    assert chosen() == before and explorer.questions.rows == listed_before
    assert [step for _, step in explorer.step.options] == [0, 1, 2, 3]
    assert explorer.found.value == "3 steps, 48 traces"

    explorer.step.value = 0
    frame = run.traces()
    own = frame[(frame["example_id"] == "q2") & (frame["source"] == "posterior")]
    totals = own.assign(total=own["answer_logp"].map(np.sum)).groupby("step")["total"].mean()
    expected = totals.sort_values(ascending=False)
    assert listed(explorer.questions, "id") == [f"{step}/q2" for step in expected.index]
    assert listed(explorer.questions, "posterior") == pytest.approx(list(expected))
    explorer.step.value, explorer.questions.picked = 3, "3/q2"
    assert {row["id"] for row in explorer.rollouts.rows} == set(own["rollout"][own["step"] == 3].astype(str))

    for step in (1, 2, 3):
        step_file(run.path / "traces", step).unlink()
    explorer.again.click()  # begun anew
    assert explorer.questions.rows == [] and explorer.step.value == 0
    made_up_run(tmp_path / "run", steps=1)
    explorer.again.click()
    assert listed(explorer.questions, "id") == ["1/q2"]


def test_the_selected_token_moves_the_lines(example):
    explorer = TraceExplorer(example, 1)
    explorer.view.selected = [1, 2]
    drawn = json.loads(explorer.plot.figure)
    assert {shape["x0"] for shape in drawn["layout"]["shapes"]} == {2}
    names = ["log p, prior prompt", "log q, posterior prompt", SCALES["log_gap"]["title"]]
    assert [trace["name"] for trace in drawn["data"]] == names
    row = explorer.pair().iloc[1]
    np.testing.assert_allclose(drawn["data"][2]["y"], np.subtract(row["logq"], row["logp"]), atol=1e-6)
    explorer.colour.value = "kl"
    assert explorer.view.colour == "kl"
    drawn = json.loads(explorer.plot.figure)
    assert drawn["data"][2]["name"] == SCALES["kl"]["title"]


def test_prior_only_traces_show_what_there_is(tmp_path):
    run = made_up_run(tmp_path / "run", source="prior", logq=None)
    explorer = TraceExplorer(run)
    assert explorer.view.colour == "logp" and len(explorer.view.traces) == 1
    assert set(explorer.view.traces[0]["values"]) == {"logp"}
    assert len(explorer.static()) == 2
    mixing = MixingRatio(run)
    assert "nothing to mix" in mixing.note.value and np.isnan(mixing.summary["A"]["clipped_share"])
    assert "–" in mixing.html()


def test_a_verdict_shows_as_correct(tmp_path, example):
    assert "correct" not in [c["name"] for c in TraceExplorer(example).rollouts.columns]
    explorer = TraceExplorer(made_up_run(tmp_path / "run", verdict=1.0))
    assert set(listed(explorer.rollouts, "correct")) == {True}


@pytest.mark.parametrize("panel", [TraceExplorer, MixingRatio])
def test_a_run_without_traces_and_an_unknown_step_are_refused(panel, tmp_path, example):
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(ConfigError, match="no traces yet"):
        panel(tmp_path)
    with pytest.raises(ConfigError, match="no traces of step 7"):
        panel(example, 7)


def test_many_traces_open_and_filter_quickly(tmp_path, capsys):
    """Printed, not asserted: 10,000 traces of 64 tokens in 157 files."""
    run = made_up_run(tmp_path / "run", steps=157, questions=16, length=64)
    times, started = {}, time.perf_counter()
    explorer = TraceExplorer(run)
    times["open"] = time.perf_counter() - started
    for name, widget, trait, value in (
        ("all steps", explorer.step, "value", 0),
        ("search", explorer.search, "value", "3 of step 12"),
        ("source", explorer.source, "value", "prior"),
        ("no search", explorer.search, "value", ""),
        ("sort", explorer.questions, "sort", ["prior", True]),
    ):
        started = time.perf_counter()
        setattr(widget, trait, value)
        times[name] = time.perf_counter() - started
    with capsys.disabled():
        shown = ", ".join(f"{name} {1000 * seconds:.0f} ms" for name, seconds in times.items())
        print(f"\nexplorer over {len(explorer.index):,} traces: {shown}")
    assert len(explorer.index) == 157 * 64


def test_copies_are_plain_figures_and_html(example):
    for panel in (TraceExplorer(example, 15), MixingRatio(example, 15)):
        page, figure = panel.static()
        assert isinstance(figure, go.Figure) and figure.data
        assert "<script" not in page.data and len(page.data) < 100_000


def test_hostile_text_is_escaped_in_copies_and_made_visible_for_the_widget(tmp_path):
    assert len(HOSTILE) >= 20
    run = hostile_run(tmp_path / "run")
    explorer = TraceExplorer(run)
    page, figure = explorer.static()
    for text in (page.data, token_html(run.traces(1)), explorer.heading.value):
        lowered = text.lower()
        assert not any(tag in lowered for tag in ("<script", "<img", "<svg", "<iframe", "</style", "<a "))
    for text in [*figure.data[0].customdata, *(figure.layout.xaxis2.ticktext or [])]:
        assert "<" not in text.replace("<br>", "") and "$" not in text
    shown = [token for trace in explorer.view.traces for token in trace["tokens"]]
    assert not any(ord(c) < 32 or c in "\u202e\u2066\x00" for token in shown for c in token)
