"""The data that flows through the library, as frozen dataclasses that check their shapes.

Batch letters, used in every docstring of the library:

    B  questions in a step
    G  rollouts (traces) of one question, its *group*
    N  rollouts in a step, N = B * G; rollout i belongs to question i // G
    T  trace tokens of the longest rollout; shorter rows are padded with exact zeros
    A  answer tokens of the longest answer, likewise

Log-probabilities are in nats, float32 or better, and exactly 0 where the mask is False.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor


class ConfigError(ValueError):
    """A setting or an input is wrong; the message says what was wrong and what to do."""


def did_you_mean(name: str, valid: Iterable[str]) -> str:
    """Return ``"; did you mean 'x'?"`` for the nearest valid name, else a list of all (at most 12)."""
    valid = [str(v) for v in valid]
    near = difflib.get_close_matches(str(name), valid, n=1, cutoff=0.6)
    if near:
        return f"; did you mean {near[0]!r}?"
    shown = ", ".join(sorted(valid)[:12]) + (", ..." if len(valid) > 12 else "")
    return f"; choose one of: {shown}"


@dataclass(frozen=True)
class Example:
    """One question x with its reference answer y.

    ``id`` is stable over runs; ``metadata`` is whatever the task's own scorer needs.
    """

    id: str
    question: str
    answer: str
    metadata: dict[str, Any] = field(default_factory=dict, compare=False)

    def __post_init__(self) -> None:
        if not self.question.strip():
            raise ConfigError(f"example {self.id!r} has an empty question; remove that row")
        if not self.answer.strip():
            raise ConfigError(f"example {self.id!r} has an empty answer; remove that row or fill it in")


@dataclass(frozen=True)
class Demonstration:
    """A worked example (question, trace, answer) shown in few-shot prompts."""

    question: str
    trace: str
    answer: str
