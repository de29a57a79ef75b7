"""Presets: every loader on a small file of its schema (invented content), answers right, wrong and tricky."""

import dataclasses
import json
import logging

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from helpers import ROOT, lines, make_trainer

from covrl_lab import RunConfig
from covrl_lab.train.answers import match_benchmark, vote
from covrl_lab.train.models import load_tokenizer
from covrl_lab.train.opening import open_task
from covrl_lab.train.presets import CHATS, PRESETS
from covrl_lab.train.prompts import Prompter
from covrl_lab.train.rows import lookup
from covrl_lab.train.tasks import check_task, is_held_out, load_task
from covrl_lab.types import ConfigError, Example

WEB = {"id": "7", "answer_type": "Float", "difficulty": "University"}
LETTER = "Answer with the letter of the right option."
GPQA = {
    "Question": "Which box is red?\n",
    "Correct Answer": "the left one\n",
    "Incorrect Answer 1": "the right one",
    "Incorrect Answer 2": "both",
    "Incorrect Answer 3": "none",
    "Record ID": "rec0",
}
MMLU = {"question_id": 3, "answer_index": 1, "cot_content": "", "category": "math", "src": "made up"}
RLPR = {"ability": "Physics", "data_source": "made up", "extra_info": {"answer_type": "Float"}}
# preset -> rows in its schema, and what they must become: (question, answer) of each row that is kept. The rows whose
# number is in the third place are bad.
WEBINSTRUCT = [
    {"question": "What is the tax on 5 coins at 20%?", "answer": "1 coin", "category": "Business", **WEB},
    {"question": "What is 2 to the 5?", "answer": "32", "category": "Mathematics", **WEB},
    {"question": "What is lost?", "answer": " ", "category": "Mathematics", **WEB},
]
PLAIN = [(row["question"], row["answer"]) for row in WEBINSTRUCT]
SCHEMAS = {
    "webinstruct": (WEBINSTRUCT, PLAIN[:2], [3]),
    "webinstruct-math": (WEBINSTRUCT, PLAIN[1:2], [3]),
    "webinstruct-nonmath": (WEBINSTRUCT, PLAIN[:1], []),
    "deepmath-103k": (
        [{"question": "Sum it: $1+2$", "final_answer": "3", "difficulty": 5.0, "topic": "x", "r1_solution_1": "..."}],
        [("Sum it: $1+2$", "3")],
        [],
    ),
    "rlpr-train": (
        [
            {
                "prompt": [{"role": "system", "content": "Think."}, {"role": "user", "content": "How warm is it?"}],
                "reward_model": {"ground_truth": "20 K", "style": "rule"},
                **RLPR,
            },
            {"prompt": [], "reward_model": {"ground_truth": "20 K", "style": "rule"}, **RLPR},
        ],
        [("How warm is it?", "20 K")],
        [2],
    ),
    "gsm8k-train": (
        [{"question": "Ann has 2 pens and buys 3.", "answer": "2 + 3 = <<2+3=5>>5\n#### 5"}],
        [("Ann has 2 pens and buys 3.", "5")],
        [],
    ),
    "gsm8k": (
        [{"question": "Ben has 1,000 pens and sells 1.", "answer": "1,000 - 1\n#### 999"}],
        [("Ben has 1,000 pens and sells 1.", "999")],
        [],
    ),
    "gpqa-diamond": ([GPQA, GPQA | {"Question": "Which?", "Incorrect Answer 2": None}], None, [2]),
    "mmlu-pro": (
        [
            {"question": "Which is even?", "options": ["3", "4", "5"], "answer": "B", **MMLU},
            {"question": "Which is odd?", "options": ["3", "4"], "answer": "J", **MMLU},
            {"question": "Which is even?", "options": ["7", "8"], "answer": "B", **MMLU},
        ],
        [
            (f"Which is even?\n(A) 3\n(B) 4\n(C) 5\n{LETTER}", "B"),
            (f"Which is even?\n(A) 7\n(B) 8\n{LETTER}", "B"),
        ],
        [2],
    ),
    "theoremqa": (
        [
            {"Question": "Is 7 prime?", "Answer": "True", "Answer_type": "bool", "Picture": None},
            {"Question": "What is drawn?", "Answer": "3", "Answer_type": "integer", "Picture": {"bytes": "..."}},
            {"Question": "Both roots?", "Answer": "[1, 2]", "Answer_type": "list of integer", "Picture": None},
        ],
        [("Is 7 prime? (True or False)", "True"), ("Both roots?", "[1, 2]")],
        [],
    ),
    "math-500": (
        [
            {"problem": "Halve $1$.", "solution": r"It is \boxed{\frac12}.", "answer": r"\frac{1}{2}", "level": 1},
        ],
        [("Halve $1$.", r"\frac{1}{2}")],
        [],
    ),
    "minerva-math": (
        [{"question": "How heavy is a star?", "answer": "2.0e30"}],
        [("How heavy is a star?", "2.0e30")],
        [],
    ),
    "sat-math": (
        [
            {
                "query": "Q: If $x=2$, what is $2x$? Answer Choices: (A)2 (B)4 (C)6 (D)8\n"
                "A: Among A through D, the answer is",
                "choices": ["(A)2", "(B)4", "(C)6", "(D)8"],
                "gold": [1],
            }
        ],
        [(f"If $x=2$, what is $2x$?\n(A) 2\n(B) 4\n(C) 6\n(D) 8\n{LETTER}", "B")],
        [],
    ),
    "carp-en": (
        [{"content": "Solve $x + 4 = 0$.", "answer": "x = - 4", "steps": "Take 4 away.", "edges": {"directed": True}}],
        [("Solve $x + 4 = 0$.", "x = - 4")],
        [],
    ),
    "aime-24": (
        [{"id": 60, "problem": "Count them.", "solution": "...", "answer": "033", "url": "", "year": "2024"}],
        [("Count them.", "033")],
        [],
    ),
}


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def test_every_preset_has_a_schema_here():
    assert set(SCHEMAS) == set(PRESETS)
    for name, preset in PRESETS.items():
        assert preset.licence and preset.note, name
        assert preset.revision or "not verified" in preset.note or "http" in preset.source or name == "math-500", name


