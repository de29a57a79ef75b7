"""Tasks: where questions, reference answers and worked examples come from. No torch.

A task is a built-in generator (``TASKS``), ``reasoning_gym/NAME``, ``hf/OWNER/NAME``, a name in ``presets``, or the
path of a .jsonl, .json, .csv or .parquet file. Training and held-out questions are disjoint by construction: a hash of
the question's words alone decides its side, so no seed, order or file edit can move a question across.
"""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, fields, replace
from functools import lru_cache
from pathlib import Path
from random import Random
from typing import Any

from ..config import RunConfig
from ..types import ConfigError, Demonstration, Example, did_you_mean
from .answers import gym_scorer, match_answer, match_benchmark
from .builtin_tasks import RANGES, TASKS
from .presets import PRESETS, Preset, find_preset
from .rows import FILE_SUFFIXES, BadRow, cell, check_columns, lookup, read_file, read_hub, to_question

HELD_OUT_EVERY = 5  # one question in five is held out
MAX_DEMONSTRATIONS = 8
DEFAULT_DIFFICULTY = 2
MAX_DRAWS = 1000  # in a row, until a generator counts as exhausted


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

    def without(self, questions: frozenset[str]) -> _Stream:
        return replace(self, reserved=self.reserved | questions)

    def held_out(self, count: int | None) -> list[Example]:
        if count is None:
            raise ConfigError(f"task {self.name!r} has no end, so eval_questions must be a number")
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

    def without(self, questions: frozenset[str]) -> _Rows:
        kept = [example for example in self.train_examples if _asked(example) not in questions]
        return replace(self, train_examples=tuple(kept))

    def held_out(self, count: int | None) -> list[Example]:
        if count is not None and count > len(self.held_out_examples):
            raise ConfigError(
                f"data set {self.name!r} has {len(self.held_out_examples)} held-out questions (a fifth), "
                f"not {count}; ask for fewer or add rows"
            )
        return list(self.held_out_examples[:count])


def _asked(example: Example) -> str:
    """A question as its source asks it, normalised: without the options that a preset adds."""
    return normalise_question(example.metadata.get("asked", example.question))


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
    bad_rows: dict[int, str] = field(default_factory=dict)  # row number -> why it was skipped

    def train(self, start: int, count: int, seed: int = 0) -> list[Example]:
        """Examples start .. start+count-1 of the endless training stream, a pure function of its arguments.

        A finite data set is permuted anew in each epoch. Generators may repeat a question.
        """
        return self._source.train(start, count, seed)

    def held_out(self, count: int | None) -> list[Example]:
        """The first ``count`` held-out examples, all different; None: all. ConfigError if there are fewer."""
        return self._source.held_out(count)

    def whole(self, count: int | None, held_out: bool = False) -> list[Example]:
        """All of a finite data set, or all that is held out, in an order that no seed changes.

        Of a generator, ``count`` held-out examples.
        """
        if not self.rows():
            return self.held_out(count)
        return self.held_out(None) if held_out else sorted(self.rows(), key=lambda e: _digest(e.question))

    def without(self, questions: Sequence[Example]) -> Task:
        """The same task without these questions in training."""
        asked = frozenset(map(_asked, questions))
        return replace(self, _source=self._source.without(asked)) if asked else self

    def without_rows(self, bad: dict[int, str]) -> Task:
        """The same task without these rows of a finite data set; ``bad_rows`` keeps the reasons."""
        if not bad:
            return self
        parts = ("train_examples", "held_out_examples")
        kept = {p: tuple(e for e in getattr(self._source, p) if e.metadata["row"] not in bad) for p in parts}
        return replace(self, _source=replace(self._source, **kept), bad_rows=self.bad_rows | bad)

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


