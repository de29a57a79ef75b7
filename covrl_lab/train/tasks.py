"""Tasks: where questions, reference answers and worked examples come from. No torch.

A task is a built-in generator (``TASKS``), ``reasoning_gym/NAME``, ``hf/OWNER/NAME``, a name in ``presets``, or the
path of a file (``FILE_SUFFIXES``). Training and held-out questions are disjoint by construction: a hash of the
question's words alone decides its side, so no seed, order or file edit can move a question across.
"""

import hashlib
import itertools
import os
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache, partial
from pathlib import Path
from random import Random
from typing import Any, Self

from ..config import RunConfig
from ..types import ConfigError, Demonstration, Example, did_you_mean
from .answers import match_answer, match_benchmark, match_gym
from .builtin_tasks import RANGES, TASKS
from .presets import PRESETS, Preset
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


def _asked(example: Example) -> str:
    """A question as its source asks it, normalised: without the options that a preset adds."""
    return normalise_question(example.metadata.get("asked", example.question))


@dataclass(frozen=True, kw_only=True)
class Task:
    """Questions with reference answers, worked examples and a scorer; made by ``load_task``."""

    name: str
    demonstrations: tuple[Demonstration, ...] = ()
    score: Callable[[str, Example], float]  # how right a predicted answer is, 0..1; 1.0 is right
    bad_rows: dict[int, str] = field(default_factory=dict)  # row number -> why it was skipped

    def train(self, start: int, count: int, seed: int = 0) -> list[Example]:
        """Examples start .. start+count-1 of the endless training stream, a pure function of its arguments.

        A finite data set is permuted anew in each epoch. Generators may repeat a question.
        """
        raise NotImplementedError

    def held_out(self, count: int | None) -> list[Example]:
        """The first ``count`` held-out examples, all different; None: all. ConfigError if there are fewer."""
        raise NotImplementedError

    def without(self, questions: Sequence[Example]) -> Self:
        """The same task without these questions in training."""
        raise NotImplementedError

    def rows(self) -> Sequence[Example]:
        """Every example of a finite data set; none of a generator, which has no end."""
        return ()

    def whole(self, count: int | None, held_out: bool = False) -> list[Example]:
        """All of a finite data set, or all that is held out, in an order that no seed changes.

        Of a generator, ``count`` held-out examples.
        """
        if not self.rows():
            return self.held_out(count)
        return self.held_out(None) if held_out else sorted(self.rows(), key=lambda e: _digest(e.question))


@dataclass(frozen=True, kw_only=True)
class _Stream(Task):
    """Questions made by ``draw(rng) -> (question, answer, metadata)``, or None for a draw to skip."""

    draw: Callable[[Random], tuple[str, str, dict] | None]
    reserved: frozenset[str] = frozenset()  # normalised questions that are not trained on

    def _example(self, key: str) -> Example | None:
        drawn = self.draw(Random(key))
        return drawn and Example(f"{self.name}:{_digest(drawn[0])[:16]}", *drawn)

    def train(self, start: int, count: int, seed: int = 0) -> list[Example]:
        return [self._train_one(index, seed) for index in range(start, start + count)]

    def _train_one(self, index: int, seed: int) -> Example:
        for attempt in range(MAX_DRAWS):
            example = self._example(f"train/{seed}/{index}/{attempt}")
            if example and not is_held_out(example.question):
                if normalise_question(example.question) not in self.reserved:
                    return example
        raise ConfigError(f"task {self.name!r} gave no training question in {MAX_DRAWS} draws; choose another")

    def without(self, questions: Sequence[Example]) -> Self:
        return replace(self, reserved=self.reserved.union(map(_asked, questions)))

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
                problem = f"task {self.name!r} has about {len(found)} different held-out questions, not {count}"
                raise ConfigError(f"{problem}; lower eval_questions or raise the difficulty")
            attempt += 1
        return list(found.values())