def test_contributing_names_the_presets():
    text = (ROOT / "CONTRIBUTING.md").read_text("utf-8")
    for name, preset in PRESETS.items():
        (line,) = [line for line in text.splitlines() if line.startswith(f"| `{name}` |")]
        assert line.endswith(f"| {preset.licence} |")
        assert f"| {(preset.revision or 'newest: not verified')[:7]}" in line or "http" in preset.source, name


@pytest.mark.parametrize("name", SCHEMAS)
@pytest.mark.parametrize("suffix", [".jsonl", ".json", ".parquet", "hub"])
def test_a_loader_reads_its_schema(name, suffix, tmp_path, monkeypatch):
    rows, expected, bad = SCHEMAS[name]
    preset, task_name = PRESETS[name], f"{name}@{tmp_path / 'rows'}{suffix}"
    if suffix == "hub":
        task_name, calls = name, []

        def load_dataset(*where, **how):
            calls.append((where, how))
            return datasets.Dataset.from_list(rows)

        monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    elif suffix == ".parquet":
        pq.write_table(pa.Table.from_pylist(rows), tmp_path / "rows.parquet")
    elif suffix == ".json":
        (tmp_path / "rows.json").write_text(json.dumps(rows))
    else:
        write(tmp_path / "rows.jsonl", rows)
    check_task(RunConfig(task=task_name, demonstrations=0))
    task = load_task(task_name, demonstrations=0)
    if suffix == "hub":
        (where, how) = calls[0]
        assert how["split"] == (preset.split or "train") and how.get("revision") == preset.revision
        online = where[0] == "json" and how["data_files"] == preset.source
        assert where == (preset.source, preset.config) or online
    found = {example.metadata["row"]: (example.question, example.answer) for example in task.whole(None)}
    if expected is not None:
        assert [found[row] for row in sorted(found)] == expected
    assert sorted(task.bad_rows) == bad
    prompter = Prompter(load_tokenizer("tiny"), style="chat")
    for example in task.whole(None):
        assert example.question in prompter.tokenizer.decode(prompter(example).prior)
        assert example.id.startswith(f"{name}:")
        assert task.score(example.answer, example) == 1.0 and task.score("nothing of it", example) == 0.0