def _row_task(name: str, rows: Iterable[dict], preset: Preset, shown: int, skip: bool) -> Task:
    """Split rows by the hash of their question; the first ``shown`` traced training rows are examples.

    ``skip``: bad rows are left out and counted; otherwise they are a ConfigError.
    """
    seen: set[str] = set()
    bad: dict[int, str] = {}
    train, held_out, demonstrations = [], [], []
    for number, row in enumerate(rows, start=1):
        place = f"row {number} of {name!r}"
        if any(lookup(row, column) not in values for column, values in preset.keep.items()):
            continue
        if any(lookup(row, column) in values for column, values in preset.drop.items()):
            continue
        try:
            asked, answered, more = to_question(row, preset)
            worked = cell(row, preset.trace)
        except BadRow as bad_row:
            reason, remedy = bad_row.args
            if not skip:
                raise ConfigError(f"{place} {reason}; {remedy}, or set bad_rows='skip'") from None
            bad[number] = reason
            continue
        digest = _digest(asked)
        if digest in seen:
            continue
        seen.add(digest)
        example = Example(f"{Path(name).stem}:{digest[:16]}", asked, answered, {"row": number, **more})
        worked = " ".join(worked.partition("####")[0].split())  # one line, as prompts need it
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
    return Task(name, tuple(demonstrations), source, lambda text, example: match_answer(text, example.answer), bad)


# --- The two entry points.


@dataclass(frozen=True)
class TaskSettings:
    """How a task is read; the fields of the same names of ``RunConfig``.

    ``difficulty`` (1 to 5, None: 2) is for built-in tasks. Columns are for files and hf/ data sets, None for
    ``question`` and ``answer``; rows become demonstrations only if ``trace_column`` is given. ``dataset_config`` and
    ``dataset_split`` (None: ``train``) are for hf/ data sets. ``bad_rows`` "skip" leaves out rows that are no
    question; those of presets always are.
    """

    difficulty: int | None = None
    demonstrations: int = 3
    question_column: str | None = None
    answer_column: str | None = None
    trace_column: str | None = None
    dataset_config: str | None = None
    dataset_split: str | None = None
    bad_rows: str = "refuse"

    @classmethod
    def of(cls, config: RunConfig) -> TaskSettings:
        """What a configuration says about its task."""
        return cls(**{field.name: getattr(config, field.name) for field in fields(cls)})


def _preset(name: str, given: TaskSettings) -> tuple[str, Preset, str | None]:
    """(name, how rows are read, file if it is one) of a preset, a file or an hf/ data set."""
    short, preset, file = find_preset(name)
    if preset:
        return short, preset, file
    columns = (given.question_column or "question", given.answer_column or "answer", given.trace_column)
    own = Preset(name.removeprefix("hf/"), *columns, given.dataset_config, given.dataset_split)
    return name, own, None if name.startswith("hf/") else name


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
    _, preset, file = find_preset(name)
    on_hub, is_file = name.startswith("hf/"), not preset and Path(name).suffix in FILE_SUFFIXES
    if any(columns) and not (on_hub or is_file):
        raise ConfigError(f"columns are for files and hf/ data sets, not {name!r}")
    if (settings.dataset_config or settings.dataset_split) and not on_hub:
        raise ConfigError(f"dataset_config and dataset_split are for hf/ data sets, not {name!r}")

    if name in TASKS or preset and not file:
        return
    if preset or is_file:
        path = Path(file or name)
        if not os.path.isfile(path):
            raise ConfigError(f"data file {str(path)!r} does not exist; check the path")
        if path.suffix not in FILE_SUFFIXES:
            raise ConfigError(f"data file {str(path)!r} must end in one of {', '.join(FILE_SUFFIXES)}")
        check_columns(name, read_file(path, limit=1)[0], _preset(name, settings)[1].columns)
    elif on_hub:
        if not re.fullmatch(r"hf/\w[\w.-]*/\w[\w.-]*", name):
            raise ConfigError(f"Hugging Face task {name!r} must have the form hf/OWNER/NAME")
    elif name.startswith("reasoning_gym/"):
        from reasoning_gym.factory import DATASETS

        short = name.removeprefix("reasoning_gym/")
        if short not in DATASETS:
            raise ConfigError(f"unknown reasoning-gym task {short!r}{did_you_mean(short, DATASETS)}")
    else:
        kinds = [
            *TASKS,
            *PRESETS,
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
    short, preset, file = _preset(name, given)
    found, rows = read_file(Path(file)) if file else read_hub(name, preset)
    check_columns(name, found, preset.columns)
    named = short in PRESETS
    task = _row_task(short, rows, preset, given.demonstrations, named or given.bad_rows == "skip")
    if named:
        return replace(task, _score=lambda text, example: match_benchmark(text, example, preset.tolerance))
    return task
