"""The parts of a training step: draw traces, score them, add the loss's gradient, update the weights."""

from __future__ import annotations

import dataclasses
import hashlib
import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from ..config import RunConfig
from ..types import Credit, Example, LogProbs, Prompt, TraceBatch
from .evaluation import predict_answers
from .methods import Method
from .objectives import Totals, needs_posterior
from .policy import Policy
from .prompts import Prompter
from .sampling import draw_sources, sample_traces
from .scoring import join, micro_batches, own_prompts, pad_and_cat, reference, trace_logprobs
from .tasks import Task


def check_prompts(
    config: RunConfig, prompter: Prompter, examples: Sequence[Example], max_context: int
) -> list[Prompt]:
    """The prompts of some examples. ConfigError where one does not fit the model's context."""
    prompts = [prompter(e) for e in examples]
    for prompt, example in zip(prompts, examples, strict=True):
        prompter.check_length(prompt, config.max_trace_tokens, max_context, example.id, config.max_answer_tokens)
    return prompts


def step_generator(seed: int, purpose: str, step: int) -> torch.Generator:
    """The random generator of one step, the same on every machine."""
    digest = hashlib.sha256(f"{seed}/{purpose}/{step}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:7], "big"))


def sample_step(
    config: RunConfig,
    policy: Policy,
    prompter: Prompter,
    prompts: Sequence[Prompt],
    generator: torch.Generator,
    alpha: float,
) -> TraceBatch:
    """Draw ``rollouts_per_question`` traces of each question from the mixture with ratio ``alpha``."""
    from_prior = draw_sources(len(prompts), config.rollouts_per_question, alpha, config.source_split, generator)
    return sample_traces(
        policy,
        prompter,
        prompts,
        from_prior,
        max_tokens=config.max_trace_tokens,
        temperature=config.temperature,
        top_p=config.top_p,
        generator=generator,
    ).to(policy.device)


def verifier_rewards(
    policy: Policy,
    prompter: Prompter,
    task: Task,
    examples: Sequence[Example],
    prompts: Sequence[Prompt],
    batch: TraceBatch,
    max_tokens: int,
) -> tuple[tuple[str, ...], Tensor]:
    """The policy's own greedy answer after each of the N traces, and (N,) the task's score of it."""
    own = [i // batch.group_size for i in range(len(batch))]
    contexts = [[*prompts[q].prior, *batch.trace(i), *prompts[q].seam] for i, q in enumerate(own)]
    answers = predict_answers(policy, prompter, contexts, max_tokens)
    scores = [task.score(answer, examples[q]) for answer, q in zip(answers, own, strict=True)]
    return tuple(answers), torch.tensor(scores, device=batch.mask.device)


def logprobs_of(
    config: RunConfig,
    method: Method,
    policy: Policy,
    prompts: Sequence[Prompt],
    batch: TraceBatch,
    rows: Tensor,
) -> LogProbs:
    """Log-probabilities of the rollouts at ``rows`` (row numbers) under the current policy."""
    return trace_logprobs(
        policy,
        own_prompts(prompts, batch, rows),
        batch.rows(rows),
        temperature=config.temperature,
        posterior=needs_posterior(config),
        no_trace="no_trace" in method.needs,
    )


def reference_logprobs(
    config: RunConfig,
    method: Method,
    policy: Policy,
    prompts: Sequence[Prompt],
    batch: TraceBatch,
    parts: Sequence[Tensor],
) -> dict[str, Tensor]:
    """The log-probabilities under the frozen base that the method needs, for all rollouts."""
    needs = method.needs & {"ref_prior", "bare_answer"}
    found = [
        reference(policy, own_prompts(prompts, batch, rows), batch.rows(rows), needs, config.temperature)
        for rows in (parts if needs else [])
    ]
    return {name: pad_and_cat([f[name] for f in found]) for name in needs}


def add_gradient(
    config: RunConfig,
    method: Method,
    policy: Policy,
    prompts: Sequence[Prompt],
    batch: TraceBatch,
    method_state: Mapping[str, float],
    old: LogProbs | None = None,
    credit: Credit | None = None,
) -> tuple[LogProbs, Credit, dict[str, float]]:
    """Add the gradient of the method's loss to the adapter's ``grad``; the weights stay.

    ``old`` and ``credit`` are those of the step's first update; those of the current policy where not given.
    Returns them, and the loss with its parts. The result does not depend on how ``max_packed_tokens`` cuts
    the step.
    """
    parts = micro_batches(prompts, batch, needs_posterior(config), config.max_packed_tokens)
    if old is None and len(parts) > 1:
        with torch.no_grad():
            old = join([logprobs_of(config, method, policy, prompts, batch, rows) for rows in parts])
    frozen = reference_logprobs(config, method, policy, prompts, batch, parts) if credit is None else {}
    totals: Totals | None = None
    losses: dict[str, float] = {}
    for rows in parts:
        new = logprobs_of(config, method, policy, prompts, batch, rows)
        if old is None:  # with a single part, this pass gives the old policy's numbers, too
            old = new.detach()
        if credit is None:
            old = dataclasses.replace(old, **frozen)
            credit = method.credit(batch, old, config, method_state)
        totals = totals or Totals.of(batch, credit, old.answer_mask)
        loss, measured = method.loss(new, old.rows(rows), batch.rows(rows), credit.rows(rows), totals, config)
        loss.backward()
        for name, value in {"loss": loss.detach(), **measured}.items():
            losses[name] = losses.get(name, 0.0) + float(value)
    return old, credit, losses


def clip_gradient(policy: Policy, max_norm: float, step: int) -> float:
    """Clip the adapter's gradient; the norm before the clip. FloatingPointError where it is not finite."""
    norm = float(torch.nn.utils.clip_grad_norm_([p for _, p in policy.trainable()], max_norm))
    if not math.isfinite(norm):
        raise FloatingPointError(
            f"the gradient of step {step + 1} is not finite; lower learning_rate or kl_weight, "
            "or use dtype='float32' (the run resumes from its last checkpoint)"
        )
    return norm


def set_learning_rate(optimizer: torch.optim.Optimizer, config: RunConfig, step: int) -> None:
    """Linear warm-up, then a cosine to zero at the last step, or constant."""
    warmup = min(config.warmup_steps, config.steps)  # a run shorter than its warm-up still reaches the full rate
    factor = min(1.0, (step + 1) / max(1, warmup))
    if config.lr_schedule == "cosine" and step >= warmup:
        done = (step - warmup) / max(1, config.steps - warmup)
        factor = 0.5 * (1 + math.cos(math.pi * done))
    for group in optimizer.param_groups:
        group["lr"] = config.learning_rate * factor
