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
        ("9^{9^{9^{9}}}", "x^2 + 1", 0),
        ("1 - x^2", "x^2 + 1", 0),
    ],
)
def test_match_answer(prediction, reference, right):
    assert match_answer(prediction, reference) == right
    results = []
    thread = threading.Thread(target=lambda: results.append(match_answer(prediction, reference)))
    thread.start()
    thread.join(10)
    assert results == [right]
