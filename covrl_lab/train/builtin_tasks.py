"""Built-in tasks: generators of questions with a worked trace and an answer.

Each maps (rng, level 1..5, variant >= 0) to question, trace, answer. The variant picks the kind of question
(sign, position, story), so that demonstrations can go through the kinds in turn.
"""

from collections.abc import Callable
from random import Random

# Smallest and largest number by level, inclusive.
RANGES = {1: (1, 9), 2: (10, 60), 3: (10, 99), 4: (100, 999), 5: (1000, 9999)}
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
    a, b = rng.randint(*RANGES[level]), rng.randint(*RANGES[level])
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
    low, high = RANGES[level]
    *rest, largest = sorted(rng.sample(range(low, high + 1), 3))
    rng.shuffle(rest)
    numbers = list(rest)
    numbers.insert(variant % 3, largest)
    question = "Which number is the largest: {}, {} or {}?".format(*numbers)
    return question, f"{largest} is larger than {rest[0]} and {rest[1]}.", str(largest)


def _two_steps(rng: Random, level: int, signs: str) -> tuple[tuple[int, int, int], str, str]:
    """Three numbers of the level, the trace of joining them by two signs, and the result >= 0."""
    while True:
        a, b, c = (rng.randint(*RANGES[level]) for _ in range(3))
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
