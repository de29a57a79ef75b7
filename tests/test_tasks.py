"""Tasks: splits, streams, answers, scores and error messages of covrl_lab.train.tasks."""

import json
import re
import subprocess
import sys

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from covrl_lab import RunConfig
from covrl_lab.train.builtin_tasks import TASKS
from covrl_lab.train.tasks import check_task, is_held_out, load_task, normalise_question
from covrl_lab.types import ConfigError, Example

GYM = ["reasoning_gym/chain_sum", "reasoning_gym/leg_counting", "reasoning_gym/gsm_symbolic"]


def recompute(name: str, question: str) -> str:
    """The answer, worked out from the question's text alone."""
    numbers = [int(n) for n in re.findall(r"\d+", question)]
    if name == "last_letters":
        return "".join(word[-1] for word in re.findall(r"'(\w+)'", question))
    if name == "largest_of_three":
        return str(max(numbers))
    if name == "shop":
        signs = [-1 if verb.startswith("sell") else 1 for verb in re.findall(r"\bgets|sells\b", question)]
        if "Tuesday" in question:
            signs *= 2
        return str(numbers[0] + signs[0] * numbers[1] + signs[1] * numbers[2])
    first, *rest = re.findall(r"([+-])?\s*(\d+)", question)
    return str(int(first[1]) + sum(int(n) if sign == "+" else -int(n) for sign, n in rest))


def write_rows(path, count=200, **more):
    rows = [{"question": f"Say {i}?", "answer": str(i), "trace": f"It\nis {i}.", **more} for i in range(count)]
    path.write_text("\n".join(json.dumps(row) for row in rows))
    return str(path)


def questions(examples):
    return [normalise_question(example.question) for example in examples]


@pytest.mark.parametrize("name", TASKS)
@pytest.mark.parametrize("difficulty", [1, 2, 3, 4, 5])
def test_built_in_answers_and_splits(name, difficulty):
    task = load_task(name, difficulty=difficulty, demonstrations=8)
    train = task.train(0, 1000, seed=difficulty)
    held_out = task.held_out(15 if difficulty == 1 else 300)
    for example in train + held_out:
        assert example.answer == recompute(name, example.question), example.question
        assert task.score(example.answer, example) == 1.0
    shown = {normalise_question(d.question) for d in task.demonstrations}
    asked, kept = set(questions(train)), set(questions(held_out))
    assert len(kept) == len(held_out) and len(shown) == 8
    assert not asked & kept and not asked & shown and not kept & shown
    assert all(map(is_held_out, kept)) and not any(map(is_held_out, asked))


@pytest.mark.parametrize("name", TASKS)
def test_demonstrations_are_right_on_one_line_and_fixed(name):
    task = load_task(name)
    assert len(task.demonstrations) == 3
    assert load_task(name, demonstrations=1).demonstrations == task.demonstrations[:1]
    assert load_task(name, demonstrations=0).train(0, 50) == task.train(0, 50)
    for shown in task.demonstrations:
        assert shown.answer == recompute(name, shown.question)
        assert "\n" not in shown.trace and shown.trace.endswith(".")
        for left, right in re.findall(r"([\d +-]+) = (\d+)\.", shown.trace):
            assert recompute("chained_arithmetic", left) == right
    if name == "arithmetic":
        assert {sign for d in task.demonstrations for sign in "+-" if f" {sign} " in d.question} == {"+", "-"}


def test_default_arithmetic_is_ten_to_sixty():
    examples = load_task("arithmetic").train(0, 3000)
    numbers = {int(n) for example in examples for n in re.findall(r"\d+", example.question)}
    assert numbers == set(range(10, 61))
    assert 0.4 < sum("+" in example.question for example in examples) / 3000 < 0.6
    assert min(int(example.answer) for example in examples) >= 0


@pytest.mark.parametrize("name", [*TASKS, *GYM, "FILE"])
def test_train_is_a_pure_function_of_start_count_and_seed(name, tmp_path):
    name = write_rows(tmp_path / "rows.jsonl", 60) if name == "FILE" else name
    whole = load_task(name).train(0, 130, seed=3)
    task = load_task(name)
    backwards = [task.train(start, 13, seed=3) for start in reversed(range(0, 130, 13))]
    assert [example for chunk in reversed(backwards) for example in chunk] == whole
    assert task.train(0, 130, seed=4) != whole
    assert task.held_out(10) == load_task(name).held_out(7) + task.held_out(10)[7:]


@pytest.mark.parametrize("name", GYM)
def test_reasoning_gym_splits_and_scores(name):
    task = load_task(name)
    train, held_out = task.train(0, 300), task.held_out(60)
    assert task.demonstrations == ()
    assert len(set(questions(held_out))) == 60 and not set(questions(train)) & set(questions(held_out))
    for example in train[:20]:
        assert example.metadata and task.score(example.answer + "\n", example) == 1.0
        assert task.score("no idea", example) < 1.0 and task.score("", example) == 0.0