@pytest.mark.parametrize("style", ["chat", "few_shot"])
def test_the_prompts_of_a_row_of_every_preset(style, tmp_path):
    """The posterior prompt is the prior's and one sentence that gives the answer; ``pytest -s`` prints both."""
    prompter, frames = Prompter(load_tokenizer("tiny"), style=style), set()
    for name, (rows, _, _) in SCHEMAS.items():
        task = load_task(f"{name}@{write(tmp_path / 'rows.jsonl', rows)}", demonstrations=0)
        example = task.whole(None)[0]
        prompt = prompter(example)
        prior, posterior = map(prompter.tokenizer.decode, (prompt.prior, prompt.posterior))
        print(f"--- {name}, {style}, prior\n{prior}\n--- {name}, {style}, posterior\n{posterior}\n")
        before, given, after = posterior.partition(f"The answer is {example.answer}.")
        more = " I now write the reasoning that leads to it.\n" if style == "chat" else "\n"
        assert given and after.startswith(more) and before + after.removeprefix(more) == prior, name
        asked = example.question if style == "chat" else example.question.replace("\n", " ")
        assert prior.count(asked) == 1, name
        frames.add(prior.replace(asked, ""))
        options = example.metadata.get("options", [])
        assert bool(options) == bool(PRESETS[name].choices), name
        listed = [f"({letter}) {option}" for letter, option in zip("ABCDEFGHIJ", options, strict=False)]
        assert not options or asked.split(listed[0])[1].split() == " ".join([*listed[1:], LETTER]).split(), name
    assert len(frames) == 1  # around the question the same text in every prior prompt: none holds an answer


def test_options_are_shuffled_by_the_question_alone(tmp_path):
    rows = [GPQA | {"Question": f"Which box is number {i}?"} for i in range(40)]
    path = write(tmp_path / "rows.jsonl", rows)
    task = load_task(f"gpqa-diamond@{path}")
    letters = set()
    for example in task.whole(None):
        options = example.metadata["options"]
        assert sorted(options) == ["both", "none", "the left one", "the right one"]
        assert options["ABCD".index(example.answer)] == "the left one"
        assert f"({example.answer}) the left one" in example.question and LETTER in example.question
        letters.add(example.answer)
    assert letters == set("ABCD")
    write(path, rows[::-1])
    assert {e.id for e in load_task(f"gpqa-diamond@{path}").whole(None)} == {e.id for e in task.whole(None)}


def test_only_letters_of_all_options_are_taken_off(tmp_path):
    rows = [{"question": "Which?", "options": ["(B) or (C)", "4"], "answer": "B", **MMLU}]
    rows.append({"question": "And now?", "options": ["A) 3", "B) 4"], "answer": "B", **MMLU})
    task = load_task(f"mmlu-pro@{write(tmp_path / 'rows.jsonl', rows)}")
    found = {e.metadata["row"]: e.metadata["options"] for e in task.whole(None)}
    assert found == {1: ["(B) or (C)", "4"], 2: ["3", "4"]}


def test_a_preset_asked_for_another_schema_says_so(tmp_path):
    path = write(tmp_path / "rows.jsonl", [{"problem": "x", "solution": "y"}])
    for load in (load_task, lambda name: check_task(RunConfig(task=name))):
        with pytest.raises(ConfigError, match="columns .* but not 'answer'"):
            load(f"math-500@{path}")
    with pytest.raises(ConfigError, match="does not exist"):
        check_task(RunConfig(task="math-500@nowhere.jsonl"))
    with pytest.raises(ConfigError, match="did you mean 'math-500'"):
        check_task(RunConfig(task="math500"))


@pytest.mark.parametrize(
    ("path", "value"),
    [("a", 1), ("b.c", 2), ("d.-1.e", 4), ("d.0.e", 3), ("d.5.e", None), ("b.x", None), ("a.b", None), ("f.g", 6)],
)
def test_paths_into_cells(path, value):
    assert lookup({"a": 1, "b": {"c": 2}, "d": [{"e": 3}, {"e": 4}], "f.g": 6}, path) == value


# --- answers: (what the model wrote, reference, right), none of them from the scorers' own tests

