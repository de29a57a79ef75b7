"""Tasks: where questions, reference answers and worked examples come from. No torch.

A task is a built-in generator (``TASKS``), ``reasoning_gym/NAME``, ``hf/OWNER/NAME``, or the path of a
.jsonl, .json, .csv or .parquet file. Training and held-out questions are disjoint by construction: a hash of
the question's text alone decides its side, so no seed, order or file edit can move a question across.
"""

from __future__ import annotations

import csv
import hashlib
import json
import re
import threading
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from decimal import Decimal, DecimalException
from functools import lru_cache
from pathlib import Path
from random import Random
from typing import Any

from covrl_lab.types import ConfigError, Demonstration, Example, did_you_mean

HELD_OUT_EVERY = 5  # one question in five is held out
MAX_DEMONSTRATIONS = 8
DEFAULT_DIFFICULTY = 2
PATIENCE = 1000  # fruitless draws in a row before a generator counts as exhausted; 0.8**1000 is never
FILE_SUFFIXES = (".jsonl", ".json", ".csv", ".parquet")


def normalise_question(question: str) -> str:
    """Casefold and collapse white space: texts equal after this are the same question."""
    return " ".join(question.casefold().split())


def _digest(question: str) -> str:
    return hashlib.sha256(normalise_question(question).encode()).hexdigest()


def is_held_out(question: str) -> bool:
    """Whether a question belongs to the held-out fifth; depends on nothing but its text."""
    return int(_digest(question)[:16], 16) % HELD_OUT_EVERY == 0


# --- Built-in tasks: each maps (rng, level 1..5, variant >= 0) to question, trace, answer. The variant picks
# --- the kind of question (sign, position, story), so that demonstrations can go through the kinds in turn.

NUMBERS = {1: (1, 9), 2: (10, 60), 3: (10, 99), 4: (100, 999), 5: (1000, 9999)}  # by level, inclusive
WORDS = (
    "ant arm bag bed bee box bus cap cat cow cup day dog ear egg eye fan fox gas hat ice jam key leg lip "
    "map net oak oil owl pan pie pig rug sea sky sun tea toy van apple beach brick bridge candle chair "
    "circus cloud comet copper dragon eagle field flower garden glass hammer hotel island jacket kitchen "
    "ladder lemon market mirror moon music needle ocean pencil piano river silver spider summit table "
    "tiger train tunnel valley violin wheel window winter"
).split()  # the first 40 have three letters
STORIES = (
    "A shop has {} apples. It gets {} more and then sells {}. How many apples are left?",
    "A shop has {} books. It sells {} and then gets {} more. How many books does it have?",
    "A shop has {} lamps. It sells {} on Monday and {} on Tuesday. How many lamps are left?",
    "A shop has {} pens. It gets {} on Monday and {} on Tuesday. How many pens does it have?",
)
SIGNS = ("+-", "-+", "--", "++")  # the two steps of each story


def arithmetic(rng: Random, level: int, variant: int) -> tuple[str, str, str]:
    """a + b or a - b >= 0. Levels: both numbers from 1-9, 10-60 (default), 10-99, 100-999, 1000-9999."""
    a, b = rng.randint(*NUMBERS[level]), rng.randint(*NUMBERS[level])
    if variant % 2 == 0:
        return f"What is {a} + {b}?", f"{a} + {b} = {a + b}.", str(a + b)
    a, b = max(a, b), min(a, b)
    return f"What is {a} - {b}?", f"{a} - {b} = {a - b}.", str(a - b)


def last_letters(rng: Random, level: int, variant: int) -> tuple[str, str, str]:
    """Last letters of words. Levels: 2 three-letter words, 2 words (default), 3, 4, 5 words."""
    words = rng.sample(WORDS[:40] if level == 1 else WORDS, max(2, level))
    quoted = [f"'{word}'" for word in words]
    question = f"Join the last letters of {', '.join(quoted[:-1])} and {quoted[-1]}."
    trace = " ".join(f"The last letter of '{word}' is {word[-1]}." for word in words)
    return question, trace, "".join(word[-1] for word in words)


