"""Tasks: where questions, reference answers and worked examples come from. No torch.

A task is a built-in generator (``TASKS``), ``reasoning_gym/NAME``, ``hf/OWNER/NAME``, or the path of a
.jsonl, .json, .csv or .parquet file. Training and held-out questions are disjoint by construction: a hash of
the question's words alone decides its side, so no seed, order or file edit can move a question across.
"""

from __future__ import annotations

import csv
import hashlib
import json
import math
import os
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, fields
from decimal import Decimal
from functools import lru_cache
from itertools import islice
from pathlib import Path
from random import Random
from typing import Any

from ..config import RunConfig
from ..files import readable
from ..types import UNFIT, ConfigError, Demonstration, Example, did_you_mean
from .answers import gym_scorer, match_answer
from .builtin_tasks import RANGES, TASKS

HELD_OUT_EVERY = 5  # one question in five is held out
MAX_DEMONSTRATIONS = 8
DEFAULT_DIFFICULTY = 2
MAX_DRAWS = 1000  # in a row, until a generator counts as exhausted
FILE_SUFFIXES = (".jsonl", ".json", ".csv", ".parquet")


def normalise_question(question: str) -> str:
    """Casefold and collapse white space: texts equal after this are the same question."""
    return " ".join(question.casefold().split())


def _digest(question: str) -> str:
    return hashlib.sha256(normalise_question(question).encode()).hexdigest()


def is_held_out(question: str) -> bool:
    """Whether a question belongs to the held-out fifth.

    Only its words and numbers decide, not their order: "3 + 5" and "5 + 3" are on the same side.
    """
    words = sorted(re.findall(r"\w+", normalise_question(question)))
    return int(hashlib.sha256(" ".join(words).encode()).hexdigest()[:16], 16) % HELD_OUT_EVERY == 0


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
        for attempt in range(MAX_DRAWS):
            example = self._example(f"train/{seed}/{index}/{attempt}")
            if example and not is_held_out(example.question):
                if normalise_question(example.question) not in self.reserved:
                    return example
        raise ConfigError(f"task {self.name!r} gave no training question in {MAX_DRAWS} draws; choose another")

    def held_out(self, count: int) -> list[Example]:
        found: dict[str, Example] = {}
        attempt = last_hit = 0
        while len(found) < count:
            example = self._example(f"held_out/{attempt}")
            if example and is_held_out(example.question) and example.id not in found:
                found[example.id], last_hit = example, attempt
            elif attempt - last_hit > MAX_DRAWS:
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

    def rows(self) -> Sequence[Example]:
        """Every example of a finite data set; none of a generator, which has no end."""
        source = self._source
        return source.train_examples + source.held_out_examples if isinstance(source, _Rows) else ()

    def score(self, prediction: str, example: Example) -> float:
        """How right a predicted answer is, 0..1; 1.0 is right."""
        return self._score(prediction, example)


# --- reasoning-gym.

# These build their rows in advance or cap them; the others make row i on demand, for any i.
_GYM_SIZE = {"acre": 2_000, "gsm_symbolic": 20_000, "list_functions": 20_000, "word_ladder": 20_000}


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
        return (entry["question"], entry["answer"], entry["metadata"]) if (entry["answer"] or "").strip() else None

    return Task(name, (), _Stream(name, draw), gym_scorer(short))


# --- Files and Hugging Face data sets.


def _read_file(path: Path, limit: int | None = None) -> tuple[list[str], Iterable[dict[str, Any]]]:
    """Column names and rows (at most ``limit``) of a data file."""
    what = f"data file {str(path)!r}"
    with readable(what, "mend it"):
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
                lines, rows = ((n, line) for n, line in enumerate(file, start=1) if line.strip()), []
                for number, line in islice(lines, limit):
                    with readable(f"line {number} of {what}", "mend it"):
                        rows.append(json.loads(line))
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
        if found.count(column) > 1:
            raise ConfigError(f"data set {name!r} has two columns {column!r}; rename one")
        if column is not None and column not in found:
            hint = did_you_mean(column, found)
            raise ConfigError(f"data set {name!r} has columns {found} but not {column!r}{hint}")


def _cell(row: dict[str, Any], column: str | None, place: str) -> str:
    """The text of a cell. ConfigError, which gives its place, where it is no text and no finite number."""
    value = row.get(column)
    text = "" if value is None else str(value).strip()
    several = hasattr(value, "__len__") and not isinstance(value, str)
    if several or UNFIT.search(text) or (isinstance(value, float | Decimal) and not math.isfinite(value)):
        raise ConfigError(f"{place} has {value!r:.60} in {column!r}; put text or a finite number there, or remove it")
    return text


