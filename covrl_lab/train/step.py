"""The parts of a training step: verify traces, score them, add the loss's gradient, set the learning rate."""

import hashlib
import math
from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from ..config import RunConfig
from ..types import ConfigError, Credit, Example, LogProbs, Prompt, TraceBatch
from .evaluation import predict_answers
from .methods import Method
from .objectives import Totals
from .policy import Policy
from .prompts import Prompter
from .ranks import ALONE, Ranks
from .scoring import Part, join, micro_batches, own_prompts, pad_rows, reference, trace_logprobs
from .tasks import Task


def step_generator(seed: int, purpose: str, step: int) -> torch.Generator:
    """The random generator of one step, the same on every machine."""
    digest = hashlib.sha256(f"{seed}/{purpose}/{step}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:7], "big"))


def verifier_rewards(
    policy: Policy,
    prompter: Prompter,
    task: Task,
    examples: Sequence[Example],
    prompts: Sequence[Prompt],
    batch: TraceBatch,
    max_tokens: int,
    ranks: Ranks = ALONE,
) -> tuple[tuple[str, ...], Tensor]:
    """The policy's own greedy answer after each of the N traces, and (N,) the task's score of it."""
    own = own_prompts(prompts, batch)
    contexts = [[*p.prior, *batch.trace(i), *p.seam] for i, p in enumerate(own)]

    def judged(part: slice) -> list[tuple[str, float]]:
        answers = predict_answers(policy, prompter, contexts[part], max_tokens)
        rows = zip(answers, range(part.start, part.stop), strict=True)
        return [(answer, task.score(answer, examples[i // batch.group_size])) for answer, i in rows]

    answers, scores = zip(*ranks.map(len(contexts), judged), strict=True)
    return answers, torch.tensor(scores, device=batch.mask.device)


def add_gradient(
    config: RunConfig,
    method: Method,
    policy: Policy,
    prompts: Sequence[Prompt],
    batch: TraceBatch,
    method_state: Mapping[str, float],
    old: LogProbs | None = None,
    credit: Credit | None = None,
    ranks: Ranks = ALONE,
) -> tuple[LogProbs, Credit, dict[str, float]]:
    """Add the gradient of the method's loss to the adapter's ``grad``, each rank its questions'; the weights stay.

    ``old`` and ``credit`` are those of the step's first update, or None. Returns both, and the loss with its parts.
    Where a part holds whole groups, and credit needs no more than the group, each part is scored once, with gradients;
    otherwise all parts are scored before the first one's credit is known.
    """
    trained, temperature = config.trains_posterior, config.temperature
    settings = {"temperature": temperature, "no_trace": "no_trace" in method.needs, "frozen_posterior": not trained}
    parts = micro_batches(prompts, batch, trained, config.max_packed_tokens, ranks.share(len(prompts)))

    def score(part: Part) -> LogProbs:
        wanted = config.needs_posterior and (trained or old is None)  # a frozen q is only asked what it was
        return trace_logprobs(policy, part.prompts, part.batch, posterior=wanted, **settings)

    def with_frozen(scores: LogProbs, part: Part) -> LogProbs:
        return replace(scores, **reference(policy, part.prompts, part.batch, method.needs, temperature))

    whole = method.by_group and all(len(p.index) % batch.group_size == 0 for p in parts)
    once = old is None and credit is None and all(ranks.gather([whole or len(parts) == ranks.count == 1]))
    if old is None and not once:
        with torch.no_grad():
            old = join(ranks.gather([with_frozen(score(part), part) for part in parts]))
    if credit is None and not once:
        credit = method.credit(batch, old, config, method_state)
    answers = pad_rows([torch.ones(len(p.answer), dtype=torch.bool) for p in own_prompts(prompts, batch)])
    totals = Totals.of(batch, answers)
    scored, earned, measured = [], [], []
    for part in parts:
        new = score(part)
        if once:  # this pass gives the old policy's numbers, too
            scored.append(with_frozen(new.detach(), part))
            groups = replace(part.batch, group_size=batch.group_size)
            earned.append(method.credit(groups, scored[-1], config, method_state))
        before, worth = (scored[-1], earned[-1]) if once else (old.rows(part.index), credit.rows(part.index))
        loss, terms = method.loss(new, before, part.batch, worth, totals, config)
        loss.backward()
        measured.append({name: float(value) for name, value in {"loss": loss.detach(), **terms}.items()})
    if once:
        old, credit = join(ranks.gather(scored)), join(ranks.gather(earned))
    losses: dict[str, float] = {}
    for terms in ranks.gather(measured):
        for name, value in terms.items():
            losses[name] = losses.get(name, 0.0) + value
    return old, credit, losses


def must_skip(config: RunConfig, loss: float, norm: float, records: Sequence[Mapping[str, float]]) -> bool:
    """Whether a step's update must be left out: its loss or gradient norm is not finite.

    ConfigError where the run has done so in ``max_skipped_steps`` of its steps already.
    """
    if math.isfinite(loss + norm):
        return False
    if sum(record.get("skipped") or 0 for record in records) >= config.max_skipped_steps:
        raise ConfigError(
            f"loss {loss:g} or gradient norm {norm:g} of step {len(records) + 1} is not finite, so the run stops "
            "before its update; raise max_skipped_steps to resume without it, or start anew with a lower "
            "learning_rate or kl_weight, or dtype='float32'"
        )
    return True


def set_learning_rate(optimizer: torch.optim.Optimizer, config: RunConfig, step: int) -> None:
    """Linear warm-up, then a cosine to zero at the last step, or constant."""
    warmup = min(config.warmup_steps, config.steps)  # a run shorter than its warm-up still reaches the full rate
    factor = min(1.0, (step + 1) / max(1, warmup))
    if config.lr_schedule == "cosine" and step >= warmup:
        done = (step - warmup) / max(1, config.steps - warmup)
        factor = 0.5 * (1 + math.cos(math.pi * done))
    for group in optimizer.param_groups:
        group["lr"] = config.learning_rate * factor