def largest_of_three(rng: Random, level: int, variant: int) -> tuple[str, str, str]:
    """Largest of three different numbers. Levels: from 1-9, 10-60 (default), 10-99, 100-999, 1000-9999."""
    low, high = NUMBERS[level]
    *rest, largest = sorted(rng.sample(range(low, high + 1), 3))
    rng.shuffle(rest)
    numbers = list(rest)
    numbers.insert(variant % 3, largest)
    question = "Which number is the largest: {}, {} or {}?".format(*numbers)
    return question, f"{largest} is larger than {rest[0]} and {rest[1]}.", str(largest)


def _two_steps(rng: Random, level: int, signs: str) -> tuple[tuple[int, int, int], str, str]:
    """Three numbers of the level, the trace of joining them by two signs, and the result >= 0."""
    while True:
        a, b, c = (rng.randint(*NUMBERS[level]) for _ in range(3))
        first = a + b if signs[0] == "+" else a - b
        last = first + c if signs[1] == "+" else first - c
        if first >= 0 and last >= 0:
            return (a, b, c), f"{a} {signs[0]} {b} = {first}. {first} {signs[1]} {c} = {last}.", str(last)


def chained_arithmetic(rng: Random, level: int, variant: int) -> tuple[str, str, str]:
    """a +- b +- c >= 0. Levels: numbers from 1-9, 10-60 (default), 10-99, 100-999, 1000-9999."""
    signs = SIGNS[variant % 4]
    (a, b, c), trace, answer = _two_steps(rng, level, signs)
    return f"What is {a} {signs[0]} {b} {signs[1]} {c}?", trace, answer


def shop(rng: Random, level: int, variant: int) -> tuple[str, str, str]:
    """Two-step shop story. Levels: numbers from 1-9, 10-60 (default), 10-99, 100-999, 1000-9999."""
    numbers, trace, answer = _two_steps(rng, level, SIGNS[variant % 4])
    return STORIES[variant % 4].format(*numbers), trace, answer


TASKS: dict[str, Callable[[Random, int, int], tuple[str, str, str]]] = {
    task.__name__: task for task in (arithmetic, last_letters, largest_of_three, chained_arithmetic, shop)
}


def _worked_examples(generate: Callable, level: int) -> list[Demonstration]:
    """The fixed demonstrations of a built-in task, all from the training side of the hash."""
    chosen: dict[str, Demonstration] = {}
    attempt = 0
    while len(chosen) < MAX_DEMONSTRATIONS:
        question, trace, answer = generate(Random(f"demonstration/{attempt}"), level, variant=len(chosen))
        if not is_held_out(question):
            chosen.setdefault(normalise_question(question), Demonstration(question, trace, answer))
        attempt += 1
    return list(chosen.values())


# --- The two kinds of source: an endless generator, and a finite list of rows.


@dataclass(frozen=True)
class _Stream:
    """Questions made by ``draw(rng) -> (question, answer, metadata)``, or None for a draw to skip."""

    name: str
    draw: Callable[[Random], tuple[str, str, dict] | None]
    reserved: frozenset[str] = frozenset()  # normalised demonstration questions

    def _example(self, key: str) -> Example | None:
        drawn = self.draw(Random(key))
        return drawn and Example(f"{self.name}:{_digest(drawn[0])[:16]}", *drawn)

    def train(self, start: int, count: int, seed: int) -> list[Example]:
        return [self._train_one(index, seed) for index in range(start, start + count)]

    def _train_one(self, index: int, seed: int) -> Example:
        for attempt in range(PATIENCE):
            example = self._example(f"train/{seed}/{index}/{attempt}")
            if example and not is_held_out(example.question):
                if normalise_question(example.question) not in self.reserved:
                    return example
        raise ConfigError(f"task {self.name!r} gave no training question in {PATIENCE} draws; choose another")

    def held_out(self, count: int) -> list[Example]:
        found: dict[str, Example] = {}
        attempt = last_hit = 0
        while len(found) < count:
            example = self._example(f"held_out/{attempt}")
            if example and is_held_out(example.question) and example.id not in found:
                found[example.id], last_hit = example, attempt
            elif attempt - last_hit > PATIENCE:
                raise ConfigError(
                    f"task {self.name!r} has about {len(found)} different held-out questions, not {count}; "
                    "ask for fewer or raise the difficulty"
                )
            attempt += 1
        return list(found.values())


