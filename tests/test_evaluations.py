"""Held-out questions through training: every number recomputed from the run folder's files."""

import itertools
import json
import math
import shutil
import time

import numpy as np
import pandas as pd
import pytest
from helpers import EXAMPLE_RUN, HOSTILE

from covrl_lab import EvaluationBrowser, load_run
from covrl_lab.runs.questions import between, by_learning, history
from covrl_lab.runs.stats import mcnemar, paired_interval
from covrl_lab.types import ConfigError
from covrl_lab.views.evaluations import plot_questions

STEPS = (0, 10, 20, 30)


def answers(folder=EXAMPLE_RUN):
    """step -> example_id -> row of the evaluation's file, read with nothing of ours."""
    found = {}
    for path in sorted((folder / "evaluations").iterdir()):
        rows = pd.read_parquet(path).to_dict("records")
        found[int(path.stem.split("_")[1])] = {row["example_id"]: row for row in rows if row["sample"] < 0}
    return found


@pytest.fixture(scope="module")
def browser():
    return EvaluationBrowser(EXAMPLE_RUN)


# --- statistics


@pytest.mark.parametrize(("gained", "lost"), [(0, 0), (1, 0), (3, 3), (7, 1), (2, 9), (12, 0), (5, 8)])
def test_mcnemar_is_the_share_of_coin_tosses_that_part_as_unevenly(gained, lost):
    tosses = itertools.product((0, 1), repeat=gained + lost)
    uneven = [abs(2 * sum(toss) - gained - lost) >= abs(gained - lost) for toss in tosses]
    assert mcnemar(gained, lost) == pytest.approx(np.mean(uneven)) == mcnemar(lost, gained)


def test_the_paired_interval_holds_the_true_change_about_as_often_as_it_says():
    """Over all outcomes of 40 questions, weighed by their probability; and a case worked by hand."""
    count = 40
    for up, down in ((0.3, 0.1), (0.1, 0.1), (0.5, 0.02), (0.05, 0.0)):
        held = 0.0
        for gained in range(count + 1):
            for lost in range(count - gained + 1):
                ways = math.comb(count, gained) * math.comb(count - gained, lost)
                chance = ways * up**gained * down**lost * (1 - up - down) ** (count - gained - lost)
                _, low, high = paired_interval(gained, lost, count)
                held += chance * (low <= up - down <= high)
        assert 0.94 < held <= 1, (up, down)
    # 2/23 - 8/23 = -0.2609, and 1.96 sqrt((10/23 - 0.2609^2) / 23) = 0.2475
    assert paired_interval(1, 7, 21) == pytest.approx((-6 / 21, -0.5084, -0.0134), abs=2e-4)
    change, low, high = paired_interval(0, 0, 5)
    assert change == 0 and low < 0 < high
    with pytest.raises(ValueError, match="no answers"):
        paired_interval(0, 0, 0)


# --- what the files say


def test_questions_stand_in_the_order_in_which_they_were_learned_for_good():
    order = by_learning(history(load_run(EXAMPLE_RUN)))
    found = answers()
    assert sorted(order["example_id"]) == sorted(found[0])
    places = []
    for row in order.itertuples():
        right = [found[step][row.example_id]["score"] == 1 for step in STEPS]
        since = next(k for k in range(5) if all(right[k:]))
        if since == 0:
            assert row.learned == "always right"
        elif since < 4:
            assert row.learned == f"right from step {STEPS[since]}"
        else:
            assert row.learned == ("lost again" if any(right) else "never right")
        places.append((since, -max((k for k in range(4) if right[k]), default=-1)))
    assert places == sorted(places) and len(set(places)) > 5


@pytest.mark.parametrize(("before", "after"), [(0, 30), (10, 20), (20, 10), (30, 30)])
def test_gained_and_lost_are_those_of_the_files(browser, before, after):
    browser.before.value, browser.after.value = before, after
    found = answers()
    pairs = {i: (found[before][i]["score"] == 1, found[after][i]["score"] == 1) for i in found[0]}
    names = {(False, True): "gained", (True, False): "lost", (True, True): "right at both"}
    expected = {i: names.get(pair, "wrong at both") for i, pair in pairs.items()}
    listed = between(browser.history, before, after)
    assert dict(zip(listed["example_id"], listed["outcome"], strict=True)) == expected
    counts = {
        kind: list(expected.values()).count(kind) for kind in ("gained", "lost", "right at both", "wrong at both")
    }
    for kind, count in counts.items():
        assert f'data-outcome="{kind}">{count}<' in browser.change.value
        browser.show.value = kind
        assert {row["id"] for row in browser.questions.rows} == {i for i, own in expected.items() if own == kind}
        for row in browser.questions.rows[:5]:
            assert row["before"] == found[before][row["id"]]["prediction"]
            assert row["after"] == found[after][row["id"]]["prediction"]
    change = 100 * (counts["gained"] - counts["lost"]) / len(expected)
    assert f"<b>{change:+.1f}</b>".replace("-", "−") in browser.change.value
    assert f">{mcnemar(counts['gained'], counts['lost']):.2g}<" in browser.change.value
    browser.before.value, browser.after.value, browser.show.value = 0, 30, "all questions"