NUMBERS = [
    ("18", "18", 1), ("The answer is 18.", "18", 1), ("$18", "18", 1), ("18 dollars", "18", 1), ("18.00", "18", 1),
    ("#### 18", "18", 0), ("18<|im_end|>", "18", 1), ("**18**", "18", 1), (r"\boxed{18}", "18", 1),
    ("Thus the final answer is: 18", "18", 1), ("answer = 18", "18", 1), ("9 + 9", "18", 0), ("36/2", "18", 0),
    ("17 or 18", "18", 0), ("about 18", "18", 0), ("18 because 9 + 9", "18", 0), ("eighteen", "18", 0),
    ("-18", "18", 0), ("180", "18", 0), ("18%", "18", 0),
    ("033", "33", 1), ("33.", "033", 1), ("1,234,567", "1234567", 1),
    ("How many is 18?", "18", 0), ("", "18", 0), ("the answer is", "18", 0), (r"\boxed{17} \boxed{18}", "18", 0),
]  # fmt: skip
FORMULAS = [
    (r"\frac{1}{2}", "0.5", 1), (r"So $\boxed{\frac{1}{2}}$.", r"\frac12", 1), (r"\dfrac 12", "1/2", 1),
    (r"(3, \pi/2)", r"\left( 3, \frac{\pi}{2} \right)", 1), (r"(\pi/2, 3)", r"\left( 3, \frac{\pi}{2} \right)", 0),
    ("Evelyn", r"\text{Evelyn}", 1), ("Eve", r"\text{Evelyn}", 0), ("90", r"90^\circ", 1), ("10080", r"10,\!080", 1),
    (r"(-\infty,2)\cup(3,\infty)", r"(-\infty, 2) \cup (3, \infty)", 1), ("[-2,7]", "[-2,7)", 0),
    ("p-q", "p - q", 1), ("q-p", "p - q", 0), ("a^{-6}", "a ^ { - 6 }", 1), (r"\frac{1}{a^6}", "a ^ { - 6 }", 1),
    ("-4", "x = - 4", 1), ("4", "x = - 4", 0), ("-0.5", r"- \frac { 1 } { 2 }", 1), ("y=2x-5", "y = 2 x - 5", 1),
    (r"2\sqrt{3}", r"\sqrt{12}", 1), ("3.4641", r"2\sqrt{3}", 0), (r"\{1,2\}", r"\{2, 1\}", 1),
    (r"1/2 + 1/3", r"\frac{5}{6}", 0), ("x^2+2x+1", "(x+1)^2", 0), ("a > 3", r"a \ge 3", 0),
    (r"12 \text{ cm}^2", "12", 1), ("True", "True", 1), ("false", "True", 0), ("[2, 1]", "[1, 2]", 0),
]  # fmt: skip
DECIMALS = [
    ("0.33", "0.3333", 1), ("1/3", "0.3333", 1), ("0.35", "0.3333", 0), ("-0.3333", "0.3333", 0),
    ("33.33%", "0.3333", 1), ("0.3333 m", "0.3333", 1), (r"4.5 \times 10^{33}", "4.5e33", 1), ("4.52e33", "4.5e33", 1),
    (r"$4.5\cdot10^{32}$", "4.5e33", 0), ("4.6e33", "4.5e33", 0), (r"3 \times 10^{-5}", "3e-5", 1), ("42", "42", 1),
    ("42.1", "42", 0), ("41.9", "42", 0), ("0", "0.0", 1), ("0.001", "0.0", 0), ("[0.501, 2]", "[0.5, 2]", 1),
    ("[0.6, 2]", "[0.5, 2]", 0), ("0.5 + 0", "0.5", 0), ("between 0.4 and 0.5", "0.5", 0), ("2 * 0.25", "0.5", 0),
]  # fmt: skip
OPTIONS = ["4", "17", "the mitochondria", "2x + 1"]
CHOICES = [
    ("B", "B", 1), ("(B)", "B", 1), ("B.", "B", 1), ("b", "B", 1), ("B) 17", "B", 1), ("B: 17", "B", 1),
    ("17", "B", 1), ("The correct answer is (B)", "B", 1), (r"\boxed{\text{B}}", "B", 1), ("$B$", "B", 1),
    ("Option (B)", "B", 1), ("B<|eot_id|>", "B", 1), ("B) 4", "B", 0), ("B) 4", "A", 0), ("A or B", "B", 0),
    ("A, B", "B", 0), ("not B", "B", 0), ("B and C", "B", 0), ("A cell", "A", 0), ("mitochondria", "C", 0),
    ("The mitochondria.", "C", 1), ("1 + 2x", "D", 1), ("17 or 4", "B", 0), ("E", "A", 0), ("Because", "B", 0),
    ("I think it is B", "B", 0), ("", "A", 0),
]  # fmt: skip
CASES = [(*case, 0.0, None) for case in NUMBERS + FORMULAS] + [(*case, 0.01, None) for case in DECIMALS]


@pytest.mark.parametrize(
    ("said", "reference", "right", "tolerance", "options"), CASES + [(*case, 0.0, OPTIONS) for case in CHOICES]
)
def test_answers_are_neither_flattered_nor_punished(said, reference, right, tolerance, options):
    example = Example("a:1", "Which?", reference, {"options": options})
    assert match_benchmark(said, example, tolerance) == right
    assert bool(vote(said, example)) or not right
    # Two right answers vote for the same, whatever their dress.
    if right and not tolerance and reference in ("18", "B", "0.5"):
        assert vote(said, example) == vote(reference, example)


