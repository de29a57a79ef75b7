"""Scoring in a process of its own: what an answer may cost, and what it may not do."""

import os
import signal
import sys
import threading
import time

import pytest
import reasoning_gym

from covrl_lab import load_task
from covrl_lab.train.answers import match_answer, match_gym
from covrl_lab.train.scorer import MEMORY, Scorer, scorer
from covrl_lab.types import Example

HUGE = ["9**(9)**(9)**(9)", "9**+9**+9**+9", "exp(exp(exp(exp(99))))", "((x+y+z+w)**99)**9"]
EVALUATING = ["simple_integration", "intermediate_integration", "polynomial_multiplication", "puzzle24", "countdown"]


@pytest.fixture(scope="module")
def quick():
    return Scorer(seconds=0.5)


@pytest.mark.parametrize("name", EVALUATING)
@pytest.mark.parametrize("text", HUGE)
def test_an_answer_that_never_ends_is_wrong_and_the_next_one_is_scored(name, text, quick):
    entry = reasoning_gym.create_dataset(name, seed=0, size=1)[0]
    began = time.monotonic()
    assert quick(name, text, entry) < 0.1  # some scorers give a hundredth for trying
    assert quick(name, entry["answer"], entry) == 1.0
    assert time.monotonic() - began < 60  # it hung for good


def test_a_broken_limit_is_counted():
    mine = Scorer(seconds=0.5)
    assert mine("math_verify", "9^{9^{9^{9}}}", {"answer": "x^2+1"}) == 0.0 and mine.cut == 1
    assert mine("math_verify", "1+x^2", {"answer": "x^2+1"}) == 1.0 and mine.cut == 1


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux limits the memory of a process")
def test_an_answer_that_takes_too_much_memory_is_wrong():
    """A list of "A", for which this scorer gives a tenth, that holds some bytes meanwhile; 4 GiB are allowed."""
    mine, entry = Scorer(), {"answer": "A", "metadata": {}, "question": "?"}
    scores = [mine("string_insertion", f"['A' for x in [bytes({n})]]", entry) for n in (2**10, 5 * 2**30, 2**10)]
    assert scores == [0.1, 0.0, 0.1] and MEMORY < 5 * 2**30


def test_a_killed_process_is_replaced():
    mine = Scorer()
    assert mine("math_verify", "1+x^2", {"answer": "x^2+1"}) == 1.0
    os.kill(mine._process.pid, signal.SIGKILL)
    mine._process.wait()
    assert mine("math_verify", "1+x^2", {"answer": "x^2+1"}) == 1.0


@pytest.mark.parametrize("name", ["ab", "countdown", "gsm_symbolic", "rearc", "sudoku", "tsumego"])
def test_scores_are_those_of_the_data_set_itself(name):
    data = reasoning_gym.create_dataset(name, seed=0, size=20)
    for text in (data[3]["answer"], "7", "no idea", data[4]["answer"]):
        try:
            direct = min(1.0, max(0.0, float(data.score_answer(text, data[3]))))
        except Exception:
            direct = 0.0
        assert scorer(name, text, data[3]) == pytest.approx(direct)


def test_timers_of_others_run_on_and_any_thread_may_ask():
    signal.setitimer(signal.ITIMER_REAL, 100)
    try:
        results = []
        threads = [threading.Thread(target=lambda: results.append(match_answer("1+x^2", "x^2+1"))) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(30)
        assert results == [1.0] * 4 and signal.getitimer(signal.ITIMER_REAL)[0] > 0
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)


def test_what_is_evaluated_cannot_touch_the_machine(tmp_path, quick):
    """Below the pattern that keeps code away: these reach eval in the process itself."""
    entry = reasoning_gym.create_dataset("n_queens", seed=0, size=1)[0]
    new, old = tmp_path / "new", tmp_path / "old"
    old.write_text("kept")
    for code in (
        f"open({str(new)!r}, 'w')",
        f"__import__('os').remove({str(old)!r})",
        f"__import__('os').system('touch {new}')",
        f"__import__('shutil').rmtree({str(tmp_path)!r})",
        f"__import__('subprocess').run(['touch', {str(new)!r}])",
        "__import__('socket').create_connection(('127.0.0.1', 9))",
        "__import__('os').kill(__import__('os').getppid(), 9)",
        "__import__('ctypes').CDLL(None).abort()",
    ):
        assert quick("string_insertion", f"[{code}]", {"answer": "A", "metadata": {}, "question": "?"}) < 1.0
        assert quick("n_queens", f"[{code}]", entry) < 1.0
    assert not new.exists() and old.read_text() == "kept"


def test_no_secret_reaches_the_process(monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "secret")
    mine = Scorer()
    mine("math_verify", "1", {"answer": "1"})
    environment = f"/proc/{mine._process.pid}/environ"
    if not os.path.exists(environment):
        pytest.skip("needs /proc")
    with open(environment, "rb") as file:
        assert b"secret" not in file.read()


def test_a_task_scores_through_it():
    task = load_task("reasoning_gym/countdown")
    example = task.train(0, 1)[0]
    assert task.score(example.answer, example) == 1.0 and task.score("9**9**9**9", example) < 0.1


ANSWERS = [
    *HUGE,
    "9" * 5000,
    "1e999999999",
    "9^{9^{9^{9}}}",
    "2**2**2**2**2**2",
    "factorial(10**9)",
    "(" * 5000 + "1" + ")" * 5000,
    "[" * 5000,
    "{" * 500 + "}" * 500,
    "[0]*10**10",
    "'a'*10**10",
    "range(10**12)",
    "__import__('os').system('touch pwned')",
    "().__class__.__base__.__subclasses__()",
    "open('pwned', 'w')",
    "exec('1')",
    "lambda: 0",
    "[x for x in iter(int, 1)]",
    "while True: pass",
    "import os",
    "nan",
    "inf",
    "-inf",
    "1/0",
    "0/0",
    "\\frac{1}{0}",
    "\\frac{\\frac{\\frac{1}{2}}{3}}{4}",
    "\\sum_{n=1}^{\\infty} n^{n^n}",
    "\\int_0^{10^{10^{10}}} x dx",
    "\\input{/etc/passwd}",
    "sqrt(sqrt(sqrt(-1)))**sqrt(-1)**9999",
    "x" * 100_000,
    "\u0660\u0661\u0662",
    "\x00",
    "\ud800",
    "\u202e12\u202c",
    "1\n2\n3",
    '{"a": 1}',
    '[["\\ud83d"]]',
    "<script>alert(1)</script>",
    "%s%n",
    " " * 10_000,
    "a,b,c," * 5000,
    "((x+y+z+w)**99)**9 + C",
]


@pytest.mark.slow
@pytest.mark.parametrize("name", ["match_answer", *sorted(reasoning_gym.factory.DATASETS.keys() - {"composite"})])
def test_a_hostile_answer_is_a_score_and_no_more(name, tmp_path, monkeypatch):
    """Through the pattern that keeps code away and through the process, as training does it."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(scorer, "seconds", 0.5)
    if name == "match_answer":
        scores = [match_answer(text, reference) for text in ANSWERS for reference in ("x^2+1", "12", "{1, 2}", "word")]
    else:
        entry = reasoning_gym.create_dataset(name, seed=0, size=1)[0]
        example = Example("a", entry["question"] or "?", str(entry["answer"]) or "?", entry["metadata"])
        scores = [match_gym(name, text, example) for text in ANSWERS]
    assert len(ANSWERS) >= 40 and all(0 <= score <= 1 for score in scores)
    assert not list(tmp_path.iterdir())
