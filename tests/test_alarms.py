"""Alarms: each fires on its sign and on no other, and the files of older versions raise none by mistake."""

import json

import pytest

from covrl_lab import load_run
from covrl_lab.runs.alarms import alarms
from covrl_lab.views.html import alarms_html

FINE = [{"finished_share": 1.0, "gradient_norm": 2.0}] * 4
START = {
    "step": 0,
    "accuracy": 0.25,
    "accuracy_low": 0.15,
    "accuracy_high": 0.35,
    "answer_logprob": -10.0,
    "trace_dependence": 6.0,
    "eval_trace_tokens": 25.0,
}


@pytest.mark.parametrize(
    ("steps", "later", "kinds"),
    [
        (FINE, {}, []),
        ([*FINE[:1], *[{"finished_share": 0.2, "gradient_norm": 1.0}] * 3], {}, ["unfinished"]),
        ([*FINE, {"finished_share": 0.2, "gradient_norm": 1.0}], {}, []),  # one bad step is none
        ([{"finished_share": 1.0, "gradient_norm": 0.0}] * 3, {}, ["no gradient"]),
        ([{"finished_share": 1.0, "gradient_norm": 0.0}] * 2, {}, []),  # too early to say
        ([{"finished_share": 0.0, "gradient_norm": 0.0}] * 3, {}, ["unfinished"]),  # nothing to learn from: one reason
        ([{"gradient_norm": 0.0}] * 3, {}, ["no gradient"]),
        (FINE, {"trace_dependence": 2.9}, ["trace dependence"]),
        (FINE, {"trace_dependence": 3.1}, []),
        (FINE, {"eval_trace_tokens": 8.0}, ["trace length"]),
        (FINE, {"answer_logprob": -5.0, "accuracy": 0.1, "accuracy_high": 0.2}, ["reward without accuracy"]),
        (FINE, {"answer_logprob": -5.0, "accuracy": 0.2, "accuracy_high": 0.3}, []),  # within its interval
        (FINE, {"answer_logprob": -5.0, "accuracy": 0.6, "accuracy_high": 0.7}, []),
        (FINE, {"guess_accuracy": 0.16}, ["guessing"]),
        (FINE, {"guess_accuracy": 0.14}, []),  # below the interval of the accuracy
        ([step | {"answer_term_unlikely": 0.61} for step in FINE * 3], {}, ["answer term"]),
        ([step | {"answer_term_unlikely": 0.59} for step in FINE * 3], {}, []),
        ([step | {"answer_term_unlikely": 1.0} for step in FINE * 2], {}, []),  # too early to say
        ([step | {"answer_term_unlikely": None} for step in FINE * 3], {}, []),  # no answer term
    ],
)
def test_each_sign_raises_its_alarm(steps, later, kinds):
    found = alarms(steps, [START, START | later])
    assert list(found) == kinds
    assert all(
        any(word in text for word in ("raise", "use method", "begin with", "lower nll_weight"))
        for text in found.values()
    )


def test_nobody_is_told_to_use_the_method_that_is_used():
    for method in ("covrl", "verifree", "covrl_published"):
        text = alarms(FINE, [START, START | {"eval_trace_tokens": 8.0}], method)["trace length"]
        assert ("method='covrl'" in text) == (method == "covrl_published")


def test_the_first_evaluation_alone_raises_nothing():
    assert alarms(FINE, [START | {"trace_dependence": 0.0}]) == {} == alarms([], [])


def test_a_model_that_guesses_is_told_from_the_first_evaluation_on():
    text = alarms([], [START | {"accuracy": 0.107, "accuracy_low": 0.062, "guess_accuracy": 0.081}])["guessing"]
    assert "10.7%" in text and "8.1%" in text
    never = START | {"accuracy": 0.0, "accuracy_low": 0.0, "guess_accuracy": 0.0}
    assert alarms([], [never]) == {}


def test_traces_that_do_not_end_are_told_before_the_first_step():
    few = START | {"eval_finished_share": 0.1}
    text = alarms([], [few])["unfinished"]
    assert text.startswith("only 10% of the traces end") and "max_trace_tokens" in text and "trace_column" in text
    assert list(alarms(FINE[:2], [few])) == ["unfinished"] and alarms(FINE, [few]) == {}, "steps know better"
    assert alarms([], [START | {"eval_finished_share": 0.5}]) == {} == alarms(FINE[:2], [few, START])


def test_answers_that_the_scorer_cut_are_counted():
    assert alarms([], [START | {"eval_scoring_cut": 3}])["scoring cut"].startswith("3 answers were cut by the scorer")
    assert alarms([], [START | {"eval_scoring_cut": 3}, START | {"eval_scoring_cut": 0}]) == {}


def test_a_model_that_never_used_its_traces_raises_nothing():
    assert alarms(FINE, [START | {"trace_dependence": 0.5}, START | {"trace_dependence": 0.0}]) == {}


def test_files_without_these_columns_raise_nothing():
    old = {"accuracy": 0.3, "accuracy_high": 0.4}
    assert alarms([{"finished_share": 1.0}] * 3, [old, old | {"accuracy": 0.0, "accuracy_high": 0.1}]) == {}


def test_a_run_folder_says_its_alarms_and_views_escape_them(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    lines = [START, START | {"eval_trace_tokens": 3.0}]
    (tmp_path / "evaluations.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    found = load_run(tmp_path).alarms
    assert list(found) == ["trace length"] and "from 25 to 3 tokens" in found["trace length"]
    assert 'data-alarm="trace length"' in alarms_html(found)
    assert "<b>" not in alarms_html({"x": "<b>"}) and alarms_html({}) == ""
