"""The coherence curve of a trace: how probable the reference answer is after each of its prefixes.

log p(y | x, z up to t) for t = 0 to T shows which part of a trace made the answer likely. All prefixes
share one token tree, in which the answer hangs off every node of the trace, so a curve costs one forward
and not T + 1.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from ..types import Prompt
from .scoring import Segment, score_segments


def prefix_contexts(prompter, prompt: Prompt, trace: Sequence[int]) -> list[list[int]]:
    """The T + 1 contexts in which the answer is scored: prior prompt, z up to t, end marker, seam.

    A prefix that stops early gets the style's end marker (a newline, ``</think>``), so that the seam follows
    as it does in training. The whole trace stays as it was sampled: the last value is the very log p(y|x,z)
    that the reward is made of, also for a trace that was truncated before its end marker.
    """
    end = prompter.tokenizer(prompter.style.trace_end, add_special_tokens=False)["input_ids"]
    early = [[*prompt.prior, *trace[:t], *end, *prompt.seam] for t in range(len(trace))]
    return [*early, [*prompt.prior, *trace, *prompt.seam]]


@torch.no_grad()
def coherence(
    policy, prompter, prompt: Prompt, trace: Sequence[int], max_packed_tokens: int = 4096
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
