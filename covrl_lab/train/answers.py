"""How right an answer is: comparison with the reference answer, and guards around other packages' scorers."""

from __future__ import annotations

import re
import threading
from collections.abc import Callable
from decimal import Decimal, DecimalException
from typing import Any

from ..types import Example


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


# --- reasoning-gym's scorers

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


def gym_scorer(dataset: Any, name: str) -> Callable[[str, Example], float]:
    """The scorer of the reasoning-gym data set ``name``: 0..1, and 0 for text that is unsafe to evaluate."""

    def score(prediction: str, example: Example) -> float:
        prediction = prediction.strip()
        if not prediction or not _harmless(name, prediction):
            return 0.0
        entry = {"question": example.question, "answer": example.answer, "metadata": example.metadata}
        try:
            return min(1.0, max(0.0, float(dataset.score_answer(prediction, entry))))
        except Exception:  # a scorer that trips over a malformed answer has found a wrong one
            return 0.0

    return score
