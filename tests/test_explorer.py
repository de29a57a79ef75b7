"""The trace explorer without a browser: what it lists, shows and computes."""

import html
import io
import json
import re
import time

import numpy as np
import pandas as pd
import plotly.graph_objects as go
import pytest
from helpers import EXAMPLE_RUN, TINY_RUN, hostile_run, made_up_run
from hostile import HOSTILE

from covrl_lab import MixingRatio, RunConfig, TraceExplorer, load_run
from covrl_lab.runs import folder
from covrl_lab.runs.folder import Run, step_file, write_parquet
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
    assert list(index["length"]) == list(whole["tokens"].map(len))
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
    before = explorer.questions.rows
    explorer.source.value = "posterior"
    assert explorer.questions.rows == before, "means are over all traces of a question, whatever the filters"
    assert set(listed(explorer.rollouts, "source")) == {"posterior"}
    assert explorer.rollouts.note == "2 of the question's 4 traces; filters hide the others"


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


def test_of_many_files_the_first_view_reads_one(tmp_path, monkeypatch):
    run = made_up_run(tmp_path / "run", steps=6)
    whole, read, original = TraceExplorer(run, 4), [], folder.read_table
    monkeypatch.setattr("covrl_lab.runs.folder.CACHE_FROM", 5)
    monkeypatch.setattr(folder, "read_table", lambda file, *rest: read.append(file.stem) or original(file, *rest))
    explorer = TraceExplorer(run, 4)
    assert set(read) == {"step_00004"} and explorer.found.value == "6 steps, 16 in the list"
    for panel in (explorer, whole):
        panel.questions.sort = ["prior", True]
        panel.questions.picked = panel.questions.rows[2]["id"]
    assert set(read) == {"step_00004"} and explorer.questions.rows == whole.questions.rows
    assert [*map(repr, explorer.static())] and explorer.pair().equals(whole.pair())
    explorer.refresh()
    for panel in (explorer, whole):
        panel.step.value = 0
    assert len(set(read)) == 6 and explorer.found.value == whole.found.value == "6 steps, 96 traces"
    assert explorer.questions.rows == whole.questions.rows and explorer.pair().equals(whole.pair())

    step_file(run.path / "traces", 6).write_bytes(b"no table")  # the step to start with: the others are shown
    assert set(TraceExplorer(run).index["step"]) == {1, 2, 3, 4, 5}


@pytest.mark.slow
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
    assert explorer.found.value == "3 steps, 48 traces, 2 in the list"

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
    assert {shape["x0"] for shape in drawn["layout"]["shapes"]} == {3}  # readers count from 1
    assert explorer.lines().data[0].x[:2].tolist() == [1, 2]
    names = ["log p, prior prompt", "log q, posterior prompt", SCALES["log_gap"]["title"]]
    assert [trace["name"] for trace in drawn["data"]] == names
    row = explorer.pair().iloc[1]
    np.testing.assert_allclose(explorer.lines().data[2].y, np.subtract(row["logq"], row["logp"]), atol=1e-6)
    explorer.colour.value = "kl"
    assert explorer.view.colour == "kl"
    drawn = json.loads(explorer.plot.figure)
    assert drawn["data"][2]["name"] == SCALES["kl"]["title"]


def test_probabilities_as_rewards_keep_their_digits(tmp_path):
    explorer = TraceExplorer(made_up_run(tmp_path / "run", reward=0.01234, advantage=-0.001))
    page = explorer.static()[0].data
    assert ">0.0123<" in page and ">0.00<" in page and ">−0.00<" not in page


def test_prior_only_traces_show_what_there_is(tmp_path):
    run = made_up_run(tmp_path / "run", source="prior", logq=None)
    explorer = TraceExplorer(run)
    assert explorer.view.colour == "logp" and len(explorer.view.traces) == 1
    assert set(explorer.view.traces[0]["values"]) == {"logp"}
    assert len(explorer.static()) == 2
    assert explorer.lines().layout.title.text == "The prior trace under the prior prompt"
    assert "both prompts" in TraceExplorer(made_up_run(tmp_path / "both")).lines().layout.title.text
    mixing = MixingRatio(run)
    assert "nothing to mix" in mixing.note.value and np.isnan(mixing.summary["A"]["clipped_share"])
    assert "–" in mixing.html()


