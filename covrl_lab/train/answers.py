"""How right an answer is: comparison with the reference, or another package's scorer. No torch."""

import re
from collections.abc import Sequence
from contextlib import suppress
from fractions import Fraction

from ..types import Example
from .scorer import scorer

_NUMBER = r"(?:\d{1,3}(?:,\d{3})+|\d+)(?:\.\d*)?(?:e[-+]?\d{1,3})?|\.\d+(?:e[-+]?\d{1,3})?"
_SIGNED = rf"([-+]?)\s*({_NUMBER})"
_LATEX_FRACTION = r"([-+]?)\s*\\[dt]?frac\s*\{?\s*(\d+)\s*\}?\s*\{?\s*(\d+)\s*\}?"
_UNIT = r"(?:\s*(?!or\b|and\b|not\b)[a-z°²³]+(?:/[a-z]+)?\.?){0,3}"


def match_answer(prediction: str, reference: str) -> float:
    """1.0 for the same text, value or formula, else 0.0.

    Where the reference is a number the prediction must be one, too: a decimal, a fraction, a mixed number or a
    percentage, with at most a name before ("x = 5") and a unit behind it. A sum or a product is no answer, even where
    its value is right, nor is a fraction where a whole number is asked for. Lists keep their order, sets do not.
    """
    prediction, reference = _normalise(prediction), _normalise(reference)
    if not prediction or not reference:
        return 0.0
    if prediction == reference:
        return 1.0
    value = _value(reference)
    if value is None:
        return float(_same_list(prediction, reference) or _same_formula(prediction, reference))
    fraction = value.denominator == 1 and re.search(r"/|frac", prediction) is not None
    return float(not fraction and _value(prediction) == value)


def _normalise(text: str) -> str:
    """Case, white space, a final full stop, and the wrappers $...$, \\(...\\) and \\boxed{...} do not matter."""
    text = " ".join(text.casefold().split()).rstrip(".").rstrip()
    while True:
        inner = re.fullmatch(r"\$+([^$]+)\$+|\\\((.+)\\\)|\\boxed\s*\{(.+)\}", text)
        if not inner:
            return text
        text = next(group for group in inner.groups() if group is not None).strip()


def _value(text: str) -> Fraction | None:
    """The number that a normalised text states, or None where it states none, or more than one."""
    if len(text) > 400:  # no number, and Python refuses to read longer ones
        return None
    text = re.sub(r"\\(?:text|mathrm|mbox)\s*\{([^{}]*)\}", r" \1", text).replace("\\,", "").replace("\\ ", " ")
    text = re.sub(r"^[a-z]\w?\s*=\s*", "", text.replace("−", "-").replace("\\%", "%")).strip()
    text = re.sub(r"^([-+]?)[$€£]", r"\1", text)
    percent = re.fullmatch(r"(.*\S)\s*(?:%|percent)", text)
    text, scale = (percent.group(1), Fraction(1, 100)) if percent else (text, Fraction(1))
    unit = "" if percent else _UNIT
    for pattern, read in (
        (rf"{_SIGNED}{unit}", lambda s, n: (s, Fraction(n.replace(",", "")))),
        (rf"([-+]?)\s*(\d+)\s*/\s*(\d+){unit}", lambda s, n, d: (s, Fraction(int(n), int(d)))),
        (rf"{_LATEX_FRACTION}{unit}", lambda s, n, d: (s, Fraction(int(n), int(d)))),
        (rf"([-+]?)\s*(\d+) (\d+)\s*/\s*(\d+){unit}", lambda s, w, n, d: (s, int(w) + Fraction(int(n), int(d)))),
    ):
        if (found := re.fullmatch(pattern, text)) is not None:
            with suppress(ZeroDivisionError):
                sign, number = read(*found.groups())
                return scale * (-number if sign == "-" else number)
    return None


