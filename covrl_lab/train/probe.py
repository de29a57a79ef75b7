"""Look at a policy without training it: sampled traces as a data frame, and the coherence of a trace.

The coherence curve is log p(y | x, z up to t) for t = 0 to T: it shows which part of a trace made the answer
likely. All prefixes of the trace share one token tree, so that a curve takes one forward and not T + 1.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pandas as pd
import torch

from ..types import Example, LogProbs, Prompt, TraceBatch
from .policy import Policy
from .prompts import Prompter
from .sampling import sample_traces
from .scoring import Segment, score_segments, trace_logprobs


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
) -> pd.DataFrame:
    """Draw k traces from the prior and k from the posterior prompt of each example, and score them.

    One row a trace, see ``trace_frame``; of each example the prior traces come first. The same seed draws
    with the same random numbers, whatever the weights.
    """
    prompts = [prompter(example) for example in examples]
    from_prior = torch.tensor(([True] * k + [False] * k) * len(examples))
    generator = torch.Generator().manual_seed(seed)
    settings = {"max_tokens": max_tokens, "temperature": temperature, "generator": generator}
    batch = sample_traces(policy, prompter, prompts, from_prior, **settings).to(policy.device)
    logprobs = trace_logprobs(policy, prompts, batch, temperature=temperature)
    return trace_frame(examples, batch, logprobs, prompter)


def trace_frame(
    examples: Sequence[Example], batch: TraceBatch, logprobs: LogProbs, prompter: Prompter
) -> pd.DataFrame:
    """One row a rollout of a ``TraceBatch`` with its ``LogProbs``; columns as in ``Run.traces``.

    Without the columns that only training knows: step, log_ratio, reward, advantage, answer_weight.
    """
    batch, logprobs = batch.to("cpu"), logprobs.detach().to("cpu")
    rows = []
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
                "tokens": [prompter.tokenizer.decode([token]) for token in ids],
                "token_ids": ids,
                "logp": logprobs.prior[i][keep].tolist(),
                "logq": None if logprobs.posterior is None else logprobs.posterior[i][keep].tolist(),
                "answer_logp": logprobs.answer[i][logprobs.answer_mask[i]].tolist(),
            }
        )
    return pd.DataFrame(rows)


def prefix_contexts(prompter: Prompter, prompt: Prompt, trace: Sequence[int]) -> list[list[int]]:
    """The T + 1 contexts in which the answer is scored: prior prompt, z up to t, end marker, seam.

    A prefix that stops early gets the style's end marker (a newline, ``</think>``), so that the seam follows
    as it does in training. The whole trace stays as it was sampled: the last value is the log p(y|x,z)
    that the reward is made of, also for a trace that was truncated before its end marker.
    """
    end = prompter.tokenizer(prompter.style.trace_end, add_special_tokens=False)["input_ids"]
    early = [[*prompt.prior, *trace[:t], *end, *prompt.seam] for t in range(len(trace))]
    return [*early, [*prompt.prior, *trace, *prompt.seam]]


@torch.no_grad()
def coherence(
    policy: Policy, prompter: Prompter, prompt: Prompt, trace: Sequence[int], max_packed_tokens: int = 4096
) -> np.ndarray:
    """(T + 1,) log p(y | x, z up to t) in nats at temperature 1, in one packed forward.

    ``trace`` holds the T token ids of a trace of either source; the answer is always scored after the prior
    prompt. Only a tree of more than ``max_packed_tokens`` nodes is cut into several forwards; a model that
    cannot run a tree gets plain rows.
    """
    contexts = prefix_contexts(prompter, prompt, trace)
    if policy.packs:
        shared = len(prompt.prior) + len(trace)
        each = max(len(contexts[0]) - len(prompt.prior), len(prompt.seam)) + len(prompt.answer)
    else:  # whole rows
        shared, each = 0, max(map(len, contexts)) + len(prompt.answer)
    at_once, values = max(1, (max_packed_tokens - shared) // each), []
    for i in range(0, len(contexts), at_once):
        segments = [Segment([*c, *prompt.answer], len(c), 1.0) for c in contexts[i : i + at_once]]
        values += score_segments(policy, segments)
    return torch.stack(values).sum(1).cpu().numpy()