@dataclass(frozen=True)
class _Rows:
    """A finite data set, already split."""

    name: str
    train_examples: tuple[Example, ...]
    held_out_examples: tuple[Example, ...]

    def train(self, start: int, count: int, seed: int) -> list[Example]:
        size = len(self.train_examples)
        if not size:
            raise ConfigError(f"data set {self.name!r} has no row left to train on; add rows")
        places = (divmod(index, size) for index in range(start, start + count))
        return [self.train_examples[_epoch_order(size, seed, epoch)[place]] for epoch, place in places]

    def held_out(self, count: int) -> list[Example]:
        if count > len(self.held_out_examples):
            raise ConfigError(
                f"data set {self.name!r} has {len(self.held_out_examples)} held-out questions (a fifth), "
                f"not {count}; ask for fewer or add rows"
            )
        return list(self.held_out_examples[:count])


@lru_cache(maxsize=8)
def _epoch_order(size: int, seed: int, epoch: int) -> list[int]:
    return Random(f"epoch/{seed}/{epoch}").sample(range(size), size)


@dataclass(frozen=True)
class Task:
    """Questions with reference answers, worked examples and a scorer; made by ``load_task``."""

    name: str
    demonstrations: tuple[Demonstration, ...]
    _source: _Stream | _Rows = field(repr=False)
    _score: Callable[[str, Example], float] = field(repr=False)

    def train(self, start: int, count: int, seed: int = 0) -> list[Example]:
        """Examples start .. start+count-1 of the endless training stream, a pure function of its arguments.

        A finite data set is permuted anew in each epoch. Generators may repeat a question.
        """
        return self._source.train(start, count, seed)

    def held_out(self, count: int) -> list[Example]:
        """The first ``count`` held-out examples, all different. ConfigError if there are fewer."""
        return self._source.held_out(count)

    def score(self, prediction: str, example: Example) -> float:
        """How right a predicted answer is, 0..1; 1.0 is right."""
        return self._score(prediction, example)


# --- Scoring.


def match_answer(prediction: str, reference: str) -> float:
    """1.0 for the same text, number or formula, else 0.0. ``"7+7"`` does not answer ``"14"``."""
    prediction, reference = _normalise_answer(prediction), _normalise_answer(reference)
    if not prediction or not reference:
        return 0.0
    if prediction == reference:
        return 1.0
    number, predicted_number = _number(reference), _number(prediction)
    if number is not None and predicted_number is not None:
        return float(number == predicted_number)
    return float(_same_formula(prediction, reference, number))


def _normalise_answer(text: str) -> str:
    text = " ".join(text.casefold().split()).rstrip(".").rstrip()
    return text.replace(",", "") if re.fullmatch(r"[-+]?\d{1,3}(,\d{3})+(\.\d+)?", text) else text


def _number(text: str) -> Decimal | None:
    try:
        number = Decimal(text)
    except DecimalException:
        return None
    return number if number.is_finite() else None


