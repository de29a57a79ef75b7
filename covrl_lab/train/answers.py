"""How right an answer is: comparison with the reference, or another package's scorer. No torch."""

from __future__ import annotations

import re
from collections.abc import Callable
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
    percentage (worth a hundredth), with at most a name before ("x = 5") and a unit behind it. A sum or a product
    is no answer, even where its value is right, nor is a fraction where a whole number is asked for. Lists keep
    their order; what stands in braces is a set.
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
        (rf"{_SIGNED}{unit}", lambda s, n: (s, _decimal(n))),
        (rf"([-+]?)\s*(\d+)\s*/\s*(\d+){unit}", lambda s, n, d: (s, _ratio(n, d))),
        (rf"{_LATEX_FRACTION}{unit}", lambda s, n, d: (s, _ratio(n, d))),
        (rf"([-+]?)\s*(\d+) (\d+)\s*/\s*(\d+){unit}", lambda s, w, n, d: (s, _mixed(w, n, d))),
    ):
        if (found := re.fullmatch(pattern, text)) is not None:
            sign, number = read(*found.groups())
            return None if number is None else scale * (-number if sign == "-" else number)
    return None


def _decimal(text: str) -> Fraction:
    return Fraction(text.replace(",", ""))


def _ratio(numerator: str, denominator: str) -> Fraction | None:
    return Fraction(int(numerator), int(denominator)) if int(denominator) else None


def _mixed(whole: str, numerator: str, denominator: str) -> Fraction | None:
    part = _ratio(numerator, denominator)
    return None if part is None else int(whole) + part


def _same_list(prediction: str, reference: str) -> bool:
    """Lists of numbers in the same order; sets in braces in any order."""
    shape = r"(\\?\{|\(|\[|)([^{}()\[\]]*,[^{}()\[\]]*?)(\\?\}|\)|\]|)"
    found = [re.fullmatch(shape, text) for text in (prediction, reference)]
    if not all(found):
        return False
    values = [[_value(part.strip()) for part in match.group(2).split(",")] for match in found]
    if any(None in part for part in values):
        return False
    braces = ["{" in match.group(1) for match in found]
    if braces[0] != braces[1]:
        return False
    return sorted(values[0]) == sorted(values[1]) if braces[0] else values[0] == values[1]


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


def gym_scorer(name: str) -> Callable[[str, Example], float]:
    """The scorer of the reasoning-gym data set ``name``: 0..1, and 0 for text that is no data."""

    def score(prediction: str, example: Example) -> float:
        prediction = prediction.strip()
        if not prediction or not _harmless(name, prediction):
            return 0.0
        entry = {"question": example.question, "answer": example.answer, "metadata": example.metadata}
        return scorer(name, prediction, entry)

    return score