def _row_task(name: str, rows: Iterable[dict], question: str, answer: str, trace: str | None, shown: int) -> Task:
    """Split rows by the hash of their question; the first ``shown`` traced training rows are examples.

    Of an answer cell ``working #### answer`` (GSM8K) the end is the answer, the beginning the trace.
    """
    seen: set[str] = set()
    train, held_out, demonstrations = [], [], []
    for number, row in enumerate(rows, start=1):
        place = f"row {number} of {name!r}"
        if None in row:
            raise ConfigError(f"{place} has more cells than there are columns; put quotes around commas")
        asked = _cell(row, question, place)
        answered = _cell(row, answer, place).rpartition("####")[2].strip()
        for column, text in ((question, asked), (answer, answered)):
            if not text:
                raise ConfigError(f"{place} has an empty {column!r}; fill it in or remove it")
        digest = _digest(asked)
        if digest in seen:
            continue
        seen.add(digest)
        example = Example(f"{Path(name).stem}:{digest[:16]}", asked, answered, {"row": number})
        worked = " ".join(_cell(row, trace, place).partition("####")[0].split())  # one line, as prompts need it
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


@dataclass(frozen=True)
class TaskSettings:
    """How a task is read; the fields of the same names of ``RunConfig``.

    ``difficulty`` (1 to 5, None: 2) is for built-in tasks. Columns are for files and hf/ data sets, None for
    ``question`` and ``answer``; rows become demonstrations only if ``trace_column`` is given. ``dataset_config`` and
    ``dataset_split`` (None: ``train``) are for hf/ data sets.
    """

    difficulty: int | None = None
    demonstrations: int = 3
    question_column: str | None = None
    answer_column: str | None = None
    trace_column: str | None = None
    dataset_config: str | None = None
    dataset_split: str | None = None

    @classmethod
    def of(cls, config: RunConfig) -> TaskSettings:
        """What a configuration says about its task."""
        return cls(**{field.name: getattr(config, field.name) for field in fields(cls)})


def check_task(name: str, settings: TaskSettings) -> None:
    """Raise ConfigError if ``load_task`` could not work with these settings; cheap, needs no network."""
    difficulty, demonstrations = settings.difficulty, settings.demonstrations
    if not 0 <= demonstrations <= MAX_DEMONSTRATIONS:
        raise ConfigError(f"demonstrations must be 0 to {MAX_DEMONSTRATIONS}, not {demonstrations}")
    if difficulty is not None and name not in TASKS:
        raise ConfigError(f"difficulty is for built-in tasks ({', '.join(TASKS)}), not {name!r}")
    if difficulty is not None and difficulty not in RANGES:
        raise ConfigError(f"difficulty must be a whole number from 1 to {max(RANGES)}, not {difficulty!r}")
    columns = (settings.question_column, settings.answer_column, settings.trace_column)
    on_hub, is_file = name.startswith("hf/"), Path(name).suffix in FILE_SUFFIXES
    if any(columns) and not (on_hub or is_file):
        raise ConfigError(f"columns are for files and hf/ data sets, not {name!r}")
    if (settings.dataset_config or settings.dataset_split) and not on_hub:
        raise ConfigError(f"dataset_config and dataset_split are for hf/ data sets, not {name!r}")

    if name in TASKS:
        return
    if on_hub:
        if not re.fullmatch(r"hf/\w[\w.-]*/\w[\w.-]*", name):
            raise ConfigError(f"Hugging Face task {name!r} must have the form hf/OWNER/NAME")
    elif name.startswith("reasoning_gym/"):
        from reasoning_gym.factory import DATASETS

        short = name.removeprefix("reasoning_gym/")
        if short not in DATASETS:
            raise ConfigError(f"unknown reasoning-gym task {short!r}{did_you_mean(short, DATASETS)}")
    elif is_file:
        if not os.path.isfile(name):
            raise ConfigError(f"data file {name!r} does not exist; check the path")
        found, _ = _read_file(Path(name), limit=1)
        _check_columns(name, found, (columns[0] or "question", columns[1] or "answer", columns[2]))
    else:
        kinds = [
            *TASKS,
            "reasoning_gym/NAME",
            "hf/OWNER/NAME",
            *(f"FILE{suffix}" for suffix in FILE_SUFFIXES),
        ]
        raise ConfigError(f"unknown task {name!r}{did_you_mean(name, kinds)}")


def load_task(name: str, **settings: Any) -> Task:
    """Load a task by name, with the keywords of ``TaskSettings``. ConfigError, in one sentence, if that cannot work."""
    given = TaskSettings(**settings)
    check_task(name, given)
    if name in TASKS:
        generate, level = TASKS[name], given.difficulty or DEFAULT_DIFFICULTY

        def draw(rng: Random) -> tuple[str, str, dict]:
            question, _, answer = generate(rng, level, variant=rng.randrange(12))  # 2, 3, 4 divide 12
            return question, answer, {}

        worked = _worked_examples(generate, level)
        # All of them stay out of training, so that the stream is the same for any number shown.
        reserved = frozenset(normalise_question(demonstration.question) for demonstration in worked)
        source = _Stream(name, draw, reserved)
        shown = tuple(worked[: given.demonstrations])
        return Task(name, shown, source, lambda text, example: match_answer(text, example.answer))
    if name.startswith("reasoning_gym/"):
        return _gym_task(name)
    question, answer = given.question_column or "question", given.answer_column or "answer"
    if name.startswith("hf/"):
        found, rows = _read_hub(name, given.dataset_config, given.dataset_split)
    else:
        found, rows = _read_file(Path(name))
    _check_columns(name, found, (question, answer, given.trace_column))
    return _row_task(name, rows, question, answer, given.trace_column, given.demonstrations)