def _same_formula(prediction: str, reference: str, number: Decimal | None) -> bool:
    """Compare by math_verify, which reads LaTeX and evaluates; the guards keep out what is no answer."""
    if len(prediction) > 200 or len(re.findall(r"\^|\*\*|!", prediction)) > reference.count("^") + 1:
        return False  # towers of powers take for ever
    if re.search(r"(\^|\*\*)[\s{(]*\d{4}|\d{3}\s*!", prediction):
        return False
    if number is not None:  # one number or fraction: "23 + 45" restates the question, "7 or 14" hedges
        whole = number == number.to_integral_value()
        if len(re.findall(r"\d[\d,]*(?:\.\d+)?", prediction)) > (1 if whole else 2):
            return False
    elif not re.search(r"[\d\\^+=$]", reference) or re.search(r"(?<![\\a-z])[a-z]{2,}", reference):
        return False  # words: as formulas, "en" and "ne" would be the same product

    from math_verify import parse, verify

    # Its timeouts are signals, which exist on the main thread only.
    limit = 3 if threading.current_thread() is threading.main_thread() else None
    try:
        # Inside $...$ the whole text has to be the formula, else a number would be fished out of prose.
        texts = (text if "$" in text else f"${text}$" for text in (reference, prediction))
        gold, guess = (parse(text, parsing_timeout=limit) for text in texts)
        return bool(verify(gold, guess, timeout_seconds=limit))
    except Exception:  # whatever a parser makes of arbitrary text, it is no match
        return False


# --- reasoning-gym.

# These build their rows in advance or cap them; the others make row i on demand, for any i.
_GYM_SIZE = {"acre": 2_000, "gsm_symbolic": 20_000, "list_functions": 20_000, "word_ladder": 20_000}
# Scorers that hand the answer to eval, or to sympy.parse_expr, which evals.
_GYM_EVAL = "string_insertion spiral_matrix binary_matrix n_queens".split()
_GYM_SYMPY = (
    "simple_integration intermediate_integration polynomial_multiplication puzzle24 countdown".split()
)
_FUNCTIONS = set("sin cos tan asin acos atan sinh cosh tanh exp log sqrt pi Abs Integral".split())


def _harmless(name: str, prediction: str) -> bool:
    """Whether a scorer may evaluate a model's text: no unknown calls, strings, attributes or huge powers."""
    if name in _GYM_EVAL:
        return not re.search(r"[(*]", prediction)
    if name in _GYM_SYMPY:
        words = set(re.findall(r"[A-Za-z]\w+", prediction))
        odd = re.search(r"""["'_!\[{:;\\]|\.\s*[A-Za-z]|\*\*[\s(]*(\d{3}|\w+\s*\*\*)""", prediction)
        return prediction.isascii() and not odd and words <= _FUNCTIONS and len(prediction) <= 500
    return True


def _gym_task(name: str) -> Task:
    import reasoning_gym

    short = name.removeprefix("reasoning_gym/")
    size = _GYM_SIZE.get(short, 2**31)
    try:
        dataset = reasoning_gym.create_dataset(short, seed=0, size=size)
        usable = any(dataset[i]["answer"] for i in range(5))
    except Exception as error:
        raise ConfigError(f"{name!r} cannot be used with its default settings: {error}") from error
    if not usable:
        raise ConfigError(f"{name!r} gives no reference answers, which training needs; choose another task")

    def draw(rng: Random) -> tuple[str, str, dict] | None:
        try:
            entry = dataset[rng.randrange(size)]
        except Exception:  # some generators give up on some rows
            return None
        return (
            (entry["question"], entry["answer"], entry["metadata"])
            if (entry["answer"] or "").strip()
            else None
        )

    def score(prediction: str, example: Example) -> float:
        prediction = prediction.strip()
        if not prediction or not _harmless(short, prediction):
            return 0.0
        entry = {"question": example.question, "answer": example.answer, "metadata": example.metadata}
        try:
            return min(1.0, max(0.0, float(dataset.score_answer(prediction, entry))))
        except Exception:  # a scorer that trips over a malformed answer has found a wrong one
            return 0.0

    return Task(name, (), _Stream(name, draw), score)


# --- Files and Hugging Face data sets.