def test_the_heat_map_holds_every_score_and_answer(browser):
    figure = plot_questions(browser.history)
    (heat,) = figure.data
    found, order = answers(), list(browser.listed["id"])
    assert heat.x == ("0", "10", "20", "30") and len(heat.y) == len(order) == 200
    for i, example in enumerate(order):
        rows = [found[step][example] for step in STEPS]
        assert list(heat.z[i]) == [row["score"] for row in rows]
        assert heat.y[i] == f"{i + 1}. {rows[0]['question']}<br>reference answer {rows[0]['answer']}"
        for text, row in zip(heat.text[i], rows, strict=True):
            assert text == f"{'✓ right' if row['score'] == 1 else '✗ wrong'}: it said {row['prediction']}"
    labels = dict(label.rsplit(": ", 1) for label in figure.layout.yaxis.ticktext)
    assert labels.items() <= {k: str(v) for k, v in browser.listed["learned"].value_counts().items()}.items()


@pytest.mark.parametrize(("questions", "steps"), [(10, 4), (200, 60), (233, 4), (234, 4), (700, 200)])
def test_cells_of_the_heat_map_are_larger_than_their_gaps(browser, questions, steps):
    """plotly draws nothing else: a map of 700 questions was empty. 300 pixels: half of a narrow notebook."""
    one = browser.history.iloc[:1]
    rows = pd.concat([one.assign(example_id=f"q{i}", step=step) for i in range(questions) for step in (0, 1)])
    rows = pd.concat([rows, *(one.assign(example_id="q0", step=step) for step in range(2, steps))])
    figure = plot_questions(rows)
    (heat,), margin = figure.data, figure.layout.margin
    assert (len(heat.y), len(heat.x)) == (questions, steps)
    assert 1.5 * heat.ygap < (figure.layout.height - margin.t - margin.b) / questions
    assert 1.5 * heat.xgap < 300 / steps
    assert (heat.xgap > 0) == (steps <= 60) and (heat.ygap > 0) == (questions <= 233)


@pytest.mark.slow
def test_a_whole_benchmark_through_thirty_one_evaluations_opens(tmp_path, capsys):
    """Printed, not asserted, in seconds: GSM8K's 1,319 questions. The page holds the text of each once."""
    run, steps = shutil.copytree(EXAMPLE_RUN, tmp_path / "run"), range(31)
    one = pd.read_parquet(run / "evaluations" / "step_00000.parquet").iloc[:1]
    whole = pd.concat([one] * 1319).assign(
        example_id=[f"q{i}" for i in range(1319)], question=[f"question {i}, " + "word " * 40 for i in range(1319)]
    )
    line = json.loads((run / "evaluations.jsonl").read_text().splitlines()[0])
    for step in steps:
        scores = np.random.default_rng(step).random(1319) < 0.3 + 0.01 * step
        whole.assign(score=scores.astype(float)).to_parquet(run / "evaluations" / f"step_{step:05d}.parquet")
    (run / "evaluations.jsonl").write_text("".join(json.dumps(line | {"step": step}) + "\n" for step in steps))
    (run / "config.json").write_text(json.dumps(load_run(EXAMPLE_RUN).config | {"eval_every": 1}))
    started = time.perf_counter()
    browser = EvaluationBrowser(run)
    seconds, size = time.perf_counter() - started, len(browser.plot.figure)
    assert browser.run.damage == {} and browser.plot.figure.count("question 700, ") == 1
    with capsys.disabled():
        print(f"\nquestions: 1,319 of 31 evaluations open in {seconds:.1f} s, a figure of {size / 1e6:.1f} MB")


def test_a_click_or_the_list_opens_the_question_at_every_step(browser):
    found, example = answers(), browser.listed["id"].iloc[70]
    browser.plot._handle_custom_msg({"clicked": {"x": "10", "y": browser.heat_map.data[0].y[70], "curve": 0}}, [])
    assert browser.questions.picked == example and browser.questions.marked == [example]
    page = browser.question.value
    for step in STEPS:
        row, card = found[step][example], page.split(f'data-step="{step}"')[1].split("data-step")[0]
        assert f'covrl-said">{row["prediction"]}</b>' in card and row["trace"].split("\n")[0] in card
        assert ("✓ right" if row["score"] == 1 else "✗ wrong") in card and f"{row['trace_tokens']} tokens" in card
    assert json.loads(browser.plot.figure)["layout"]["shapes"][0]["y0"] == 69.5
    other = browser.questions.rows[3]["id"]
    browser.questions.picked = other
    assert found[0][other]["question"] in browser.question.value