def test_reasoning_gym_is_asked_for_where_it_is_not_installed(monkeypatch):
    monkeypatch.setitem(sys.modules, "reasoning_gym.factory", None)
    with pytest.raises(ConfigError, match=r"'reasoning_gym/n_queens' needs reasoning-gym: pip install reasoning-gym$"):
        load_task("reasoning_gym/n_queens")


def test_reasoning_gym_scorers_never_evaluate_model_text(tmp_path):
    target = tmp_path / "written"
    attack = f"[open({str(target)!r}, 'w')]"
    for name in ("n_queens", "spiral_matrix", "countdown", "polynomial_multiplication"):
        task = load_task(f"reasoning_gym/{name}")
        example = task.train(0, 1)[0]
        assert task.score(attack, example) == 0.0 and task.score(attack[1:-1], example) == 0.0
        assert task.score(example.answer, example) == 1.0
    assert not target.exists()


def test_file_split_permutes_each_epoch_and_drops_duplicates(tmp_path):
    path = write_rows(tmp_path / "rows.jsonl")
    with open(path, "a") as file:
        file.write('\n{"question": " SAY  7? ", "answer": "seven"}\n')
    task = load_task(path, trace_column="trace")
    shown = set(questions(task.demonstrations))
    everything = {f"say {i}?" for i in range(200)}
    kept = {question for question in everything if is_held_out(question)}
    size = 200 - len(kept) - 3
    epochs = [questions(task.train(start, size, seed=1)) for start in (0, size, 2 * size)]
    for epoch in epochs:
        assert len(epoch) == len(set(epoch)) and set(epoch) == everything - kept - shown
    assert epochs[0] != epochs[1] != epochs[2] and len(shown) == 3
    assert set(questions(task.held_out(len(kept)))) == kept
    assert task.demonstrations[0].trace == f"It is {task.demonstrations[0].answer}."
    assert load_task(path).demonstrations == ()
    with pytest.raises(ConfigError, match=f"has {len(kept)} held-out questions .* not 100"):
        task.held_out(100)


def test_all_file_formats_give_the_same_task(tmp_path):
    rows = [{"q": f"What comes after {i:03}?", "a": f"{i + 1:03}"} for i in range(40)]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    (tmp_path / "rows.json").write_text(json.dumps(rows))
    for name, sign in (("rows.csv", ","), ("german/rows.csv", ";"), ("rows.tsv", "\t"), ("tabs/rows.csv", "\t")):
        lines = [f"q{sign}a", *(f"{row['q']}{sign}{row['a']}" for row in rows)]
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("\n".join(lines), encoding="utf-8-sig")
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "rows.parquet")
    streams = []
    for path in tmp_path.rglob("rows.*"):
        task = load_task(str(path), question_column="q", answer_column="a")
        streams.append(task.train(0, 50) + task.held_out(3))
    assert len(streams) == 7 and all(stream == streams[0] for stream in streams)
    assert {len(example.answer) for example in streams[0]} == {3}  # leading zeros survive


def test_hub_data_sets_map_columns_and_explain_failures(monkeypatch):
    rows = [{"problem": f"Twice {i}?", "solution": f"{i} + {i}\n= <{2 * i}>\n#### {2 * i}"} for i in range(50)]
    calls = []

    def load_dataset(path, name, split):
        calls.append((path, name, split))
        if path == "some/data":
            return datasets.Dataset.from_list(rows)
        raise ConnectionError("no route to the hub")

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    columns = {"question_column": "problem", "answer_column": "solution", "trace_column": "solution"}
    task = load_task("hf/some/data", dataset_config="main", **columns)
    assert calls == [("some/data", "main", "train")]
    assert all(int(e.answer) == 2 * int(e.question[6:-1]) for e in task.train(0, 80) + task.held_out(5))
    assert re.fullmatch(r"(\d+) \+ \1 = <\d+>", task.demonstrations[0].trace)
    with pytest.raises(ConfigError, match="did you mean 'problem'"):
        load_task("hf/some/data", question_column="problems", answer_column="solution")
    with pytest.raises(ConfigError, match="'hf/other/data' cannot be loaded .no route to the hub.; check"):
        load_task("hf/other/data")
    check_task(RunConfig(task="hf/other/data"))  # needs no network


