"""Panels without a browser: what they list, show and compute, on the example run and on made-up ones."""

import json
import time

import numpy as np
import pandas as pd
import plotly.graph_objects as go
import pytest
from hostile import HOSTILE, hostile_run
from test_tokens import EXAMPLE, random_frame

from covrl_lab import load_run
from covrl_lab.runs import reweight as tokens
from covrl_lab.runs.folder import Run, step_file, write_parquet
from covrl_lab.types import ConfigError
from covrl_lab.views import figures, panels
from covrl_lab.views.token_view import SCALES, TokenView, token_html


def made_up_run(folder, steps=2, questions=4, rollouts=4, length=6, **changes):
    """A run folder of random traces, written without the trainer."""
    rng = np.random.default_rng(0)
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps({"model": "tiny", "alpha": 0.5, "composite_weight": 0.5}))
    for step in range(1, steps + 1):
        rows = []
        for i in range(questions * rollouts):
            logp = -rng.exponential(1.0, length)
            rows.append(
                {
                    "step": step,
                    "rollout": i,
                    "example_id": f"q{i // rollouts}",
                    "question": f"question {i // rollouts} of step {step}",
                    "answer": str(i // rollouts),
                    "source": "prior" if i % 2 == 0 else "posterior",
                    "finished": True,
                    "trace": "word " * length,
                    "tokens": ["word "] * length,
                    "token_ids": list(range(length)),
                    "logp": logp.tolist(),
                    "logq": np.minimum(logp + rng.standard_normal(length), 0).tolist(),
                    "log_ratio": [0.0] * length,
                    "answer_logp": (-rng.exponential(1.0, 2)).tolist(),
                    "reward": float(rng.standard_normal()),
                    "advantage": float(rng.standard_normal()),
                    "answer_weight": 0.0,
                }
                | changes
            )
        write_parquet(pd.DataFrame(rows), step_file(folder / "traces", step))
    return load_run(folder)


@pytest.fixture(scope="module")
def example():
    return load_run(EXAMPLE)


def listed(table, name):
    return [row[name] for row in table.rows]


# --- explorer


def test_the_index_agrees_with_the_whole_frames(example):
    index, whole = panels.trace_index(example), example.traces()
    assert len(index) == len(whole) and "logp" not in index
    np.testing.assert_allclose(index["total"], [np.sum(row) for row in whole["answer_logp"]])
    for name in ("step", "rollout", "example_id", "source", "trace"):
        assert list(index[name]) == list(whole[name])


def test_questions_are_searched_filtered_and_sorted(example):
    explorer = panels.TraceExplorer(example, 15)
    frame = example.traces(15)
    assert listed(explorer.questions, "question") == list(frame["question"].unique())
    totals = (
        frame.assign(total=frame["answer_logp"].map(np.sum)).groupby(["example_id", "source"])["total"].mean()
    )
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
    explorer = panels.TraceExplorer(example, 1)
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
    assert explorer.view.traces[side]["tokens"] == [figures.visible(t, True) for t in other.tokens]
    assert explorer.view.traces[side]["values"]["logq"] == pytest.approx(list(other.logq), abs=1e-6)
    explorer.rollouts.sort = ["advantage", False]
    assert listed(explorer.rollouts, "advantage") == sorted(own["advantage"])


def test_one_step_is_read_at_a_time(example, monkeypatch):
    read, traces = [], Run.traces
    monkeypatch.setattr(Run, "traces", lambda self, *steps: read.append(steps) or traces(self, *steps))
    explorer = panels.TraceExplorer(example)
    explorer.questions.picked = explorer.questions.rows[1]["id"]
    explorer.search.value = "what"
    assert read == [(30,)]
    explorer.step.value = 15
    explorer.questions.picked = explorer.questions.rows[0]["id"]
    assert read == [(30,), (15,)]


def test_a_growing_run_is_read_again_and_what_is_chosen_stays(tmp_path):
    run = made_up_run(tmp_path / "run", steps=2)
    explorer = panels.TraceExplorer(run)
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
    explorer = panels.TraceExplorer(example, 1)
    explorer.view.selected = [1, 2]
    drawn = json.loads(explorer.plot.figure)
    assert {shape["x0"] for shape in drawn["layout"]["shapes"]} == {2}
    assert [trace["name"] for trace in drawn["data"]] == ["log p", "log q", SCALES["log_gap"]["title"]]
    row = explorer.pair().iloc[1]
    np.testing.assert_allclose(drawn["data"][2]["y"], np.subtract(row["logq"], row["logp"]), atol=1e-6)
    explorer.colour.value = "kl"
    assert explorer.view.colour == "kl"
    drawn = json.loads(explorer.plot.figure)
    assert drawn["data"][2]["name"] == SCALES["kl"]["title"]


def test_prior_only_traces_show_what_there_is(tmp_path):
    run = made_up_run(tmp_path / "run", source="prior", logq=None)
    explorer = panels.TraceExplorer(run)
    assert explorer.view.colour == "logp" and len(explorer.view.traces) == 1
    assert set(explorer.view.traces[0]["values"]) == {"logp"}
    assert len(explorer.static()) == 2
    mixing = panels.MixingRatio(run)
    assert "nothing to mix" in mixing.note.value and np.isnan(mixing.summary["A"]["clipped_share"])
    assert "–" in mixing.html()


def test_a_verdict_shows_as_correct(tmp_path, example):
    assert "correct" not in [c["name"] for c in panels.TraceExplorer(example).rollouts.columns]
    explorer = panels.TraceExplorer(made_up_run(tmp_path / "run", verdict=1.0))
    assert set(listed(explorer.rollouts, "correct")) == {True}


@pytest.mark.parametrize("panel", [panels.TraceExplorer, panels.MixingRatio])
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
    explorer = panels.TraceExplorer(run)
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


# --- mixing ratio


def test_a_slider_recomputes_its_side(example):
    mixing = panels.MixingRatio(example, 15)
    traces = tokens.Traces.of(example.traces(15))
    before = mixing.summary["A"]
    mixing.sides[1].alpha.value = 0.9
    mixing.sides[1].clip_range.value = 0.1
    mixing.sides[1].clip.value = "soft"
    expected = tokens.summarise(traces, tokens.Settings(0.9, 0.5, "soft", 0.1))
    assert mixing.summary["B"] == pytest.approx(expected)
    assert mixing.summary["A"] is before
    assert f"{100 * expected['clipped_share']:.1f}" in mixing.table.value
    mixing.step.value = 30
    assert mixing.summary["A"]["reward"] == pytest.approx(
        example.metrics.set_index("step")["reward"][30], rel=1e-4
    )


def test_densities_and_pulls_add_up(example):
    traces = tokens.Traces.of(example.traces(15))
    settings = tokens.Settings(0.3, 0.5)
    found = tokens.densities(traces, settings)
    for name in ("log p", "log q", "log h"):
        edges, share = found[name]
        assert len(edges) == len(share) + 1 and share.sum() == pytest.approx(1)
    by_source = [found[f"ratio {source}"][1].sum() for source in ("prior", "posterior")]
    assert sum(by_source) == pytest.approx(1)
    ratio = tokens.quantities(traces, settings)["ratio"]
    edges, share = found["ratio prior"]
    prior = traces.mask & traces.from_prior[:, None]
    counted, _ = np.histogram(np.log(ratio[prior]), edges)
    np.testing.assert_allclose(share / share.sum(), counted / counted.sum(), atol=1e-9)
    pulls, summary = tokens.pulls(traces, settings), tokens.summarise(traces, settings)
    for moved in ("prior", "posterior"):
        total = sum(value for (m, _), value in pulls.items() if m == moved)
        assert total == pytest.approx(summary[f"pull_{moved}"])


def test_a_slider_move_is_quick(capsys):
    """Printed, not asserted: the kernel's side of one move, 64 traces of 256 tokens."""
    frame = random_frame(64, 1)
    rng = np.random.default_rng(0)
    logp = -rng.exponential(2.0, (64, 256))
    frame = frame.assign(logp=list(logp), logq=list(np.minimum(logp + rng.standard_normal((64, 256)), 0)))
    traces, times = tokens.Traces.of(frame), []
    for alpha in np.linspace(0.1, 0.9, 9):
        started = time.perf_counter()
        settings = tokens.Settings(alpha, 0.5)
        values = tokens.quantities(traces, settings)
        tokens.summarise(traces, settings, values)
        parts = tokens.densities(traces, settings, values), tokens.pulls(traces, settings, values)
        figures.mixing({"A": ""}, [parts[0]], [settings.clip_bounds], [parts[1]]).to_json()
        times.append(1000 * (time.perf_counter() - started))
    with capsys.disabled():
        shown = f"median {np.median(times):.0f} ms, most {max(times):.0f} ms"
        print(f"\nslider move, kernel's side, 64 traces of 256 tokens: {shown}")


# --- copies for where no kernel runs


def test_copies_are_plain_figures_and_html(example):
    for panel in (panels.TraceExplorer(example, 15), panels.MixingRatio(example, 15)):
        page, figure = panel.static()
        assert isinstance(figure, go.Figure) and figure.data
        assert "<script" not in page.data and len(page.data) < 100_000


def test_token_html_gives_every_token_its_number(example):
    pair = example.traces(1).iloc[:2]
    page = token_html(pair, tokens.Settings(), "log_gap")
    assert page.count("<span style=") == pair["tokens"].map(len).sum() + 2  # two swatches
    gap = pair["logq"].iloc[0][3] - pair["logp"].iloc[0][3]
    assert f"log q − log p {gap:.3f} nats" in page
    with pytest.raises(ConfigError, match="did you mean 'logp'"):
        token_html(pair, colour="logp_")


def test_clipped_tokens_are_underlined_in_the_copy(example):
    frame = example.traces(1)
    settings = tokens.Settings(0.1, 0.5)
    clipped = np.nansum(tokens.quantities(tokens.Traces.of(frame), settings)["clipped"])
    assert clipped > 0
    assert token_html(frame, settings).count("border-bottom: 2px dashed") == clipped


def test_hostile_text_is_escaped_in_copies_and_made_visible_for_the_widget(tmp_path):
    assert len(HOSTILE) >= 20
    run = hostile_run(tmp_path / "run")
    explorer = panels.TraceExplorer(run)
    page, figure = explorer.static()
    for text in (page.data, token_html(run.traces(1)), explorer.heading.value):
        lowered = text.lower()
        assert not any(tag in lowered for tag in ("<script", "<img", "<svg", "<iframe", "</style", "<a "))
    for text in [*figure.data[0].customdata, *(figure.layout.xaxis2.ticktext or [])]:
        assert "<" not in text.replace("<br>", "") and "$" not in text
    shown = [token for trace in explorer.view.traces for token in trace["tokens"]]
    assert not any(ord(c) < 32 or c in "\u202e\u2066\x00" for token in shown for c in token)


def test_the_view_reports_alternatives_and_refuses_unknown_colours(example):
    pair = example.traces(1).iloc[:1]
    choices = [{"prior": [("\n", -0.1), ("<b>", -2.0)]}] * len(pair["tokens"].iloc[0])
    view = TokenView(pair, alternatives=[choices])
    assert view.traces[0]["alternatives"][0] == {"prior": [["↵", -0.1], ["<b>", -2.0]]}
    with pytest.raises(ConfigError, match="unknown colour"):
        TokenView(pair, colour="red")