def _same_list(prediction: str, reference: str) -> bool:
    """Lists of numbers in the same order; sets in braces in any order."""
    shape = r"(\\?\{|\(|\[|)([^{}()\[\]]*,[^{}()\[\]]*?)(\\?\}|\)|\]|)"
    found = [re.fullmatch(shape, text) for text in (prediction, reference)]
    if not all(found):
        return False
    values = [[_value(part.strip()) for part in match.group(2).split(",")] for match in found]
    ours, theirs = ("{" in match.group(1) for match in found)
    if any(None in part for part in values) or ours != theirs:
        return False
    return sorted(values[0]) == sorted(values[1]) if ours else values[0] == values[1]


def _operations(text: str) -> int:
    """How many sums, products and quotients a formula writes out; a leading sign is none."""
    return len(re.findall(r"(?<=[\w)}\]])\s*(?:[-+*/]|\\cdot|\\times|\\div)", text))


def _same_formula(prediction: str, reference: str) -> bool:
    """Compare by math_verify, which reads LaTeX and evaluates, in the scorer's process; the rest is no answer."""
    if len(prediction) > 200 or _operations(prediction) > _operations(reference):
        return False  # the work, not the answer
    if prediction.count(",") or reference.count(","):
        return False  # lists are compared above; math_verify takes them for sets
    if not re.search(r"[\d\\^+=$]", reference) or re.search(r"(?<![\\a-z])[a-z]{2,}", reference):
        return False  # words: as formulas, "en" and "ne" would be the same product
    return scorer("math_verify", prediction, {"answer": reference}) == 1.0


# --- benchmarks: the answer is looked for in what the model wrote, and LaTeX has many spellings

LETTERS = "ABCDEFGHIJ"
_LEAD = r"^(?:(?:so|thus|hence|therefore),?\s+)?(?:the\s+|my\s+)?(?:final\s+|correct\s+)?answer\s*(?:is\s*:?|[:=])\s*"
_LOOKS = (
    (r"\\(?:left|right)(?![a-z])|\\!|\\\$|(?<=\d)\{,\}(?=\d{3})|\s*\^\s*\{?\s*\\circ\s*\}?", ""),
    (r"\\(?:text|textbf|mathrm|mathbf|mbox)\s*\{([^{}]*)\}(?:\s*\^\s*\{?\s*[23]\s*\}?)?", r" \1 "),
    (r"\\[dt]frac", r"\\frac"),
    (r"(\d)\s*(?:\\times|\\cdot|×|\*)\s*10\s*\^\s*\{?\s*([-−+]?\d+)\s*\}?", r"\1e\2"),
    (r"^\s*([-+]?)([\w\\ ]+)/([\w\\ ]+)$", r"\1\\frac{\2}{\3}"),  # \pi/2 is no more work than \frac{\pi}{2}
)


def match_benchmark(prediction: str, example: Example, tolerance: float = 0.0) -> float:
    """1.0 where the answer of a benchmark's question is right, else 0.0.

    What counts is the answer that the text states: in a box, after "the answer is", or as the whole text. Of a choice,
    its letter or its words count, and both only if they agree. Otherwise ``match_answer`` decides, also part by part
    in lists; ``tolerance``, relative, is for references with a decimal point or an exponent.
    """
    if options := example.metadata.get("options"):
        return float(_choose(_stated(prediction), options) == example.answer)
    return float(_same(_stated(prediction), example.answer, tolerance))


def vote(prediction: str, example: Example) -> str:
    """What answers have in common that count as the same in a majority vote; "" where none is stated."""
    if options := example.metadata.get("options"):
        return _choose(_stated(prediction), options) or ""
    text = _plain(_stated(prediction))
    value = _value(text)
    return re.sub(r"\s", "", text) if value is None else str(value)


def _stated(text: str) -> str:
    """The final answer that a text states, without end-of-turn tokens, "the answer is", bold type or a box."""
    text = re.sub(r"<\|[^|<>]*\|>|</s>", "", text).strip()
    if len(boxed := set(boxes(text))) == 1:
        return boxed.pop()
    return re.sub(_LEAD, "", re.sub(r"\*\*(.+?)\*\*", r"\1", text, flags=re.S), flags=re.I).strip()