def _read_file(path: Path, limit: int | None = None) -> tuple[list[str], Iterable[dict[str, Any]]]:
    """Column names and rows (at most ``limit``) of a data file."""
    try:
        if path.suffix == ".parquet":
            import pyarrow.parquet

            file = pyarrow.parquet.ParquetFile(path)
            return file.schema_arrow.names, [] if limit else file.read().to_pylist()
        with path.open(encoding="utf-8-sig", newline="") as file:
            if path.suffix == ".csv":  # the csv module keeps "007" and "NA" as they stand
                reader = csv.DictReader(file)
                return list(reader.fieldnames or []), [] if limit else list(reader)
            if path.suffix == ".json":
                rows = json.load(file)
            else:
                lines = (line for line in file if line.strip())
                rows = [json.loads(line) for line, _ in zip(lines, range(limit or 2**62), strict=False)]
    except (OSError, ValueError) as error:
        raise ConfigError(f"data file {str(path)!r} cannot be read: {error}") from error
    if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
        raise ConfigError(f"data file {str(path)!r} must hold a list of objects, one per question")
    return list(rows[0]) if rows else [], rows


def _read_hub(name: str, config: str | None, split: str | None) -> tuple[list[str], Iterable[dict[str, Any]]]:
    import datasets

    try:
        data = datasets.load_dataset(name.removeprefix("hf/"), config, split=split or "train")
    except Exception as error:  # network, name, config or split: the hub's own words say which
        reason = " ".join(str(error).split())[:200]
        raise ConfigError(f"{name!r} cannot be loaded ({reason}); check the name and the network") from error
    return data.column_names, data


def _check_columns(name: str, found: list[str], wanted: Iterable[str | None]) -> None:
    if not found:
        raise ConfigError(f"data set {name!r} is empty; it needs one row per question")
    for column in wanted:
        if column is not None and column not in found:
            hint = did_you_mean(column, found)
            raise ConfigError(f"data set {name!r} has columns {found} but not {column!r}{hint}")


def _cell(row: dict[str, Any], column: str | None) -> str:
    value = row.get(column)
    return "" if value is None else str(value).strip()


def _row_task(
    name: str, rows: Iterable[dict], question: str, answer: str, trace: str | None, shown: int
) -> Task:
    """Split rows by the hash of their question; the first ``shown`` traced training rows are examples.

    Of an answer cell ``working #### answer`` (GSM8K) the end is the answer, the beginning the trace.
    """
    seen: set[str] = set()
    train, held_out, demonstrations = [], [], []
    for number, row in enumerate(rows, start=1):
        asked, answered = _cell(row, question), _cell(row, answer).rpartition("####")[2].strip()
        for column, text in ((question, asked), (answer, answered)):
            if not text:
                raise ConfigError(
                    f"row {number} of {name!r} has an empty {column!r}; fill it in or remove it"
                )
        digest = _digest(asked)
        if digest in seen:
            continue
        seen.add(digest)
        example = Example(f"{Path(name).stem}:{digest[:16]}", asked, answered, {"row": number})
        worked = " ".join(_cell(row, trace).partition("####")[0].split())  # one line, as prompts need it
        if is_held_out(asked):
            held_out.append(example)
        elif worked and len(demonstrations) < shown:
            demonstrations.append(Demonstration(asked, worked, answered))
        else:
            train.append(example)
    if not seen:
        raise ConfigError(f"data set {name!r} is empty; it needs one row per question")
    held_out.sort(key=lambda example: _digest(example.question))  # files may be sorted by topic
    source = _Rows(name, tuple(train), tuple(held_out))
    return Task(name, tuple(demonstrations), source, lambda text, example: match_answer(text, example.answer))


# --- The two entry points.


