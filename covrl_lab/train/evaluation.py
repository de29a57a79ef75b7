"""Prior-only evaluation: the model sees the question, writes a trace, then its own answer.

The trace is decoded until its end marker, the seam ("Answer:", or the opening answer tag) is appended as
ids, and the answer is decoded until its terminator. A trace that does not end within the limit counts as
wrong. Per-question results are kept, so that intervals can be computed later over any grouping.
"""

from __future__ import annotations

from collections.abc import Sequence

import pandas as pd
import torch
from tqdm.auto import tqdm

from ..runs.stats import bootstrap_interval, share_interval
from ..types import Example
from .policy import Policy
from .prompts import Prompter
from .sampling import generate
from .tasks import Task

ROWS = 32  # generations decoded together


def predict(
    policy: Policy,
    prompter: Prompter,
    prompts: Sequence,
    *,
    max_trace_tokens: int,
    max_answer_tokens: int,
    temperature: float = 1.0,
    top_p: float = 1.0,
    uniforms: torch.Tensor | None = None,
) -> list[dict]:
    """Decode a trace and an answer after each prior prompt; greedy where ``uniforms`` is None.

    uniforms is (rows, max_trace_tokens + max_answer_tokens) in [0, 1). Returns dictionaries with
    ``trace``, ``prediction``, ``finished`` and ``trace_tokens``.
    """
    split = None if uniforms is None else uniforms.split([max_trace_tokens, max_answer_tokens], dim=1)
    style, settings = prompter.style, {"temperature": temperature, "top_p": top_p}
    traces, ended, _ = generate(
        policy,
        [p.prior for p in prompts],
        max_tokens=max_trace_tokens,
        ended=lambda ids: prompter.ends(ids, style.trace_end),
        uniforms=None if split is None else split[0],
        **settings,
    )
    contexts = [[*p.prior, *z, *p.seam] for p, z in zip(prompts, traces, strict=True)]
    uniforms = None if split is None else split[1]
    answers = predict_answers(policy, prompter, contexts, max_answer_tokens, uniforms=uniforms, **settings)
    return [
        {
            "trace": prompter.trace_text(z),
            "prediction": answer,
            "finished": done and bool(prompter.trace_text(z)),
            "trace_tokens": len(z),
        }
        for z, answer, done in zip(traces, answers, ended, strict=True)
    ]


def predict_answers(
    policy: Policy, prompter: Prompter, contexts: Sequence[Sequence[int]], max_tokens: int, **sampling
) -> list[str]:
    """Decode the answer after each context (prompt, trace and seam ids); greedy without ``uniforms``."""
    end = prompter.style.answer_end
    ids, _, _ = generate(
        policy, contexts, max_tokens=max_tokens, ended=lambda y: prompter.ends(y, end), **sampling
    )
    return [prompter.answer_text(y) for y in ids]


def evaluate(
    policy: Policy,
    prompter: Prompter,
    task: Task,
    examples: Sequence[Example],
    *,
    max_trace_tokens: int,
    max_answer_tokens: int,
    samples: int = 0,
    temperature: float = 1.0,
    top_p: float = 1.0,
    seed: int = 0,
    progress: bool = True,
) -> pd.DataFrame:
    """One row per generation: one greedy generation a question (sample -1), then ``samples`` sampled ones.

    Columns: example_id, sample, question, answer, trace, prediction, finished, trace_tokens, score (0..1,
    by the task's own scorer; 0 if the trace did not finish).
    """
    prompts = [prompter(e) for e in examples]
    width = max_trace_tokens + max_answer_tokens
    rows = []
    with tqdm(total=len(examples) * (1 + samples), desc="evaluate", disable=not progress, leave=False) as bar:
        for sample in range(-1, samples):
            uniforms = None
            if sample >= 0:
                generator = torch.Generator().manual_seed(seed * 1000 + sample + 1)
                uniforms = torch.rand(len(examples), width, generator=generator, dtype=torch.float64)
            for start in range(0, len(examples), ROWS):
                part = slice(start, start + ROWS)
                results = predict(
                    policy,
                    prompter,
                    prompts[part],
                    max_trace_tokens=max_trace_tokens,
                    max_answer_tokens=max_answer_tokens,
                    temperature=temperature,
                    top_p=top_p,
                    uniforms=None if uniforms is None else uniforms[part],
                )
                for example, result in zip(examples[part], results, strict=True):
                    score = task.score(result["prediction"], example) if result["finished"] else 0.0
                    row = {"example_id": example.id, "sample": sample, "question": example.question}
                    rows.append(row | {"answer": example.answer} | result | {"score": float(score)})
                bar.update(len(results))
    return pd.DataFrame(rows)


def summarise(results: pd.DataFrame) -> dict[str, float]:
    """pass@1 (greedy) and, where there are samples, avg@k, each with a 95% interval over questions.

    pass@1 of greedy decoding is the share of questions whose one answer is right; avg@k is the mean score
    over k sampled answers, averaged over questions. The interval is Wilson's where greedy answers are right
    or wrong, and a bootstrap over questions for partial credit and for avg@k.
    """
    greedy = results[results["sample"] < 0]
    scores = greedy["score"].to_numpy()
    if set(scores) <= {0.0, 1.0}:
        accuracy, low, high = share_interval(scores.sum(), len(scores))
    else:
        accuracy, low, high = bootstrap_interval(scores)
    summary = {
        "accuracy": accuracy,
        "accuracy_low": low,
        "accuracy_high": high,
        "eval_questions": len(greedy),
        "eval_finished_share": float(greedy["finished"].mean()),
        "eval_trace_tokens": float(greedy["trace_tokens"].mean()),
    }
    sampled = results[results["sample"] >= 0]
    if len(sampled):
        table = sampled.pivot(index="example_id", columns="sample", values="score").to_numpy()
        mean, low, high = bootstrap_interval(table)
        summary |= {"avg_at_k": mean, "avg_at_k_low": low, "avg_at_k_high": high, "k": table.shape[1]}
    return summary