def test_there_are_twenty_cases_of_each_kind():
    assert all(len({case[:2] for case in kind}) >= 20 for kind in (NUMBERS, FORMULAS, DECIMALS, CHOICES))


def test_a_letter_that_is_a_word_needs_to_stand_alone():
    """Ten options go up to J, and I is one of them."""
    ten = Example("a:1", "Which?", "I", {"options": list("zyxwvutsrq")})
    assert match_benchmark("I", ten) == 1 and match_benchmark("I think so", ten) == 0


# --- bad rows


def questions(held_out, count, word="Say"):
    found = (f"{word} {i}?" for i in range(999))
    return [q for q in found if is_held_out(q) == held_out][:count]


def test_bad_rows_are_skipped_and_said_before_a_model_loads(tmp_path, caplog):
    """An answer of two lines, one that is cut, an empty one: with their numbers, and the run goes on."""
    rows = [{"question": q, "answer": "7"} for q in questions(False, 6) + questions(True, 4)]
    rows[1]["answer"], rows[3]["answer"], rows[6]["answer"] = "7\n8", "", "123456789"
    task = str(write(tmp_path / "rows.jsonl", rows))
    settings = {"task": task, "difficulty": None, "prompt_style": "few_shot", "steps": 1, "eval_questions": 3}
    with pytest.raises(ConfigError, match="set bad_rows='skip'"):
        make_trainer(tmp_path / "refused", **settings).setup()
    with caplog.at_level(logging.WARNING):
        trainer = make_trainer(tmp_path / "run", **settings, bad_rows="skip").run()
    (said,) = [record.message for record in caplog.records if "rows are skipped" in record.message]
    assert "rows.jsonl: 3 rows are skipped, numbers 2, 4, 7: row 2 " in said
    assert "row 4 has an empty 'answer'" in said and "row 7 " in said
    assert {e.metadata["row"] for e in trainer.task.train(0, 40)} <= {1, 3, 5, 6}
    assert {e.metadata["row"] for e in trainer.eval_sets[0].examples} <= {8, 9, 10}


def test_a_preset_skips_by_itself(tmp_path, caplog):
    rows = [{"question": q, "answer": "7", "category": "Mathematics", **WEB} for q in questions(False, 5)]
    rows += [{"question": q, "answer": "7", "category": "x", **WEB} for q in questions(True, 3)]
    rows[0]["answer"] = "7\n8"
    task = f"webinstruct@{write(tmp_path / 'rows.jsonl', rows)}"
    settings = {"difficulty": None, "prompt_style": "few_shot", "steps": 1, "eval_questions": 3, "eval_every": 0}
    trainer = make_trainer(tmp_path / "run", task=task, **settings).setup()
    assert "webinstruct: 1 rows are skipped, numbers 1: row 1 " in caplog.text
    assert len(trainer.task.rows()) == 7


# --- models


@pytest.mark.parametrize("tag", ["think", "thinking"])
def test_the_tag_is_the_same_everywhere(tag):
    tokenizer = load_tokenizer("tiny")
    chat = CHATS["Qwen/Qwen2.5-7B"] if tag == "think" else CHATS["Qwen/Qwen3-8B-Base"]
    prompter = Prompter(tokenizer, style="chat", chat=chat)
    prompt = prompter(Example("e", "x?", "7"))
    for context in (prompt.prior, prompt.posterior):
        text = tokenizer.decode(context)
        assert text.endswith(f"<{tag}>\n") and f"between <{tag}> and </{tag}>" in text
    assert prompter.style.trace_end == f"</{tag}>" and tokenizer.decode(prompt.empty_trace) == f"</{tag}>"


def test_a_base_model_stops_where_its_turn_ends(tiny_policy):
    """Its own end of text is another token than the one that ends a turn of the template."""
    from covrl_lab.train.sampling import generate

    tokenizer = load_tokenizer("tiny")
    turn_end = tokenizer.convert_tokens_to_ids("<|im_end|>")
    assert Prompter(tokenizer, style="chat").stop_ids == {turn_end}
    assert Prompter(tokenizer, style="few_shot").stop_ids == frozenset()
    context = tokenizer("which word hides here?")["input_ids"]
    settings = {"max_tokens": 8, "ended": lambda ids: False}
    (whole,), _, _ = generate(tiny_policy, [context], **settings)
    (cut,), done, _ = generate(tiny_policy, [context], stop_ids=[whole[3]], **settings)
    assert cut == whole[: whole.index(whole[3]) + 1] and done == [False]


