"""Look at a policy without training it: sampled traces as a data frame, and the coherence of a trace.

The coherence curve is log p(y | x, z up to t) for t = 0 to T: it shows which part of a trace made the answer
likely. All prefixes of the trace share one token tree, so that a curve takes one forward and not T + 1.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch

from ..config import RunConfig
from ..runs.reweight import answer_logprob
from ..types import ConfigError, Example, LogProbs, Prompt, TraceBatch
from .opening import open_model
from .policy import Policy, load_adapter
from .prompts import Prompter
from .sampling import sample_traces
from .scoring import Segment, join, micro_batches, score_segments, trace_logprobs
from .tree import final_logits

ROWS = 512  # tokens whose logits over the vocabulary exist at once


@torch.no_grad()
def probe(
    policy: Policy,
    prompter: Prompter,
    examples: Sequence[Example],
    k: int = 4,
    *,
    max_tokens: int = 64,
    temperature: float = 1.0,
    seed: int = 0,
    max_packed_tokens: int = 4096,
    tick: Callable[[int], object] = lambda done: None,
) -> pd.DataFrame:
    """Draw k traces from the prior and k from the posterior prompt of each example, and score them.

    One row a trace, see ``trace_frame``; of each example the prior traces come first. The same seed draws
    with the same random numbers, whatever the weights. ``tick`` is called with the number of tokens decoded
    since the last call, or 0 before each part of the scoring; what it raises ends the probe. Raises ConfigError
    for a setting that cannot be, or an example too long for the model's context.
    """
    if k < 1 or max_tokens < 1 or not 0 < temperature < math.inf:
        raise ConfigError("k and max_tokens must be 1 or more, temperature a number above 0")
    prompts = [prompter(example) for example in examples]
    for prompt, example in zip(prompts, examples, strict=True):
        prompter.check_length(prompt, max_tokens, policy.max_context, example.id)
    from_prior = torch.tensor(([True] * k + [False] * k) * len(examples))
    settings = {"max_tokens": max_tokens, "temperature": temperature, "tick": tick}
    generator = torch.Generator().manual_seed(seed)
    batch = sample_traces(policy, prompter, prompts, from_prior, generator=generator, **settings).to(policy.device)
    logprobs = []
    for part in micro_batches(prompts, batch, True, max_packed_tokens):
        tick(0)
        logprobs.append(trace_logprobs(policy, part.prompts, part.batch, temperature=temperature))
    return trace_frame(examples, batch, join(logprobs), prompter)


def trace_frame(
    examples: Sequence[Example], batch: TraceBatch, logprobs: LogProbs, prompter: Prompter
) -> pd.DataFrame:
    """One row a rollout of a ``TraceBatch`` with its ``LogProbs``; columns as in ``Run.traces``.

    Without the columns that only training knows: step, log_ratio, reward, advantage, answer_weight.
    """
    batch, logprobs = batch.to("cpu"), logprobs.detach().to("cpu")
    decode, rows = prompter.tokenizer.decode, []
    answers = {example.id: [decode([token]) for token in prompter.answer(example)] for example in examples}
    for i in range(len(batch)):
        example, ids, keep = examples[i // batch.group_size], batch.trace(i), batch.mask[i]
        rows.append(
            {
                "rollout": i,
                "example_id": example.id,
                "question": example.question,
                "answer": example.answer,
                "source": "prior" if batch.from_prior[i] else "posterior",
                "finished": bool(batch.finished[i]),
                "trace": prompter.trace_text(ids),
                "tokens": [decode([token]) for token in ids],
                "token_ids": ids,
                "logp": logprobs.prior[i][keep].tolist(),
                "logq": None if logprobs.posterior is None else logprobs.posterior[i][keep].tolist(),
                "answer_tokens": answers[example.id],
                "answer_logp": logprobs.answer[i][logprobs.answer_mask[i]].tolist(),
            }
        )
    return pd.DataFrame(rows)


@torch.no_grad()
def coherence(
    policy: Policy, prompter: Prompter, prompt: Prompt, trace: Sequence[int], max_packed_tokens: int = 4096
) -> np.ndarray:
    """(T + 1,) log p(y | x, z up to t) in nats at temperature 1, in one packed forward.

    ``trace`` holds the T token ids of a trace of either source. The answer is always scored after the prior
    prompt, z up to t, and the seam. A trace cut before its end gets the style's end marker (a newline,
    ``</think>``), as traces have it in training. The whole trace stays as it was sampled, so the last value is
    the log p(y|x,z) that the reward is made of, also for a trace truncated before its end marker. More than
    ``max_packed_tokens`` take several forwards.
    """
    end = prompter.tokenizer(prompter.style.trace_end, add_special_tokens=False)["input_ids"]
    prefixes = [[*trace[:t], *end] for t in range(len(trace))] + [list(trace)]
    segments = [Segment.of_answer(prompt, prefix) for prefix in prefixes]
    return torch.stack(score_segments(policy, segments, max_packed_tokens)).sum(1).cpu().numpy()


# --- one question of one's own


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


@torch.no_grad()
def probe_question(
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
    tick: Callable[[int], object] = lambda done: None,
) -> pd.DataFrame:
    """``probe`` with one question, and what the prompt bench shows of each trace besides.

    One row a trace, prior first: the columns of ``trace_frame`` and

        reward        log p(y|x,z) in nats; advantage is the reward minus its mean, over its deviation
        coherence     T + 1 nats, see ``coherence``
        alternatives  of each token: {"prior": [(text, nats), ...], "posterior": [...]}

    ``tick`` is also called, with 0, before each trace's coherence. Raises ConfigError as ``probe`` does, and for
    an empty question or answer.
    """
    example = Example("prompt bench", question, answer)
    settings = {"max_tokens": max_tokens, "temperature": temperature, "seed": seed, "tick": tick}
    frame = probe(policy, prompter, [example], k, max_packed_tokens=max_packed_tokens, **settings)
    prompt = prompter(example)
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
    frame["coherence"], frame["alternatives"] = zip(*(seen[tuple(ids)] for ids in frame["token_ids"]), strict=True)
    return frame


def open_source(config: RunConfig, checkpoint: Path | None = None) -> tuple[Policy, Prompter]:
    """Load the model of ``config`` with its prompter and, where given, the adapter of a checkpoint folder."""
    _, prompter, policy = open_model(config, adapter=checkpoint is not None)
    if checkpoint:
        load_adapter(policy, checkpoint)
    return policy, prompter