@dataclass(frozen=True, kw_only=True)
class _Rows(Task):
    """A finite data set, already split."""

    train_examples: tuple[Example, ...]
    held_out_examples: tuple[Example, ...]

    def train(self, start: int, count: int, seed: int = 0) -> list[Example]:
        size = len(self.train_examples)
        if not size:
            raise ConfigError(f"data set {self.name!r} has no row left to train on; add rows")
        places = (divmod(index, size) for index in range(start, start + count))
        return [self.train_examples[_epoch_order(size, seed, epoch)[place]] for epoch, place in places]

    def without(self, questions: Sequence[Example]) -> Self:
        asked = set(map(_asked, questions))
        return replace(self, train_examples=tuple(e for e in self.train_examples if _asked(e) not in asked))

    def held_out(self, count: int | None) -> list[Example]:
        if count is not None and count > (there := len(self.held_out_examples)):
            problem = f"data set {self.name!r} has {there} held-out questions (a fifth), not {count}"
            raise ConfigError(f"{problem}; {f'set eval_questions to {there}, or ' if there else ''}add rows")
        return list(self.held_out_examples[:count])

    def rows(self) -> Sequence[Example]:
        return self.train_examples + self.held_out_examples

    def without_rows(self, bad: dict[int, str]) -> Self:
        """The same task without these rows; ``bad_rows`` keeps the reasons."""
        parts = ("train_examples", "held_out_examples")
        kept = {p: tuple(e for e in getattr(self, p) if e.metadata["row"] not in bad) for p in parts}
        return replace(self, **kept, bad_rows=self.bad_rows | bad)


@lru_cache(maxsize=8)
def _epoch_order(size: int, seed: int, epoch: int) -> list[int]:
    return Random(f"epoch/{seed}/{epoch}").sample(range(size), size)


# --- built-in tasks and reasoning-gym


def _built_in_task(name: str, level: int, shown: int) -> Task:
    """Its fixed demonstrations are all from the training side of the hash."""
    generate, worked = TASKS[name], {}
    for attempt in itertools.count():
        if len(worked) == MAX_DEMONSTRATIONS:
            break
        question, trace, answer = generate(Random(f"demonstration/{attempt}"), level, variant=len(worked))
        if not is_held_out(question):
            worked.setdefault(normalise_question(question), Demonstration(question, trace, answer))

    def draw(rng: Random) -> tuple[str, str, dict]:
        question, _, answer = generate(rng, level, variant=rng.randrange(12))  # 2, 3, 4 divide 12
        return question, answer, {}

    # All of them stay out of training, so that the stream is the same for any number shown.
    demonstrations = tuple(worked.values())[:shown]
    return _Stream(name=name, demonstrations=demonstrations, score=_matches, draw=draw, reserved=frozenset(worked))


def _matches(prediction: str, example: Example) -> float:
    return match_answer(prediction, example.answer)


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

    return _Stream(name=name, score=partial(match_gym, short), draw=draw)


# --- files and Hugging Face data sets


def _row_task(name: str, rows: Iterable[dict], preset: Preset, shown: int, skip: bool) -> Task:
    """Split rows by the hash of their question; the first ``shown`` traced training rows are examples."""
    seen: set[str] = set()
    bad: dict[int, str] = {}
    train, held_out, demonstrations = [], [], []
    for number, row in enumerate(rows, start=1):
        kept = all(lookup(row, column) in values for column, values in preset.keep.items())
        if not kept or any(lookup(row, column) in values for column, values in preset.drop.items()):
            continue
        try:
            asked, answered, more = to_question(row, preset)
            worked = cell(row, preset.trace)
        except BadRow as bad_row:
            reason, remedy = bad_row.args
            if not skip:
                raise ConfigError(f"row {number} of {name!r} {reason}; {remedy}, or set bad_rows='skip'") from None
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
    if preset.trace and shown and not demonstrations:
        problem = f"no training row of {name!r} has a worked example in {preset.trace!r}"
        raise ConfigError(f"{problem}; fill in a few, or leave trace_column out")
    held_out.sort(key=lambda example: _digest(example.question))  # files may be sorted by topic
    score = partial(match_benchmark, tolerance=preset.tolerance) if name in PRESETS else _matches
    parts = {"train_examples": tuple(train), "held_out_examples": tuple(held_out)}
    return _Rows(name=name, demonstrations=tuple(demonstrations), score=score, bad_rows=bad, **parts)


# --- the two entry points


def _preset(given: RunConfig) -> tuple[str, Preset, str | None]:
    """(name, how rows are read, file if it is one) of a preset, a file or an hf/ data set."""
    name, (short, _, file) = given.task, given.task.partition("@")
    if short in PRESETS:
        return short, PRESETS[short], file or None
    columns = (given.question_column or "question", given.answer_column or "answer", given.trace_column)
    own = Preset(name.removeprefix("hf/"), *columns, given.dataset_config, given.dataset_split)
    return name, own, None if name.startswith("hf/") else name


