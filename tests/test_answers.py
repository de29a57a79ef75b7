"""Answers: which predictions count as the reference, and that none takes long or harms."""

import threading

import pytest

from covrl_lab.train.answers import match_answer


@pytest.mark.parametrize(
    ("prediction", "reference", "right"),
    [
        ("68", "68", 1),
        (" 68. ", "68", 1),
        ("68.0", "68", 1),
        ("1,234", "1234", 1),
        ("EN", "en", 1),
        ("$68$", "68", 1),
        (r"\boxed{68}", "68", 1),
        (r"\frac{3}{4}", "0.75", 1),
        ("0.75", r"$\frac{3}{4}$", 1),
        ("1 + x^2", "x^2 + 1", 1),
        ("69", "68", 0),
        ("-5", "5", 0),
        ("", "68", 0),
        ("nan", "68", 0),
        ("ne", "en", 0),
        ("e", "en", 0),
        ("ba12", "ab12", 0),
        ("23 + 45", "68", 0),
        ("136/2", "68", 0),
        ("68 or 69", "68", 0),
        ("I think 68", "68", 0),
        ("12345678901234567891", "12345678901234567890", 0),
        ("9^{9^{9^{9}}}", "68", 0),
        pytest.param("9^{9^{9^{9}}}", "x^2 + 1", 0, marks=pytest.mark.slow),
        ("1 - x^2", "x^2 + 1", 0),
        # A restated question or an expression is no answer, whatever its value.
        ("1/2 + 1/3", "5/6", 0),
        ("5/6 + 0", "5/6", 0),
        ("7+7", "14", 0),
        ("2*7", "14", 0),
        ("sqrt(4)", "2", 0),
        ("2^3", "8", 0),
        (r"\sqrt{2}+\sqrt{2}", r"2\sqrt{2}", 0),
        ("x + 1", "x+1+0", 1),
        # A percentage is worth a hundredth.
        ("50%", "50", 0),
        ("50", "50%", 0),
        ("50%", "0.5", 1),
        (r"50\%", "1/2", 1),
        # Lists keep their order, sets have none.
        ("2,3", "3,2", 0),
        ("2, 3", "2,3", 1),
        ("{2,3}", "{3,2}", 1),
        ("(2,3)", "(3,2)", 0),
        ("1,2", "12", 0),
        # The same number in another dress.
        ("10/12", "5/6", 1),
        (r"\frac56", "5/6", 1),
        ("1 1/2", "3/2", 1),
        ("0.8333", "5/6", 0),
        ("1/0", "1", 0),
        ("14 apples", "14", 1),
        (r"14\text{ cm}", "14", 1),
        ("$14", "14", 1),
        ("x = 5", "5", 1),
        ("\u22125", "-5", 1),
        ("1e3", "1000", 1),
        ("2 or 3", "2", 0),
        ("5 and", "5", 0),
        ("3:4", "3:40", 0),
    ],
)
def test_match_answer(prediction, reference, right):
    assert match_answer(prediction, reference) == right
    results = []
    thread = threading.Thread(target=lambda: results.append(match_answer(prediction, reference)))
    thread.start()
    thread.join(10)
    assert results == [right]