def judged_run(folder):
    """A run whose traces carry verdicts: prior traces of q0 and q1 wrong; of q0 a posterior trace is right."""
    run = made_up_run(folder, right=False, prediction="<b>13</b>", posterior_advantage=float("nan"))
    for step in run.steps:
        frame = run.traces(step)
        posterior = frame["source"] == "posterior"
        frame.loc[posterior & (frame["example_id"] == "q0") & (frame["rollout"] == 1), "right"] = True
        frame.loc[frame["example_id"].isin(["q2", "q3"]), "right"] = True
        frame.loc[(frame["example_id"] == "q3") & posterior, "right"] = False
        frame.loc[::3, "finished"] = False
        frame["token_ids"] = [list(range(1 + rollout)) for rollout in frame["rollout"]]
        write_parquet(frame, step_file(run.path / "traces", step))
    return run


def test_verdicts_show_wherever_they_are_stored(tmp_path, example):
    unknown = TraceExplorer(example)
    never = TraceExplorer(made_up_run(tmp_path / "never", right=None, prediction=None))  # no verifier was asked
    for explorer in (unknown, never):
        names = [c["name"] for c in [*explorer.rollouts.columns, *explorer.questions.columns]]
        assert not {"right", "prediction"} & set(names) and "right" not in explorer.show.options
    assert unknown.view.traces[0]["right"] is never.view.traces[0]["right"] is None
    assert "the model's own answer" not in unknown.static()[0].data

    explorer = TraceExplorer(judged_run(tmp_path / "run"), 1)
    assert listed(explorer.questions, "right") == [0.25, 0, 1, 0.5]
    frame = explorer.run.traces(1).query("example_id == 'q0'").set_index("rollout")
    for line in explorer.rollouts.rows:
        assert line["right"] == frame["right"][line["rollout"]] and line["prediction"] == "<b>13</b>"
    explorer.rollouts.picked = "1"
    assert [(t["right"], t["prediction"]) for t in explorer.view.traces] == [(False, "<b>13</b>"), (True, "<b>13</b>")]
    for at, mark in enumerate(("✗ wrong", "✓ right")):
        explorer.view.selected = [at, 0]
        assert explorer.lines().layout.title.text.endswith(mark)
    assert "prior 0 of 2 right · posterior 1 of 2 right" in explorer.heading.value
    page = explorer.static()[0].data
    # Four rollouts and two shown traces, in words for screen readers; the answer is text.
    assert page.count('aria-label="right"') == 2 and page.count('aria-label="wrong"') == 4
    assert "✓" in page and "✗" in page and "&lt;b&gt;13&lt;/b&gt;" in page and "<b>13" not in page


def test_rewards_of_an_older_grpo_run_are_its_verdicts(tmp_path):
    run = made_up_run(tmp_path / "run", source="prior", logq=None, reward=1.0)
    (run.path / "config.json").write_text(json.dumps(run.config | {"method": "grpo"}), encoding="utf-8")
    explorer = TraceExplorer(run)
    assert set(listed(explorer.rollouts, "right")) == {True}
    assert "right" in explorer.show.options and "prior wrong, posterior right" not in explorer.show.options


@pytest.mark.slow
def test_show_leaves_the_traces_it_names(tmp_path):
    run = judged_run(tmp_path / "run")
    explorer = TraceExplorer(run)
    explorer.step.value = 0
    frame = run.traces()
    ratios = [np.exp(row) for row in frame["log_ratio"]]
    assert all((ratio == 1).all() for ratio in ratios)  # alpha = w: nothing can be clipped
    expected = {
        "all traces": frame["step"] > 0,
        "right": frame["right"],
        "wrong": ~frame["right"],
        "prior wrong, posterior right": frame["example_id"] == "q0",
        "finished": frame["finished"],
        "unfinished": ~frame["finished"],
        "starred": frame["step"] < 0,
        "reward > 0": frame["reward"] > 0,
        "reward < 0": frame["reward"] < 0,
        "advantage > 0": frame["advantage"] > 0,
        "advantage < 0": frame["advantage"] < 0,
        "longest tenth": frame["rollout"] >= 14,  # of 16 in each of two steps, one token longer each
        "shortest tenth": frame["rollout"] <= 1,
        "with clipped tokens": frame["step"] < 0,
    }
    assert sorted(explorer.show.options) == sorted(expected)
    for name, rows in expected.items():
        explorer.show.value = name
        found = explorer.filtered()
        assert list(zip(found["step"], found["rollout"], strict=True)) == list(
            zip(frame["step"][rows], frame["rollout"][rows], strict=True)
        ), name
        assert len(explorer.questions.rows) == frame[rows].groupby(["step", "example_id"]).ngroups, name