def boxes(text: str) -> list[str]:
    """What stands in each ``\\boxed{...}`` of a text."""
    return [_parts(text[found.end() :], "")[0] for found in re.finditer(r"\\boxed\s*\{", text)]


def _plain(text: str) -> str:
    """Normalised text without what only changes how LaTeX looks."""
    for pattern, plain in _LOOKS:
        text = re.sub(pattern, plain, text)
    return _normalise(text)


def _parts(text: str, ends: str) -> list[str]:
    """Up to a bracket that closes what was opened before the text, the parts between those of ``ends`` outside any."""
    parts, depth = [""], 0
    for character in text:
        depth += {"(": 1, "[": 1, "{": 1, ")": -1, "]": -1, "}": -1}.get(character, 0)
        if depth < 0:
            break
        if character in ends and not depth:
            parts.append("")
        else:
            parts[-1] += character
    return [part.strip() for part in parts]


def _same(prediction: str, reference: str, tolerance: float = 0.0) -> bool:
    ours, theirs = _plain(prediction), _plain(reference)
    if not ours or not theirs:
        return False
    value, wanted = _value(ours), _value(theirs)
    if None not in (value, wanted) and tolerance and re.search(r"\d\.\d|\de[-+]?\d", theirs):
        return abs(value - wanted) <= Fraction(tolerance) * abs(wanted)
    lists = [re.fullmatch(r"([(\[]?)(.*,.*?)([)\]]?)", text) for text in (ours, theirs)]
    if all(lists):
        pairs = [_parts(found.group(2), ",") for found in lists]
        if len(pairs[0]) == len(pairs[1]) > 1:
            same = (_same(*pair, tolerance) for pair in zip(*pairs, strict=True))
            return lists[0].group(1, 3) == lists[1].group(1, 3) and all(same)
    return re.sub(r"\s", "", ours) == re.sub(r"\s", "", theirs) or match_answer(ours, theirs) == 1.0


def _choose(text: str, options: Sequence[str]) -> str | None:
    """The letter of the option that a text names: by letter, by words, or by both where they agree."""
    named, letters = re.sub(r"^\$+|\$+$|\.$", "", _plain(text)).strip(), LETTERS[: len(options)]
    pattern = rf"(?:(?:option|choice|answer)\s+)?(?:\(\s*([{letters}])\s*\)|([{letters}])(?:[).:]|\s*$))\s*(.*)"
    if found := re.fullmatch(pattern, named, flags=re.I | re.S):
        letter = (found.group(1) or found.group(2)).upper()
        return letter if not found.group(3) or _same(found.group(3), options[LETTERS.index(letter)]) else None
    hits = [letter for letter, option in zip(letters, options, strict=True) if _same(named, option)]
    return hits[0] if len(hits) == 1 else None


# --- reasoning-gym's scorers

# Scorers that hand the answer to eval, or to sympy.parse_expr, which evals.
_GYM_EVAL = "string_insertion spiral_matrix binary_matrix n_queens".split()
_GYM_SYMPY = "simple_integration intermediate_integration polynomial_multiplication puzzle24 countdown".split()
_FUNCTIONS = set("sin cos tan asin acos atan sinh cosh tanh exp log sqrt pi Abs Integral".split())


def _harmless(name: str, prediction: str) -> bool:
    """Whether a scorer may evaluate a model's text: no unknown calls, strings or attributes."""
    if name in _GYM_EVAL:
        return not re.search(r"[(*]", prediction)
    if name in _GYM_SYMPY:
        words = set(re.findall(r"[A-Za-z]\w+", prediction))
        odd = re.search(r"""["'_!\[{:;\\]|\.\s*[A-Za-z]""", prediction)
        return prediction.isascii() and not odd and words <= _FUNCTIONS and len(prediction) <= 500
    return True


def match_gym(name: str, prediction: str, example: Example) -> float:
    """The score, 0..1, by the scorer of the reasoning-gym data set ``name``; 0 for text that is no data."""
    prediction = prediction.strip()
    if not prediction or not _harmless(name, prediction):
        return 0.0
    entry = {"question": example.question, "answer": example.answer, "metadata": example.metadata}
    return scorer(name, prediction, entry)