def is_rows(name: str) -> bool:
    """Whether a task is a file or a data set whose columns can be chosen."""
    is_file = Path(name).suffix in FILE_SUFFIXES or os.path.isfile(name)
    return name.startswith("hf/") or (is_file and name.partition("@")[0] not in PRESETS)


def eval_config(config: RunConfig, name: str) -> RunConfig:
    """The configuration of a set that is evaluated beside the task.

    A data set has the task's columns, and so has a file that holds them; other files have the usual ones.
    """
    columns = {c: getattr(config, c) for c in ("question_column", "answer_column")} if is_rows(name) else {}
    read = {column.split(".")[0] for column in columns.values() if column}
    if read and os.path.isfile(name) and not read <= set(read_file(Path(name), limit=1)[0]):
        columns = {}
    return RunConfig(task=name, demonstrations=0, bad_rows=config.bad_rows, **columns)


def check_task(config: RunConfig) -> None:
    """Raise ConfigError if ``load_task`` could not load a configuration's task; cheap, needs no network."""
    name, difficulty, demonstrations = config.task, config.difficulty, config.demonstrations
    if not 0 <= demonstrations <= MAX_DEMONSTRATIONS:
        raise ConfigError(f"demonstrations must be 0 to {MAX_DEMONSTRATIONS}, not {demonstrations}")
    if difficulty is not None and name not in TASKS:
        raise ConfigError(f"difficulty is for built-in tasks ({', '.join(TASKS)}), not {name!r}")
    if difficulty is not None and difficulty not in RANGES:
        raise ConfigError(f"difficulty must be a whole number from 1 to {max(RANGES)}, not {difficulty!r}")
    columns = (config.question_column, config.answer_column, config.trace_column)
    short, _, file = name.partition("@")
    preset, on_hub = short in PRESETS, name.startswith("hf/")
    own = is_rows(name)
    if any(columns) and not own:
        raise ConfigError(f"columns are for files and hf/ data sets, not {name!r}")
    if (config.dataset_config or config.dataset_split) and not on_hub:
        raise ConfigError(f"dataset_config and dataset_split are for hf/ data sets, not {name!r}")

    if name in TASKS or preset and not file:
        return
    if preset or (own and not on_hub):
        path = Path(file if preset else name)
        if not os.path.isfile(path):
            raise ConfigError(f"data file {str(path)!r} does not exist; check the path")
        if path.suffix not in FILE_SUFFIXES:
            raise ConfigError(f"data file {str(path)!r} must end in one of {', '.join(FILE_SUFFIXES)}")
        check_columns(name, read_file(path, limit=1)[0], _preset(config)[1], own)
    elif on_hub:
        if not re.fullmatch(r"hf/\w[\w.-]*/\w[\w.-]*", name):
            raise ConfigError(f"Hugging Face task {name!r} must have the form hf/OWNER/NAME")
    elif name.startswith("reasoning_gym/"):
        try:
            from reasoning_gym.factory import DATASETS
        except ImportError as error:
            raise ConfigError(f"{name!r} needs reasoning-gym: pip install reasoning-gym") from error
        short = name.removeprefix("reasoning_gym/")
        if short not in DATASETS:
            raise ConfigError(f"unknown reasoning-gym task {short!r}{did_you_mean(short, DATASETS)}")
    else:
        files = (f"FILE{suffix}" for suffix in FILE_SUFFIXES)
        kinds = [*TASKS, *PRESETS, "reasoning_gym/NAME", "hf/OWNER/NAME", *files]
        raise ConfigError(f"unknown task {name!r}{did_you_mean(name, kinds)}")


def load_task(task: str | RunConfig, **settings: Any) -> Task:
    """Load the task of a configuration, or one by name and with settings of ``RunConfig``. ConfigError if it cannot be.

    Of the settings None stands for a ``difficulty`` of 2, the columns ``question`` and ``answer``, and the split
    ``train``; rows become demonstrations only if ``trace_column`` is given.
    """
    given = task if isinstance(task, RunConfig) else RunConfig(task=task, **settings)
    check_task(given)
    name = given.task
    if name in TASKS:
        return _built_in_task(name, given.difficulty or DEFAULT_DIFFICULTY, given.demonstrations)
    if name.startswith("reasoning_gym/"):
        return _gym_task(name)
    short, preset, file = _preset(given)
    found, rows = read_file(Path(file)) if file else read_hub(name, preset)
    check_columns(name, found, preset, is_rows(name))
    return _row_task(short, rows, preset, given.demonstrations, short in PRESETS or given.bad_rows == "skip")
