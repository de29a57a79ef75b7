"""Probe a live model with one question: sample traces from both prompts, score them, and show the choices.

No notebook is needed: ``probe`` turns a policy and a question into a data frame.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from inspect import signature
from pathlib import Path
from typing import Any

import pandas as pd
import torch

from ..config import RunConfig
from ..runs.folder import trace_frame
from ..runs.reweight import answer_logprob
from ..types import ConfigError, Example, Prompt
from .models import Policy, load_adapter, load_policy, load_tokenizer
from .probe import coherence
from .prompts import Prompter
from .sampling import sample_traces
from .scoring import score
from .tasks import load_task
from .trainer import join, micro_batches, own_prompts
from .tree import final_logits

ROWS = 512  # tokens whose logits over the vocabulary exist at once


def _nothing(done: int) -> None:
    """What ``probe`` calls where nobody watches."""


@torch.no_grad()
def alternatives(
    policy: Policy, prompt: Prompt, trace: Sequence[int], temperature: float = 1.0, top: int = 5
) -> dict[str, list[list[tuple[str, float]]]]:
    """The ``top`` most probable tokens at each of the T places of a trace, under both prompts.

    ``{"prior": [...], "posterior": [...]}`` with (token text, log-probability in nats) for each place, most
    probable first, under softmax(logits / temperature).
    """
    found = {}
    for name, context in (("prior", prompt.prior), ("posterior", prompt.posterior)):
        ids = torch.tensor([[*context, *trace]], device=policy.device)
        output = policy.decoder(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False)
        places: list[list[tuple[str, float]]] = []
        for rows in output.last_hidden_state[0, len(context) - 1 : -1].split(ROWS):
            logprobs = torch.log_softmax(final_logits(policy, rows) / temperature, dim=-1)
            best, tokens = (x.tolist() for x in logprobs.topk(min(top, logprobs.shape[-1])))
            places += [
                [(policy.tokenizer.decode([token]), nats) for token, nats in zip(*place, strict=True)]
                for place in zip(tokens, best, strict=True)
            ]
        found[name] = places
    return found


@dataclass
class _Watched:
    """A prompter that reports each decoded token; raising in ``tick`` ends the decoding."""

    prompter: Prompter
    tick: Callable[[int], None]

    def __getattr__(self, name: str) -> Any:
        return getattr(self.prompter, name)

    def ends(self, ids, end: str) -> bool:
        self.tick(1)
        return self.prompter.ends(ids, end)


@torch.no_grad()
def probe(
    policy: Policy,
    prompter: Prompter,
    question: str,
    answer: str,
    k: int = 4,
    *,
    max_tokens: int = 64,
    temperature: float = 1.0,
    seed: int = 0,
    top: int = 5,
    max_packed_tokens: int = 4096,
    tick: Callable[[int], None] = _nothing,
) -> pd.DataFrame:
    """Draw k traces from the prior and k from the posterior prompt of one question, and score them.

    One row a trace, prior first: the columns of ``trace_frame`` and

        reward        log p(y|x,z) in nats; advantage is the reward minus its mean, over its deviation
        coherence     T + 1 nats, see ``coherence``
        alternatives  of each token: {"prior": [(text, nats), ...], "posterior": [...]}

    The same seed draws with the same random numbers, whatever the weights. ``tick`` is called with the
    number of tokens decoded since the last call, or 0 between the parts of the scoring; what it raises ends
    the probe. Raises ConfigError for an empty question or answer, or one too long for the model's context.
    """
    if k < 1 or max_tokens < 1 or not 0 < temperature < math.inf:
        raise ConfigError("k and max_tokens must be 1 or more, temperature a number above 0")
    example = Example("prompt bench", question, answer)
    prompt = prompter(example)
    prompter.check_length(prompt, max_tokens, policy.max_context, example.id)
    batch = sample_traces(
        policy,
        _Watched(prompter, tick),
        [prompt],
        torch.tensor([True] * k + [False] * k),
        max_tokens=max_tokens,
        temperature=temperature,
        generator=torch.Generator().manual_seed(seed),
    ).to(policy.device)
    parts = []
    for rows in micro_batches([prompt], batch, True, max_packed_tokens):
        tick(0)
        own = own_prompts([prompt], batch, rows)
        parts.append(score(policy, own, batch.rows(rows), temperature=temperature))
    frame = trace_frame([example], batch, join(parts), prompter)
    reward = answer_logprob(frame)
    deviation = reward.std(ddof=0)
    frame["reward"] = reward
    frame["advantage"] = (reward - reward.mean()) / deviation if deviation > 0 else 0.0
    seen: dict[tuple[int, ...], tuple[Any, Any]] = {}  # a trained policy often writes the same trace again
    for ids in map(tuple, frame["token_ids"]):
        tick(0)
        if ids not in seen:
            both = alternatives(policy, prompt, ids, temperature, top)
            places = [dict(zip(both, place, strict=True)) for place in zip(*both.values(), strict=True)]
            seen[ids] = (coherence(policy, prompter, prompt, ids, max_packed_tokens), places)
    frame["coherence"], frame["alternatives"] = zip(
        *(seen[tuple(ids)] for ids in frame["token_ids"]), strict=True
    )
    return frame


def open_source(config: RunConfig, checkpoint: Path | None = None) -> tuple[Policy, Prompter]:
    """Load the model of ``config`` with its prompter and, where given, the adapter of a checkpoint folder."""
    task = load_task(
        config.task, **{n: getattr(config, n) for n in list(signature(load_task).parameters)[1:]}
    )
    prompter = Prompter(load_tokenizer(config.model), task.demonstrations, config.prompt_style)
    policy = load_policy(
        config.model,
        quantization=config.quantization,
        dtype=config.dtype,
        lora_rank=config.lora_rank if checkpoint else 0,
        lora_alpha=config.lora_alpha,
        seed=config.seed,
        device=config.device,
    )
    if checkpoint:
        load_adapter(policy, checkpoint)
    return policy, prompter
