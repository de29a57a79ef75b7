"""Look at a policy without training it: sampled traces as a data frame, and the coherence of a trace.

The coherence curve shows which part of a trace made the answer likely. All prefixes of the trace share one token tree,
so that a curve takes one forward and not T + 1.
"""

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

ROWS, PACKED = 512, 4096  # tokens whose logits over the vocabulary exist at once; tokens of a forward


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
    tick: Callable[[int], object] = lambda done: None,
) -> pd.DataFrame:
    """Draw k traces from the prior and k from the posterior prompt of each example, and score them.

    One row a trace, see ``trace_frame``; of each example the prior traces come first. ``tick`` is called with the
    number of tokens decoded since, or 0 before each part of the scoring; what it raises ends the probe. Raises
    ConfigError for a setting that cannot be, or an example too long for the model's context.
    """
    if k < 1 or max_tokens < 1 or not 0 < temperature < math.inf:
        raise ConfigError("k and max_tokens must be 1 or more, temperature a number above 0")
    prompts = [prompter.fitting(example, max_tokens, policy.max_context) for example in examples]
    from_prior = torch.tensor(([True] * k + [False] * k) * len(examples))
    settings = {"max_tokens": max_tokens, "temperature": temperature, "tick": tick}
    generator = torch.Generator().manual_seed(seed)
    batch = sample_traces(policy, prompter, prompts, from_prior, generator=generator, **settings).to(policy.device)
    logprobs = []
    for part in micro_batches(prompts, batch, True, PACKED):
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
def coherence(policy: Policy, prompt: Prompt, trace: Sequence[int], max_packed_tokens: int = PACKED) -> np.ndarray:
    """(T + 1,) log p(y | x, z up to t) in nats at temperature 1, for the T token ids of a trace of either source.

    The answer is always scored after the prior prompt, z up to t, and the seam. A trace cut before its end gets the
    style's end marker, as traces have it in training; the whole trace stays as it was sampled, so the last value is the
    log p(y|x,z) that the reward is made of.
    """
    prefixes = [[*trace[:t], *prompt.empty_trace] for t in range(len(trace))] + [list(trace)]
    segments = [Segment.of_answer(prompt, prefix) for prefix in prefixes]
    return torch.stack(score_segments(policy, segments, max_packed_tokens)).sum(1).cpu().numpy()


@torch.no_grad()
def alternatives(
    policy: Policy, prompt: Prompt, trace: Sequence[int], temperature: float = 1.0, top: int = 5
) -> list[dict[str, list[tuple[str, float]]]]:
    """Of each token of a trace the ``top`` most probable ones, text and nats, under "prior" and "posterior" prompt."""
    found: list[dict[str, list[tuple[str, float]]]] = [{} for _ in trace]
    for name, context in (("prior", prompt.prior), ("posterior", prompt.posterior)):
        ids = torch.tensor([[*context, *trace]], device=policy.device)
        output = policy.decoder(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False)
        states = output.last_hidden_state[0, len(context) - 1 : -1].split(ROWS)
        logprobs = (torch.log_softmax(final_logits(policy, rows) / temperature, dim=-1).topk(top) for rows in states)
        places = [place for best in logprobs for place in zip(*(x.tolist() for x in best), strict=True)]
        for token, (nats, ids) in zip(found, places, strict=True):
            token[name] = [(policy.tokenizer.decode([i]), logprob) for i, logprob in zip(ids, nats, strict=True)]
    return found


@torch.no_grad()
def probe_question(
    policy: Policy,
    prompter: Prompter,
    question: str,
    answer: str,
    k: int = 4,
    *,
    temperature: float = 1.0,
    tick: Callable[[int], object] = lambda done: None,
    **settings: int,
) -> pd.DataFrame:
    """``probe`` with one question and its settings, and what the prompt bench shows of each trace besides.

    One row a trace, prior first: the columns of ``trace_frame`` and

        reward        log p(y|x,z) in nats; advantage is the reward minus its mean, over its deviation
        coherence     T + 1 nats, see ``coherence``
        alternatives  of each token: {"prior": [(text, nats), ...], "posterior": [...]}

    ``tick`` is also called, with 0, before each trace's coherence. Raises ConfigError also for an empty question or
    answer.
    """
    example = Example("prompt bench", question, answer)
    frame = probe(policy, prompter, [example], k, temperature=temperature, tick=tick, **settings)
    prompt, reward = prompter(example), answer_logprob(frame)
    deviation = reward.std(ddof=0)
    frame["reward"] = reward
    frame["advantage"] = (reward - reward.mean()) / deviation if deviation > 0 else 0.0
    seen: dict[tuple[int, ...], tuple[Any, Any]] = {}  # a trained policy often writes the same trace again
    for ids in map(tuple, frame["token_ids"]):
        tick(0)
        if ids not in seen:
            seen[ids] = (coherence(policy, prompt, ids), alternatives(policy, prompt, ids, temperature))
    frame["coherence"], frame["alternatives"] = zip(*(seen[tuple(ids)] for ids in frame["token_ids"]), strict=True)
    return frame


def open_source(config: RunConfig, checkpoint: Path | None = None) -> tuple[Policy, Prompter]:
    """Load the model of ``config`` with its prompter and, where given, the adapter of a checkpoint folder."""
    _, prompter, policy = open_model(config, adapter=checkpoint is not None)
    if checkpoint:
        load_adapter(policy, checkpoint)
    return policy, prompter
