"""A world small enough to enumerate: three tokens, traces of one or three, every logit a free parameter.

Whatever a formula claims about an expectation is computed here as a plain sum in float64, so that the
library's losses, which see one rollout at a time, can be held against it to rounding error.
"""

from itertools import product
from typing import Self

import torch
from torch import Tensor

from ..types import LogProbs, TraceBatch

VOCABULARY = 3
REFERENCE = (0, 2)  # the reference answer's tokens; one-token answers use the first


class World:
    """Tables of logits: p and q for every prefix, and for the answer's tokens after every trace."""

    def __init__(self, length: int, answer_tokens: int = 1, seed: int = 2):
        generator = torch.Generator().manual_seed(seed)

        def table(rows: int) -> Tensor:
            return torch.randn(rows, VOCABULARY, generator=generator, dtype=torch.float64).requires_grad_()

        self.length, self.answer_tokens = length, answer_tokens
        self.traces = torch.tensor(list(product(range(VOCABULARY), repeat=length)))
        self.prior = [table(VOCABULARY**t) for t in range(length)]
        self.posterior = [table(VOCABULARY**t) for t in range(length)]
        self.answer = [table(len(self.traces)) for _ in range(answer_tokens)]

    @classmethod
    def of_reasoning(cls, right: float, posterior: float = 1.0) -> Self:
        """One-token traces of which one leads to the answer; the prior writes it with probability ``right``.

        The answer has probability 0.99 after it and 0.002 after the others. q is proportional to
        p(z|x) p(y|x,z)^posterior: p itself at 0, the true posterior at 1.
        """
        world = cls(1)
        with torch.no_grad():
            world.prior[0].copy_(torch.tensor([[right, (1 - right) / 2, (1 - right) / 2]]).log())
            likely = torch.tensor([0.99, 0.002, 0.002])
            world.answer[0].copy_(torch.stack([likely, (1 - likely) / 2, (1 - likely) / 2], 1).log())
            world.posterior[0].copy_(world.prior[0] + posterior * world.answer_logprobs().T)
        return world

    @property
    def parameters(self) -> list[Tensor]:
        return [*self.prior, *self.posterior, *self.answer]

    def between(self, distance: float, temperature: float = 1.0) -> Self:
        """A copy with posterior logits at prior + ``distance`` (posterior - prior), and a temperature.

        Distance 0 makes q = p, 1 keeps q as it is. The logits of traces, not those of answers, are divided by
        ``temperature``; the copy's parameters are the divided logits.
        """
        if temperature <= 0:
            raise ValueError(f"temperature must be above 0, not {temperature}")
        moved = World(self.length, self.answer_tokens)
        with torch.no_grad():
            values = [p / temperature for p in self.prior]
            values += [(p + distance * (q - p)) / temperature for p, q in zip(self.prior, self.posterior, strict=True)]
            for theirs, value in zip(moved.parameters, values + self.answer, strict=True):
                theirs.copy_(value)
        return moved

    # --- log-probabilities of every trace, (traces, tokens)
    def trace_logprobs(self, tables: list[Tensor]) -> Tensor:
        prefix, columns = torch.zeros(len(self.traces), dtype=torch.long), []
        for t, logits in enumerate(tables):
            columns.append(logits.log_softmax(1)[prefix, self.traces[:, t]])
            prefix = prefix * VOCABULARY + self.traces[:, t]
        return torch.stack(columns, 1)

    def answer_logprobs(self) -> Tensor:
        tokens = zip(self.answer, REFERENCE, strict=False)
        return torch.stack([logits.log_softmax(1)[:, token] for logits, token in tokens], 1)

    # --- probabilities of whole traces, (traces,)
    def prior_probs(self) -> Tensor:
        return self.trace_logprobs(self.prior).exp().prod(1)

    def posterior_probs(self) -> Tensor:
        return self.trace_logprobs(self.posterior).exp().prod(1)

    def composite_probs(self, w: float) -> Tensor:
        """P' = prod_t (w p + (1-w) q), which for T > 1 is not w P + (1-w) Q."""
        p, q = (self.trace_logprobs(tables).exp() for tables in (self.prior, self.posterior))
        return (w * p + (1 - w) * q).prod(1)

    # --- exact quantities, scalars
    def log_evidence(self) -> Tensor:
        """log p(y|x) = log sum_z P(z) p(y|x,z)."""
        return (self.prior_probs() * self.answer_logprobs().sum(1).exp()).sum().log()

    def jensen_bound(self) -> Tensor:
        return (self.prior_probs() * self.answer_logprobs().sum(1)).sum()

    def composite_kl(self, w: float) -> Tensor:
        """KL(P'||P) over whole traces."""
        probs = self.composite_probs(w)
        return (probs * (probs / self.prior_probs()).log()).sum()

    def elbo(self, w: float) -> Tensor:
        return (self.composite_probs(w) * self.answer_logprobs().sum(1)).sum() - self.composite_kl(w)

    def gradient(self, value: Tensor) -> Tensor:
        """Gradient of a scalar by every logit, as one vector."""
        grads = torch.autograd.grad(value, self.parameters, allow_unused=True, retain_graph=True)
        pairs = zip(grads, self.parameters, strict=True)
        return torch.cat([(torch.zeros_like(p) if g is None else g).flatten() for g, p in pairs])

    # --- the library's view: every (source, trace) pair as one rollout, prior-drawn rows first
    def logprobs(self) -> LogProbs:
        prior, posterior = (self.trace_logprobs(tables) for tables in (self.prior, self.posterior))
        prior, posterior, answer = (torch.cat([x, x]) for x in (prior, posterior, self.answer_logprobs()))
        return LogProbs(prior, posterior, answer, torch.ones_like(answer, dtype=torch.bool))

    def batch(self) -> TraceBatch:
        ids = torch.cat([self.traces, self.traces])
        mask, rows = torch.ones_like(ids, dtype=torch.bool), torch.ones(len(ids), dtype=torch.bool)
        return TraceBatch(ids, mask, torch.arange(len(ids)) < len(self.traces), rows, group_size=1)

    def sampling_probs(self, alpha: float) -> Tensor:
        """Probability of each rollout of ``batch``."""
        return torch.cat([alpha * self.prior_probs(), (1 - alpha) * self.posterior_probs()]).detach()