@pytest.mark.parametrize(
    ("name", "arguments", "message"),
    [
        ("arithmetics", {}, "unknown task 'arithmetics'; did you mean 'arithmetic'?"),
        ("reasoning_gym/chain_sums", {}, "did you mean 'chain_sum'?"),
        ("reasoning_gym/rush_hour", {}, "no reference answers"),
        ("reasoning_gym/composite", {}, "cannot be used with its default settings"),
        ("hf/gsm8k", {}, "must have the form hf/OWNER/NAME"),
        ("missing.jsonl", {}, "data file 'missing.jsonl' does not exist"),
        ("arithmetic", {"difficulty": 6}, "difficulty must be a whole number from 1 to 5, not 6"),
        ("arithmetic", {"demonstrations": 9}, "demonstrations must be 0 to 8, not 9"),
        ("arithmetic", {"answer_column": "a"}, "columns are for files"),
        ("arithmetic", {"dataset_split": "test"}, "are for hf/ data sets"),
        ("reasoning_gym/chain_sum", {"difficulty": 1}, "difficulty is for built-in tasks"),
    ],
)
def test_wrong_arguments_are_one_sentence(name, arguments, message):
    with pytest.raises(ConfigError) as error:
        load_task(name, **arguments)
    assert message in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("file_name", "text", "arguments", "message"),
    [
        ("a.jsonl", '{"question": "q", "answers": 1}', {}, "not 'answer'; set answer_column to the one that holds it"),
        (
            "a.csv",
            '"a; b, c";d\nq;1\n',
            {},
            "['a; b, c', 'd'] but not 'question'; set question_column to the one that",
        ),
        ("a.jsonl", '{"problem": "q", "x": 1}', {"question_column": "problems"}, "did you mean 'problem'?"),
        (
            "a.jsonl",
            '{"question": [{"content": "q"}], "answer": 1}',
            {},
            "name a place in it, as in question.0.content",
        ),
        ("a.tsv", "question\tanswer\n\ud8ff\t1\n", {}, "mend it; text must be UTF-8"),
        (
            "a.csv",
            "question,answer,t\nq,1,\nr,2, \n",
            {"trace_column": "t"},
            "has a worked example in 't'; fill in a few",
        ),
        ("a.txt", "question,answer\n", {}, "must end in one of .jsonl, .json, .csv, .tsv, .parquet"),
        (
            "a.csv",
            "question,answer\nq,1\n",
            {"trace_column": "trase"},
            "columns ['question', 'answer'] but not",
        ),
        ("a.jsonl", "", {}, "is empty"),
        ("a.csv", "question,answer\n", {}, "is empty"),
        ("a.jsonl", '{"question": "q", "answer": 0}\n{"question": "r", "answer": null}', {}, "row 2 of"),
        ("a.csv", "question,answer\nq,1\n ,2\n", {}, "row 2 of"),
        ("a.jsonl", "not json", {}, "cannot be read"),
        ("a.json", '{"question": "q"}', {}, "must hold a list of objects"),
        ("a.parquet", "not parquet", {}, "cannot be read"),
    ],
)
def test_bad_files_are_explained(tmp_path, file_name, text, arguments, message):
    path = tmp_path / file_name
    path.write_text(text, "utf-8", "surrogatepass")
    with pytest.raises(ConfigError) as error:
        load_task(str(path), **arguments)
    assert message in str(error.value)
    if "column" in message or "did you mean" in message:
        with pytest.raises(ConfigError):
            check_task(RunConfig(task=str(path), **arguments))  # found without reading the whole file


@pytest.mark.parametrize(
    ("cell", "answer"),
    [
        (r"So $x = \boxed{\frac{1}{2}}$.", r"\frac{1}{2}"),
        (r"First \boxed{3}, then \boxed {4}.", "4"),
        ("3 + 4 = 7\n#### 7", "7"),
        (r"Half. #### \boxed{0.5}", "0.5"),
        ("7", "7"),
        ("a box", "a box"),
    ],
)
def test_of_an_answer_with_working_the_end_counts(tmp_path, cell, answer):
    rows = [{"question": f"Number {i}?", "answer": cell} for i in range(9)]
    (tmp_path / "rows.json").write_text(json.dumps(rows))
    task = load_task(str(tmp_path / "rows.json"))
    assert {example.answer for example in task.rows()} == {answer}


def test_tiny_spaces_end_with_a_count():
    with pytest.raises(ConfigError, match=r"has about \d+ different held-out questions, not 500"):
        load_task("arithmetic", difficulty=1).held_out(500)


def test_importing_data_is_light():
    heavy = "{'torch', 'datasets', 'pandas', 'reasoning_gym', 'math_verify'}"
    code = f"import covrl_lab.train.tasks, sys; assert not {heavy} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_empty_prediction_and_examples():
    example = Example("id", "What is 1 + 1?", "2")
    assert load_task("arithmetic").score("", example) == 0.0


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("What is 13 + 58?", "What is 58 + 13?"),
        ("Which number is the largest: 3, 17 or 25?", "Which number is the largest: 25, 3 or 17?"),
        ("Join the last letters of 'sun' and 'map'.", "join the last letters of 'map' and 'sun'."),
    ],
)
def test_mirrored_questions_are_on_the_same_side(one, other):
    assert is_held_out(one) == is_held_out(other)


def test_about_a_fifth_is_held_out():
    """Of 2,000 different sums, within four standard deviations."""
    held = sum(is_held_out(f"What is {a} + {b}?") for a in range(100, 163) for b in range(a, 163))
    assert abs(held / 2016 - 0.2) < 4 * (0.2 * 0.8 / 2016) ** 0.5