def test_clipped_traces_are_found_by_their_ratios(tmp_path):
    """PPO: a positive advantage clips above 1.3, a negative one below 0.7; recomputed token by token."""
    run = made_up_run(tmp_path / "run")
    settings = run.config | {"alpha": 0.2, "composite_weight": 0.9, "clip": "ppo", "clip_range": 0.3}
    (run.path / "config.json").write_text(json.dumps(settings), encoding="utf-8")
    explorer = TraceExplorer(run, 2)
    explorer.show.value = "with clipped tokens"
    expected = []
    for row in run.traces(2).itertuples():
        p, q = np.exp(row.logp), np.exp(row.logq)
        ratio = (0.9 * p + 0.1 * q) / (0.2 * p + 0.8 * q)
        if ((ratio > 1.3) if row.advantage > 0 else (ratio < 0.7)).any():
            expected.append(row.rollout)
    assert 0 < len(expected) < 16
    assert list(explorer.filtered()["rollout"]) == expected


def test_what_matches_is_what_is_shown(tmp_path, example):
    explorer = TraceExplorer(example, 1)
    frame = example.traces(1)
    totals = frame["answer_logp"].map(np.sum)
    # A trace that is not the likeliest of its source, of a question that is not the first.
    rest = frame[frame["example_id"] != frame["example_id"].iloc[0]]
    worst = rest.loc[totals[rest.index][rest["source"] == "posterior"].idxmin()]
    explorer.search.value = worst["trace"]
    assert explorer.questions.picked == f"1/{worst['example_id']}"
    assert explorer.pair().loc[worst["rollout"], "trace"] == worst["trace"]
    assert str(worst["rollout"]) in listed(explorer.rollouts, "id")
    assert all(worst["trace"] in text for text in listed(explorer.rollouts, "trace"))


def test_without_a_hit_nothing_stale_is_left(example):
    explorer = TraceExplorer(example, 1)
    assert explorer.plot.figure and explorer.heading.value and explorer.view.traces
    explorer.search.value = "no trace says this"
    assert "no trace fits" in explorer.questions.note
    assert explorer.found.value.endswith(", 0 in the list")
    empty = [explorer.questions.rows, explorer.rollouts.rows, explorer.view.traces, explorer.view.selected]
    assert empty == [[]] * 4 and explorer.plot.figure == explorer.heading.value == ""
    assert explorer.static()[1].data == ()
    explorer.search.value = ""
    assert explorer.questions.picked and explorer.plot.figure and explorer.heading.value and explorer.view.traces
    assert explorer.questions.note == "" and "in the list" in explorer.found.value  # of one step of three


def test_a_click_on_the_lines_selects_the_token(example):
    explorer = TraceExplorer(example, 1)
    explorer.view.selected = [1, 0]
    explorer.plot._handle_custom_msg({"clicked": {"x": 5, "y": -1.0, "curve": 0}}, [])
    assert explorer.view.selected == [1, 4]


def test_colours_fit_what_is_shown(example):
    explorer = TraceExplorer(example, 1)
    assert explorer.view.scales == SCALES
    explorer.fitted.value = True
    values = np.concatenate([t["values"]["log_gap"] for t in explorer.view.traces])
    assert explorer.view.scales["log_gap"]["limit"] == pytest.approx(np.abs(values).max())
    explorer.colour.value = "ratio"
    assert explorer.view.scales["ratio"]["limit"] == SCALES["ratio"]["limit"]  # alpha = w: all 1
    explorer.colour.value = "responsibility"
    values = np.concatenate([t["values"]["responsibility"] for t in explorer.view.traces])
    furthest = np.abs(values - 0.5).max()
    assert explorer.view.scales["responsibility"]["limit"] == pytest.approx(furthest)
    assert explorer.view.scales["responsibility"]["low_text"] == f"{0.5 - furthest:.2g} moves the posterior"
    explorer.fitted.value = False
    assert explorer.view.scales == SCALES