def test_llama_base_gets_the_published_format_and_a_system_prompt():
    from dataclasses import replace

    tokenizer = load_tokenizer("tiny")
    tokenizer.chat_template = None
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|eot_id|>"]})
    chat = replace(CHATS["meta-llama/Llama-3.1-8B"], system="Be brief.")
    assert Prompter(tokenizer, chat=chat).style.name == "few_shot"  # auto is what it was
    prompter = Prompter(tokenizer, style="chat", chat=chat)
    text = tokenizer.decode(prompter(Example("e", "x?", "7")).prior)
    assert "<|start_header_id|>system<|end_header_id|>\n\nBe brief.<|eot_id|>" in text
    assert text.endswith("<|start_header_id|>assistant<|end_header_id|>\n\n<think>\n")
    assert prompter.stop_ids == {tokenizer.convert_tokens_to_ids("<|eot_id|>")}


@pytest.mark.parametrize("name", ["think_tag", "system_prompt"])
def test_what_only_chat_prompts_read_is_refused_in_others(tmp_path, name):
    settings = {"model": "tiny", name: "thinking", "task": "arithmetic"}
    with pytest.raises(ConfigError, match=f"^{name} is for chat prompts, and these are few-shot; leave it out"):
        open_task(RunConfig(**settings))
    assert open_task(RunConfig(**settings, prompt_style="chat"))[1].style.name == "chat"
    begun = RunConfig(**settings, run_dir=str(tmp_path))
    begun.save(tmp_path / "config.json")
    assert open_task(begun)[1].style.name == "few_shot", "a run of an earlier version resumes"
    assert open_task(RunConfig(**settings, demonstrations=0))[1].style.name == "chat"


def test_a_template_that_refuses_a_system_prompt_is_one_sentence():
    from dataclasses import replace

    tokenizer = load_tokenizer("tiny")
    tokenizer.chat_template = "{{ raise_exception('no system role') }}"
    chat = replace(CHATS["Qwen/Qwen2.5-7B"], system="Be brief.")
    with pytest.raises(ConfigError, match="no system role.*leave out system_prompt"):
        Prompter(tokenizer, style="chat", chat=chat)


