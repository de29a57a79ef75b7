"""What must hold for any input, by hypothesis: trees, prompts and their seams, data files, torn files, shown text."""

import html
import json
import unicodedata
from fractions import Fraction

import pytest
from helpers import assert_one_sentence
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from covrl_lab.runs.folder import read_lines
from covrl_lab.train.answers import match_answer
from covrl_lab.train.prompts import Prompter
from covrl_lab.train.tasks import is_held_out, load_task, normalise_question
from covrl_lab.train.tree import build_tree, count_nodes
from covrl_lab.types import ConfigError, Demonstration, Example
from covrl_lab.views.html import html_text, visible

# The same examples each time; no time limit, as timing decides no test.
settings.register_profile("steady", deadline=None, derandomize=True, max_examples=150)
settings.load_profile("steady")
same_folder = settings(suppress_health_check=[HealthCheck.function_scoped_fixture])

sequences = st.lists(st.lists(st.integers(0, 3), min_size=1, max_size=9), min_size=1, max_size=12)
lines = st.text(st.characters(exclude_categories=["Cc", "Cs", "Zl", "Zp"]), max_size=60)
words = lines.filter(str.strip)


@given(sequences)
def test_a_tree_holds_each_prefix_once_and_each_path_its_ancestors(packed):
    tree = build_tree(packed)
    prefixes = {tuple(s[: t + 1]) for s in packed for t in range(len(s))}
    assert len(tree) == count_nodes(packed) == len(prefixes)
    for sequence, path in zip(packed, tree.paths, strict=True):
        assert tree.ids[path].tolist() == sequence and tree.position[path].tolist() == list(range(len(sequence)))
        last = int(path[-1])
        seen = [j for j in range(len(tree)) if j <= last < tree.end[j]]  # the rule of attention
        assert seen == path.tolist() and tree.path(last).tolist() == path.tolist()[:-1]


@pytest.fixture(scope="module")
def prompter():
    from covrl_lab.train.models import load_tokenizer

    return Prompter(load_tokenizer("tiny"), [Demonstration("What is 1 + 1?", "1 + 1 = 2.", "2")])


@given(question=words, answer=words, trace=lines)
def test_pieces_join_to_the_text_and_the_answer_comes_back(prompter, question, answer, trace):
    prompt, decode = prompter(Example("x", question, answer)), prompter.tokenizer.decode
    shown, y = question.replace("\n", " "), answer.strip()
    assert decode(prompt.prior).endswith(f"Question: {shown}\nReasoning:")
    assert decode(prompt.posterior).endswith(f"Question: {shown}\nThe answer is {y}.\nReasoning:")
    assert decode(prompt.answer) == f" {y}\n" and prompter.answer_text(prompt.answer) == y
    core = [i for i, own in zip(prompt.answer, prompt.answer_core, strict=True) if own]
    assert decode(core).strip() == y
    ids = [*prompter.tokenizer(trace, add_special_tokens=False)["input_ids"], *prompt.empty_trace]
    assert prompter.ends(ids, prompter.style.trace_end) and prompter.trace_text(ids) == trace.strip()
    whole = decode([*prompt.prior, *ids, *prompt.seam, *prompt.answer])
    assert whole.endswith(f"Reasoning:{trace}\nAnswer: {y}\n"), "no token was encoded anew across a seam"


@same_folder
@given(rows=st.lists(st.tuples(words, st.integers(-999, 999)), min_size=1, max_size=30))
def test_every_question_of_a_file_is_on_one_side_once(tmp_path, rows):
    path = tmp_path / "data.jsonl"
    path.write_text("".join(json.dumps({"question": q, "answer": a}) + "\n" for q, a in rows), encoding="utf-8")
    task = load_task(str(path), demonstrations=0)
    asked = [normalise_question(example.question) for example in task.rows()]
    assert sorted(asked) == sorted({normalise_question(q) for q, _ in rows})
    held_out = {normalise_question(e.question) for e in task.whole(None, held_out=True)}
    assert held_out == {q for q in asked if is_held_out(q)}
    assert all(is_held_out(" ".join(reversed(q.split()))) == is_held_out(q) for q in asked if q.isascii())
    if count := len(asked) - len(held_out):
        epoch = task.train(count, count, seed=3)
        assert sorted(normalise_question(e.question) for e in epoch) == sorted(set(asked) - held_out)


@pytest.mark.slow
@same_folder
@given(content=st.one_of(st.text(max_size=300), st.recursive(st.none() | st.floats() | st.text(), st.lists)))
def test_any_data_file_is_read_or_refused_in_a_sentence(tmp_path, content):
    text = content if isinstance(content, str) else json.dumps(content)
    for suffix in (".jsonl", ".json", ".csv"):
        path = tmp_path / f"data{suffix}"
        path.write_text(text, encoding="utf-8", errors="replace")
        try:
            load_task(str(path))
        except ConfigError as error:
            assert_one_sentence(str(error))


@same_folder
@given(steps=st.integers(0, 6), cut=st.integers(0, 400), lost=st.integers(0, 8))
def test_a_torn_file_keeps_its_whole_lines_and_a_hole_is_named(tmp_path, steps, cut, lost):
    written = [json.dumps({"step": s, "seconds": 0.5, "note": None}) + "\n" for s in range(1, steps + 1)]
    kept = [line for s, line in enumerate(written, start=1) if s != lost]
    content = "".join(kept)[:cut]
    (tmp_path / "metrics.jsonl").write_text(content, encoding="utf-8")
    found = read_lines(tmp_path / "metrics.jsonl")
    whole = [json.loads(line) for line in content.split("\n")[:-1]]
    assert found.records == whole
    torn = next((i for i, r in enumerate(whole, start=1) if r["step"] != i), None)
    assert (found.fault != "") == (torn is not None) and found.reach == (torn - 1 if torn else len(whole))


@given(st.text(max_size=80))
def test_what_is_shown_hides_no_character_and_is_no_markup(text):
    shown = visible(text)
    assert html.unescape(html_text(text)) == shown and not {"<", ">", '"'} & set(html_text(text))
    hidden = [c for c in shown if unicodedata.category(c) in ("Cc", "Cf", "Cs", "Zl", "Zp")]
    assert set(hidden) <= set("\u200c\u200d")  # joiners, inside words and emoji


@given(value=st.fractions(-1000, 1000, max_denominator=50), other=st.fractions(-1000, 1000, max_denominator=50))
def test_a_number_matches_itself_in_any_spelling_and_no_other_number(value: Fraction, other: Fraction):
    assert match_answer(f" {value}. ", str(value)) == 1.0
    assert match_answer(str(other), str(value)) == float(other == value)
    if value.denominator == 1:
        assert match_answer(f"${value}.0$", str(value)) == match_answer(f"{int(value):,}", str(value)) == 1.0