@pytest.mark.slow
def test_prompts_are_those_of_the_run(reference):
    """Against the prompts that the trainer itself makes of the step's questions."""
    run = load_run(reference.run_dir)
    explorer = TraceExplorer(run, 3)
    assert explorer.seen.value == ""
    explorer.prompts.value = True
    examples = {example.id: example for example in reference._questions(2)}
    prompt = reference.prompter(examples[explorer.questions.picked.split("/")[1]])
    decode = reference.prompter.tokenizer.decode
    parts = re.findall(r"<b[^>]*>(.*?)</b> <code[^>]*>(.*?)</code>", explorer.seen.value)
    found = [(name, re.findall(r"<bdi[^>]*>(.*?)</bdi>", text)) for name, text in parts]
    tokens = {n: [html.escape(visible(decode([i]), True)) for i in ids] for n, ids in vars(prompt).items() if ids}
    expected = []
    for trace in explorer.pair().itertuples():
        own = (f"{trace.source} trace, {len(trace.tokens)} tokens", [])
        expected += [(f"prior, {len(prompt.prior)} tokens", tokens["prior"]), own]
        expected += [("seam", tokens["seam"]), ("reference answer", tokens["answer"])]
        expected += [(f"posterior, {len(prompt.posterior)} tokens", tokens["posterior"]), own]
    assert found == expected
    explorer.prompts.value = False
    assert explorer.seen.value == ""


def test_prompts_that_cannot_be_rebuilt_say_so(tmp_path):
    run = made_up_run(tmp_path / "run")
    settings = RunConfig(**TINY_RUN, task=str(tmp_path / "gone.jsonl")).to_dict()
    (run.path / "config.json").write_text(json.dumps(settings), encoding="utf-8")
    explorer = TraceExplorer(run)
    explorer.prompts.value = True
    assert explorer.seen.value.count("<p>") == 1 and "cannot be rebuilt" in explorer.seen.value
    assert "gone.jsonl" in explorer.seen.value
    (tmp_path / "gone.jsonl").write_text('{"question": "1 + 1?", "answer": "2"}\n' * 3)
    explorer.again.click()  # here the file is back
    explorer.questions.picked = explorer.questions.rows[1]["id"]
    assert "cannot be rebuilt" not in explorer.seen.value and "reference answer" in explorer.seen.value


def test_rows_tokens_and_place_can_be_taken_along(example, monkeypatch):
    explorer = TraceExplorer(example, 15, colour="kl")
    sent = []
    monkeypatch.setattr(explorer.take, "send", sent.append)
    explorer.source.value = "posterior"
    explorer.questions.picked = explorer.questions.rows[2]["id"]
    likeliest = explorer.rollouts.marked
    other = next(row["id"] for row in explorer.rollouts.rows if row["id"] not in likeliest)
    explorer.rollouts.picked = other
    for label in explorer.take.labels:
        explorer.take._handle_custom_msg({"wanted": label}, [])
    (name, tokens), (none, line), (csv, rows) = sent
    assert csv.endswith(".csv") and name.endswith(".json") and none == ""
    frame = example.traces(15).query("source == 'posterior'")
    read = pd.read_csv(io.StringIO(rows), dtype={"answer": str})
    assert list(read["rollout"]) == list(frame["rollout"]) and list(read["trace"]) == list(frame["trace"])
    np.testing.assert_allclose(read["total"], frame["answer_logp"].map(np.sum))
    for record, row in zip(json.loads(tokens), explorer.pair().to_dict("records"), strict=True):
        assert record["tokens"] == list(row["tokens"]) and record["rollout"] == row["rollout"]
        assert record["values"]["logq"] == pytest.approx(list(row["logq"]), abs=1e-6)
    again = eval(line, {"TraceExplorer": TraceExplorer})
    assert again.questions.picked == explorer.questions.picked and again.view.colour == "kl"
    assert again.view.traces == explorer.view.traces and again.run.path == example.path
    assert other in again.rollouts.marked and set(again.rollouts.marked) == set(explorer.rollouts.marked) != likeliest
    with pytest.raises(ConfigError, match="no question 'nothing'"):
        TraceExplorer(example, 15, "nothing")
    with pytest.raises(ConfigError, match="no rollout 999 at step 15; it has"):
        TraceExplorer(example, 15, rollouts=[999])


@pytest.mark.parametrize("panel", [TraceExplorer, MixingRatio])
def test_a_run_without_traces_and_an_unknown_step_are_refused(panel, tmp_path, example):
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(ConfigError, match="no traces yet"):
        panel(tmp_path)
    with pytest.raises(ConfigError, match="no traces of step 7"):
        panel(example, 7)


def test_a_table_holds_the_beginning_of_a_long_trace(tmp_path):
    """A whole one was sent with each row; the traces below the table stay whole."""
    explorer = TraceExplorer(made_up_run(tmp_path / "run", length=1000))
    assert {row["trace"] for row in explorer.rollouts.rows} == {"word " * 100 + " …"}
    assert [len(trace["tokens"]) for trace in explorer.view.traces] == [1000, 1000]


@pytest.mark.slow
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


@pytest.mark.slow
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