@pytest.fixture
def sentencepiece():
    """A tokenizer as Llama 2's, Mistral's and Phi 3's: it puts a space before every text."""
    from tokenizers import Tokenizer, decoders, normalizers
    from tokenizers.models import BPE
    from transformers import PreTrainedTokenizerFast

    letters = [chr(i) for i in range(32, 127)] + ["▁"]
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{i:02X}>" for i in range(256)), *letters, "▁A", "An", "▁t", "▁7"]
    merges = [("▁", "A"), ("A", "n"), ("▁", "t"), ("▁", "7")]
    vocab = {token: i for i, token in enumerate(dict.fromkeys(tokens))}
    backend = Tokenizer(BPE(vocab, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    parts = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    backend.decoder = decoders.Sequence(parts)
    return PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", eos_token="</s>", unk_token="<unk>")


def test_a_tokenizer_that_prepends_spaces_keeps_its_seams(sentencepiece):
    assert sentencepiece.decode(sentencepiece("a")["input_ids"] * 2) == "a a"  # what pieces on their own would do
    prompter = Prompter(sentencepiece, style="few_shot")
    prompt = prompter(Example("e", "x?", "7"))
    trace = prompter._encode(" two\n")
    ids = [*prompt.prior, *trace, *prompt.seam, *prompt.answer]
    text = "Question: x?\nReasoning: two\nAnswer: 7\n"
    assert sentencepiece.decode(ids) == text
    # After the start of the text, the pieces' ids are those of the text in one piece.
    whole = sentencepiece(text, add_special_tokens=False)["input_ids"]
    assert ids[-len(whole) + 2 :] == whole[2:]
    assert prompter.answer_text(prompt.answer) == "7" and prompter.trace_text(trace) == "two"
    assert [i for i, own in zip(prompt.answer, prompt.answer_core, strict=True) if own] == whole[-2:-1]


# --- evaluation sets in a run


@pytest.mark.slow
def test_sets_are_evaluated_on_their_own_and_averaged(tmp_path):
    from covrl_lab import compare, load_run
    from covrl_lab.views.report import page

    asked = questions(False, 3, "Ask") + questions(True, 2, "Ask")
    math = [{"problem": q, "solution": "", "answer": "7"} for q in asked]
    sat = [
        {"query": f"Q: Take {i}. Answer Choices: (A)1 (B)2\nA:", "choices": ["(A)1", "(B)2"], "gold": [0]}
        for i in range(4)
    ]
    names = [f"math-500@{write(tmp_path / 'm.jsonl', math)}", f"sat-math@{write(tmp_path / 's.jsonl', sat)}"]
    rows = [{"question": q, "answer": "7"} for q in asked + questions(False, 6) + questions(True, 3)]
    settings = {
        "task": str(write(tmp_path / "rows.jsonl", rows)),
        "difficulty": None,
        "prompt_style": "few_shot",
        "eval_task": f"{names[0]}*3, {names[1]}",
        "eval_questions": None,
        "eval_temperature": 0.7,
        "eval_max_trace_tokens": 9,
        "eval_samples": 2,
        "steps": 2,
        "eval_every": 1,
    }
    trainer = make_trainer(tmp_path / "run", **settings).run()
    found = lines(tmp_path / "run" / "evaluations.jsonl")
    assert [line["step"] for line in found] == [0, 1, 2]
    for line in found:
        first, second = ({k.rpartition("/")[2]: v for k, v in line.items() if k.startswith(f"{n}/")} for n in names)
        assert (first["eval_questions"], first["k"]) == (5, 3) and (second["eval_questions"], second["k"]) == (4, 2)
        assert line["eval_questions"] == 9 and "k" not in line
        for name in ("accuracy", "avg_at_k", "pass_at_k", "maj_at_k", "bound_1", "bound_k", "posterior_accuracy"):
            assert line[name] == pytest.approx((first[name] + second[name]) / 2)
        assert first["bound_1"] <= first["bound_k"] <= 0 and 0 <= first["avg_at_k"] <= first["pass_at_k"] <= 1
        assert line["accuracy_low"] <= line["accuracy"] <= line["accuracy_high"]
    run = load_run(tmp_path / "run")
    rows = run.predictions(2)
    assert set(rows["set"]) == set(names) and rows["trace_tokens"].max() <= 9
    assert rows.groupby("set")["sample"].nunique().tolist() == [4, 3]
    # What is evaluated is never trained on, on whichever side of the split it would be.
    trained = {e.question for e in trainer.task.train(0, 60)}
    assert trained and not trained & {row["problem"] for row in math}
    assert "Held-out accuracy" in page(run)
    scores = compare.scores({"mine": [run]})
    assert scores.groupby("task").size().to_dict() == {names[0]: 5, names[1]: 4}


def test_the_metrics_of_samples_against_their_definitions():
    import math

    import pandas as pd

    from covrl_lab.train.evaluation import average, summarise

    greedy = [{"example_id": x, "sample": -1, "score": 0.0, "finished": True, "trace_tokens": 3} for x in "ab"]
    table = {"a": [("7", 1.0, -1.0), ("8", 0.0, -2.0), ("7", 1.0, -3.0)], "b": [("1", 0.0, -5.0), ("", 0.0, -6.0)]}
    table["b"].append(("2", 1.0, -4.0))
    sampled = [
        {"example_id": x, "sample": i, "score": s, "finished": bool(v), "trace_tokens": 3, "vote": v, "answer_logp": p}
        for x, own in table.items()
        for i, (v, s, p) in enumerate(own)
    ]
    found = summarise(pd.DataFrame(greedy + sampled).drop(columns="answer_logp").assign(
        answer_logp=[-1.0, -1.0, *(row["answer_logp"] for row in sampled)], other_trace_logp=-1.0, no_trace_logp=-1.0
    ))  # fmt: skip
    assert found["avg_at_k"] == pytest.approx((2 / 3 + 1 / 3) / 2) and found["k"] == 3
    assert found["pass_at_k"] == 1.0
    assert found["maj_at_k"] == 0.5  # a: 7 with two votes; b: a tie, the first counts, and it is wrong
    assert found["bound_1"] == pytest.approx(-3.5)
    expected = [math.log(sum(math.exp(p) for _, _, p in own) / 3) for own in table.values()]
    assert found["bound_k"] == pytest.approx(sum(expected) / 2)
    # Half-widths add like independent errors.
    one = {"accuracy": 0.5, "accuracy_low": 0.2, "accuracy_high": 0.6, "eval_questions": 10, "k": 2, "extra": 1.0}
    two = {"accuracy": 0.9, "accuracy_low": 0.5, "accuracy_high": 1.0, "eval_questions": 30, "k": 2}
    mean = average({"x": one, "y": two})
    assert mean == pytest.approx(
        {"accuracy": 0.7, "accuracy_low": 0.7 - 0.25, "accuracy_high": 0.7 + math.sqrt(0.02) / 2}
        | {"eval_questions": 40, "k": 2}
    )
    assert average({"x": one}) == pytest.approx(one)


@pytest.mark.slow
def test_a_stored_checkpoint_is_evaluated_beside_the_runs_own(tmp_path, reference):
    import shutil

    from covrl_lab import load_run
    from covrl_lab.train.benchmark import evaluate_checkpoint

    folder = tmp_path / "run"
    shutil.copytree(reference.run_dir, folder)
    kept = {p: p.read_bytes() for p in folder.rglob("*") if p.is_file()}
    rows = [{"problem": f"Ask {i}?", "answer": "7"} for i in range(5)]
    name = f"math-500@{write(tmp_path / 'm.jsonl', rows)}"
    record, path = evaluate_checkpoint(folder, {"eval_task": f"{name}*2", "eval_questions": 4}, progress=False)
    assert record["step"] == 8 and record[f"{name}/eval_questions"] == 4 and record[f"{name}/k"] == 2
    assert record["settings"] == {"eval_task": f"{name}*2", "eval_questions": 4}
    with path.open("a") as file:
        file.write('{"step": 6, "accur')  # a killed process's
    assert load_run(folder).benchmarks["step"].tolist() == [8]
    evaluate_checkpoint(folder, {}, step=0, progress=False)
    assert {p: p.read_bytes() for p in kept} == kept
    first, second = lines(path)
    assert first == record and second["step"] == 0 and second["settings"] == {}
    # Before training and on the run's own questions, the run's own numbers come out.
    own = lines(folder / "evaluations.jsonl")[0]
    assert {k: second[k] for k in own} == own
    assert load_run(folder).benchmarks["step"].tolist() == [8, 0]
    stored = path.read_bytes()
    evaluate_checkpoint(folder, {}, step=0, progress=False)  # as after a kill between its line and its end
    assert path.read_bytes() == stored, "the same evaluation once more adds no line"
    # What "auto" stood for is not known later, so a dtype that was asked for is a setting of the line.
    config = RunConfig.load(folder / "config.json")
    dataclasses.replace(config, dtype="auto").save(folder / "config.json")
    record, path = evaluate_checkpoint(folder, {"dtype": "bfloat16"}, step=0, progress=False)
    assert record["settings"] == {"dtype": "bfloat16"}
    with pytest.raises(ConfigError, match=r"no checkpoint of step 5; it has \[6, 8\]"):
        evaluate_checkpoint(folder, {}, step=5)


@pytest.mark.parametrize(
    ("eval_task", "message"),
    [
        ("gsm8k*x", "how many samples"),
        ("gsm8k, gsm8k*2", "names 'gsm8k' twice"),
        ("gsm9k", "unknown task 'gsm9k'; did you mean 'gsm8k'"),
        ("nowhere.jsonl", "does not exist"),
    ],
)
def test_a_wrong_set_is_refused_at_once(tmp_path, no_model, eval_task, message):
    with pytest.raises(ConfigError, match=message):
        make_trainer(tmp_path / "run", eval_task=eval_task)


# --- the paper's configuration


def test_the_papers_configuration_says_of_every_line_whose_it_is():
    import yaml

    from covrl_lab import RunConfig
    from covrl_lab.__main__ import _read_config

    text = (ROOT / "covrl_lab" / "configs" / "covrl-7b.yaml").read_text("utf-8")
    settings = [line for line in text.splitlines() if not line.startswith("#")]
    assert all("# paper" in line or "# our choice" in line for line in settings)
    assert yaml.safe_load(text) == _read_config("covrl-7b")
    config = RunConfig(**yaml.safe_load(text))
    assert config.model == "Qwen/Qwen2.5-7B" and config.questions_per_step == 192 and config.learning_rate == 1e-5
    assert {name for name, _ in config.eval_sets()} <= set(PRESETS) and config.task in PRESETS
    assert dict(config.eval_sets())["aime-24"] == 32
    with pytest.raises(ConfigError, match="'covrl-7' holds no settings .*; give a YAML file, or covrl-7b"):
        _read_config("covrl-7")