def check_task(
    name: str,
    *,
    difficulty: int | None = None,
    demonstrations: int = 3,
    question_column: str | None = None,
    answer_column: str | None = None,
    trace_column: str | None = None,
    dataset_config: str | None = None,
    dataset_split: str | None = None,
) -> None:
    """Raise ConfigError if ``load_task`` could not work with these arguments; cheap, needs no network."""
    if not 0 <= demonstrations <= MAX_DEMONSTRATIONS:
        raise ConfigError(f"demonstrations must be 0 to {MAX_DEMONSTRATIONS}, not {demonstrations}")
    if difficulty is not None and name not in TASKS:
        raise ConfigError(f"difficulty is for built-in tasks ({', '.join(TASKS)}), not {name!r}")
    if difficulty is not None and difficulty not in NUMBERS:
        raise ConfigError(f"difficulty must be a whole number from 1 to {max(NUMBERS)}, not {difficulty!r}")
    columns = (question_column, answer_column, trace_column)
    on_hub, is_file = name.startswith("hf/"), Path(name).suffix in FILE_SUFFIXES
    if any(columns) and not (on_hub or is_file):
        raise ConfigError(f"columns are for files and hf/ data sets, not {name!r}")
    if (dataset_config or dataset_split) and not on_hub:
        raise ConfigError(f"dataset_config and dataset_split are for hf/ data sets, not {name!r}")

    if name in TASKS:
        return
    if on_hub:
        if not re.fullmatch(r"hf/[\w.-]+/[\w.-]+", name):
            raise ConfigError(f"Hugging Face task {name!r} must have the form hf/OWNER/NAME")
    elif name.startswith("reasoning_gym/"):
        from reasoning_gym.factory import DATASETS

        short = name.removeprefix("reasoning_gym/")
        if short not in DATASETS:
            raise ConfigError(f"unknown reasoning-gym task {short!r}{did_you_mean(short, DATASETS)}")
    elif is_file:
        if not Path(name).is_file():
            raise ConfigError(f"data file {name!r} does not exist; check the path")
        found, _ = _read_file(Path(name), limit=1)
        _check_columns(name, found, (question_column or "question", answer_column or "answer", trace_column))
    else:
        kinds = [
            *TASKS,
            "reasoning_gym/NAME",
            "hf/OWNER/NAME",
            *(f"FILE{suffix}" for suffix in FILE_SUFFIXES),
        ]
        raise ConfigError(f"unknown task {name!r}{did_you_mean(name, kinds)}")


def load_task(
    name: str,
    *,
    difficulty: int | None = None,
    demonstrations: int = 3,
    question_column: str | None = None,
    answer_column: str | None = None,
    trace_column: str | None = None,
    dataset_config: str | None = None,
    dataset_split: str | None = None,
) -> Task:
    """Load a task by name. ConfigError, in one sentence, if that cannot work.

    ``difficulty`` (1 to 5, default 2) is for built-in tasks. Columns default to ``question`` and ``answer``;
    rows become demonstrations only if ``trace_column`` is given. ``dataset_split`` defaults to ``train``.
    """
    check_task(**locals())
    if name in TASKS:
        generate, level = TASKS[name], difficulty or DEFAULT_DIFFICULTY

        def draw(rng: Random) -> tuple[str, str, dict]:
            question, _, answer = generate(rng, level, variant=rng.randrange(12))  # 2, 3, 4 divide 12
            return question, answer, {}

        worked = _worked_examples(generate, level)
        # All of them stay out of training, so that the stream is the same for any number shown.
        reserved = frozenset(normalise_question(demonstration.question) for demonstration in worked)
        source = _Stream(name, draw, reserved)
        shown = tuple(worked[:demonstrations])
        return Task(name, shown, source, lambda text, example: match_answer(text, example.answer))
    if name.startswith("reasoning_gym/"):
        return _gym_task(name)
    question, answer = question_column or "question", answer_column or "answer"
    if name.startswith("hf/"):
        found, rows = _read_hub(name, dataset_config, dataset_split)
    else:
        found, rows = _read_file(Path(name))
    _check_columns(name, found, (question, answer, trace_column))
    return _row_task(name, rows, question, answer, trace_column, demonstrations)