def test_log_probabilities_and_partial_credit_stand_beside_the_answer(tmp_path):
    run = shutil.copytree(EXAMPLE_RUN, tmp_path / "run")
    path = run / "evaluations" / "step_00030.parquet"
    frame = pd.read_parquet(path)
    frame["answer_logp"], frame.loc[0, "score"] = -8.25, 0.5
    more = frame.assign(sample=0, prediction="a sampled answer")  # not greedy: left out
    pd.concat([frame, more]).to_parquet(path)
    browser = EvaluationBrowser(run)
    browser.questions.picked = frame["example_id"][0]
    card = browser.question.value.split('data-step="30"')[1]
    assert "log p(y|x,z) −8.2 nats" in card and "score 0.5" in card and "✗ wrong" in card
    assert "nats" not in browser.question.value.split('data-step="30"')[0]
    assert "a sampled answer" not in str(browser.questions.rows)


def test_a_growing_run_is_read_again_and_steps_without_evaluations_are_refused(tmp_path, browser):
    run = shutil.copytree(EXAMPLE_RUN, tmp_path / "run")
    last = run / "evaluations" / "step_00030.parquet"
    later = last.rename(tmp_path / "later.parquet")
    growing = EvaluationBrowser(run)
    growing.questions.picked = chosen = growing.questions.rows[9]["id"]
    assert growing.after.value == 20 and [value for _, value in growing.before.options] == [0, 10, 20]
    frame = pd.read_parquet(later)
    frame.iloc[1:].to_parquet(last)  # a question that is no longer asked
    missing = frame["example_id"][0]
    growing.refresh()
    growing.after.value = 30
    listed = growing.listed.set_index("id")
    assert listed["outcome"].isna().sum() == 1 and listed.loc[missing, "after"] == ""
    assert "199 questions" in growing.change.value
    growing.after.value = 20
    assert (
        growing.after.value == 20
        and dict(growing.before.options) == {f"step {s}": s for s in STEPS}
        and growing.questions.picked == chosen
    )
    assert 'data-step="30"' in growing.question.value
    with pytest.raises(ConfigError, match="no evaluation of step 7"):
        EvaluationBrowser(run, 7)
    shutil.rmtree(run / "evaluations")
    with pytest.raises(ConfigError, match="no evaluations yet"):
        EvaluationBrowser(run)


def test_a_refresh_follows_an_evaluation_that_went_and_a_file_that_was_restored(tmp_path):
    run = shutil.copytree(EXAMPLE_RUN, tmp_path / "run")
    browser, last = EvaluationBrowser(run), run / "evaluations" / "step_00030.parquet"
    assert browser.after.value == 30
    whole = last.read_bytes()
    last.write_bytes(b"PAR1")
    browser.refresh()
    assert "step_00030.parquet" in browser.change.value and browser.after.value == 20
    last.write_bytes(whole)
    browser.refresh()
    assert "⚠" not in browser.change.value
    browser.after.value = 30
    last.unlink()  # a run that was killed before its checkpoint evaluates that step anew
    browser.refresh()
    assert browser.after.value == 20 and "from step 0" not in browser.question.value
    browser.after.value = 10
    said = answers(run)[10]
    assert browser.listed["after"].tolist() == [said[name]["prediction"] for name in browser.listed["id"]]


@pytest.fixture
def hostile(tmp_path):
    """A run whose questions, answers, traces and predictions are hostile strings."""
    run = shutil.copytree(EXAMPLE_RUN, tmp_path / "hostile")
    for path in (run / "evaluations").iterdir():
        frame = pd.read_parquet(path).head(len(HOSTILE))
        for k, name in enumerate(("question", "answer", "trace", "prediction")):
            frame[name] = HOSTILE[k:] + HOSTILE[:k]
        frame.to_parquet(path)
    return run


@pytest.mark.slow
def test_hostile_text_is_escaped(hostile):
    browser = EvaluationBrowser(hostile)
    for row in browser.questions.rows:
        browser.questions.picked = row["id"]
        figure, page = browser.static()
        for text in (browser.question.value, browser.change.value, page.data):
            assert not any(tag in text.lower() for tag in ("<script", "<img", "<svg", "<iframe", "</style", "<a "))
    for text in [*figure.data[0].text.ravel(), *figure.data[0].y]:
        assert "<" not in text.replace("<br>", "") and "$" not in text
