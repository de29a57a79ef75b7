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
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, fields, replace
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor


UNFIT = re.compile("[\0\ud800-\udfff]")  # what no file can hold: NUL, and half a surrogate pair


class ConfigError(ValueError):
    """A setting or an input is wrong; the message says what was wrong and what to do."""

    def _render_traceback_(self) -> list[str]:
        """Notebooks show the sentence alone (a protocol of IPython)."""
        return [f"{type(self).__name__}: {self}"]


class NotFinite(ConfigError):
    """A model's numbers have become NaN or infinite."""


def did_you_mean(name: str, valid: Iterable[str]) -> str:
    """Return ``"; did you mean 'x'?"`` for the nearest valid name, else a list of all (at most 12)."""
    valid = [" ".join(str(v).split())[:80] for v in valid]
    near = difflib.get_close_matches(str(name)[:100], valid, n=1, cutoff=0.6)
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

    @property
    def place(self) -> str:
        """Its id, and its row where it comes from a data set."""
        return f"{self.id}, row {self.metadata['row']}" if "row" in self.metadata else self.id

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


@dataclass(frozen=True)
class Prompt:
    """The token ids around one question's traces; nothing here is ever re-tokenised.

    The prior context is ``prior + trace``, the posterior context ``posterior + trace``, and the answer
    is scored in ``prior + trace + seam + answer``, for traces of either source. ``empty_trace`` ends a trace at
    once; ``answer_core`` says which of the answer's tokens hold its own text, not only its wrapper.
    """

    prior: tuple[int, ...]
    posterior: tuple[int, ...]
    seam: tuple[int, ...]
    answer: tuple[int, ...]
    empty_trace: tuple[int, ...] = ()
    answer_core: tuple[bool, ...] = ()

    def __post_init__(self) -> None:
        if not self.answer:
            raise ConfigError("a prompt has no answer tokens; every question needs a non-empty answer")
        if not self.answer_core:
            object.__setattr__(self, "answer_core", (True,) * len(self.answer))


class _Rows:
    """What the batch types share."""

    def _check(self, **shapes: tuple[int, ...]) -> None:
        """ValueError where a tensor has another shape; None is a tensor that was not asked for."""
        for name, shape in shapes.items():
            tensor = getattr(self, name)
            if tensor is not None and tuple(tensor.shape) != shape:
                raise ValueError(f"{name} has shape {tuple(tensor.shape)}, expected {shape}")

    def _map(self, change: Callable[[Tensor], Tensor]):
        values = {f.name: getattr(self, f.name) for f in fields(self)}
        return replace(self, **{k: change(v) for k, v in values.items() if hasattr(v, "shape")})

    def to(self, device: Any):
        """The same batch with its tensors on ``device``."""
        return self._map(lambda tensor: tensor.to(device))

    def rows(self, index: Any):
        """The rollouts at ``index`` (a slice or a tensor of row numbers)."""
        return self._map(lambda tensor: tensor[index])

    def detach(self):
        """The same numbers, cut from the graph."""
        return self._map(lambda tensor: tensor.detach())


@dataclass(frozen=True)
class TraceBatch(_Rows):
    """The N sampled traces of one step.

    ids              (N, T) int64, token ids as sampled, including the token that ends the trace
    mask             (N, T) bool, True on trace tokens
    from_prior       (N,) bool, True where the prior prompt drew the trace, False for the posterior
    finished         (N,) bool, False where the trace was truncated or ended in a wrong format
    group_size       G, rollouts of each question
    sampler_logprobs (N, T) log-probabilities under the prompt that drew the trace, or None
    verifier_reward  (N,) the task's score of the model's own greedy answer after the trace, or None
    predictions      N texts, these answers, or None
    """

    ids: Tensor
    mask: Tensor
    from_prior: Tensor
    finished: Tensor
    group_size: int
    sampler_logprobs: Tensor | None = None
    verifier_reward: Tensor | None = None
    predictions: tuple[str, ...] | None = None

    def __post_init__(self) -> None:
        n, t = self.mask.shape
        self._check(ids=(n, t), from_prior=(n,), finished=(n,), sampler_logprobs=(n, t), verifier_reward=(n,))
        if self.group_size < 1 or n % self.group_size:
            raise ValueError(f"{n} rollouts do not divide into groups of {self.group_size}")

    def __len__(self) -> int:
        return self.mask.shape[0]

    def rows(self, index: Any) -> TraceBatch:
        """Some of the rollouts, as groups of one and without predictions."""
        return replace(self, group_size=1, predictions=None)._map(lambda tensor: tensor[index])

    def trace(self, i: int) -> list[int]:
        """Token ids of rollout i, without padding."""
        return self.ids[i][self.mask[i]].tolist()


@dataclass(frozen=True)
class LogProbs(_Rows):
    """Log-probabilities of the step's traces and reference answers, in nats; None: not asked for.

    prior        (N, T) log p of the trace under the prior prompt
    posterior    (N, T) log q of the same trace ids under the posterior prompt, or None
    answer       (N, A) log-probability of the reference answer after the trace, in the prior context
    answer_mask  (N, A) bool
    ref_prior    (N, T) log p under the frozen base model, or None
    bare_answer  (N, A) answer right after an empty trace under the frozen base model, or None
    no_trace     (N, A) the same under the current policy, detached, or None
    answer_core  (N, A) bool, the answer's own tokens without its wrapper; None: all of answer_mask
    """

    prior: Tensor
    posterior: Tensor | None
    answer: Tensor
    answer_mask: Tensor
    ref_prior: Tensor | None = None
    bare_answer: Tensor | None = None
    no_trace: Tensor | None = None
    answer_core: Tensor | None = None

    def __post_init__(self) -> None:
        trace, answer = tuple(self.prior.shape), (len(self.prior), self.answer.shape[1])
        self._check(posterior=trace, ref_prior=trace, answer=answer, answer_mask=answer)
        self._check(bare_answer=answer, no_trace=answer, answer_core=answer)


@dataclass(frozen=True)
class Credit(_Rows):
    """What each rollout is worth to the loss; all detached.

    reward         (N,) the method's reward R (nats or probability, see the method)
    advantage      (N,) factor of the trace's policy-gradient term: of log p' where a composite is trained, else log p
    answer_weight  (N,) factor c_y of the answer's log-likelihood term
    method_state   numbers a method carries from step to step (RLPR's running deviation); checkpointed
    posterior_advantage  (N,) factor of log q of the trace, where the posterior is trained on its own; or None
    """

    reward: Tensor
    advantage: Tensor
    answer_weight: Tensor
    method_state: dict[str, float] = field(default_factory=dict)
    posterior_advantage: Tensor | None = None

    def __post_init__(self) -> None:
        n = (len(self.reward),)
        self._check(reward=n, advantage=n, answer_weight=n, posterior_advantage=n)
