"""Prior-only evaluation: the model sees the question, writes a trace, then its own answer.

The trace is decoded until its end marker, the seam ("Answer:", or the opening answer tag) is appended as ids, and the
answer is decoded until its terminator. A trace that does not end within the limit counts as wrong.
"""

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from functools import partial
from typing import NamedTuple

import numpy as np
import pandas as pd
import torch
from tqdm.auto import tqdm

from ..config import RunConfig
from ..runs.stats import bootstrap_interval, share_interval
from ..types import Example, Prompt
from .answers import vote
from .policy import Policy
from .prompts import Prompter
from .ranks import ALONE, Ranks
from .sampling import generate
from .scorer import scorer
from .scoring import answer_logprobs
from .tasks import Task

ROWS = 32  # generations decoded together
SWAPS, SWAPPED = 8, 2000  # other questions an answer is scored on, and how many such scores there are about
# What a summary takes the mean of, over greedy generations.
MEANS = {"eval_finished_share": "finished", "eval_trace_tokens": "trace_tokens", "answer_logprob": "answer_logp"}
MEANS |= {"no_trace_logprob": "no_trace_logp", "trace_dependence": "moved", "guess_accuracy": "guess_score"}
MEANS |= {"posterior_accuracy": "posterior_score"}


class EvalSet(NamedTuple):
    """Questions that are evaluated together; without a name, the held-out part of the training task."""

    name: str
    task: Task
    examples: Sequence[Example]
    samples: int  # sampled generations a question


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
    posterior: bool = False,
) -> list[dict]:
    """Decode a trace and an answer after each prior prompt; greedy where ``uniforms`` is None.

    uniforms is (rows, max_trace_tokens + max_answer_tokens) in [0, 1). ``posterior`` draws the trace after the
    posterior prompt; the answer follows the prior prompt all the same.
    """
    limits = [max_trace_tokens, max_answer_tokens]
    draws = (None, None) if uniforms is None else uniforms.split(limits, dim=1)
    settings = {"temperature": temperature, "top_p": top_p, "stop_ids": prompter.stop_ids}
    end = prompter.style.trace_end
    contexts = [p.posterior if posterior else p.prior for p in prompts]
    how = {"ended": lambda ids: prompter.ends(ids, end), "uniforms": draws[0]} | settings
    traces, ended, _ = generate(policy, contexts, max_tokens=limits[0], **how)
    contexts = [[*p.prior, *z, *p.seam] for p, z in zip(prompts, traces, strict=True)]
    answers = predict_answers(policy, prompter, contexts, limits[1], uniforms=draws[1], **settings)
    return [
        {
            "trace": prompter.trace_text(z),
            "trace_ids": z,
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
    end, settings = prompter.style.answer_end, {"max_tokens": max_tokens, "stop_ids": prompter.stop_ids} | sampling
    ids, _, _ = generate(policy, contexts, ended=lambda y: prompter.ends(y, end), **settings)
    return [prompter.answer_text(y) for y in ids]


def evaluate(
    policy: Policy, prompter: Prompter, one: EvalSet, config: RunConfig, progress: bool = True, ranks: Ranks = ALONE
) -> pd.DataFrame:
    """One row per generation: one greedy generation a question (sample -1), then ``one.samples`` sampled ones.

    Columns: example_id, sample, question, answer, trace, prediction, finished, trace_tokens, score (0..1, by the task's
    own scorer; 0 if the trace did not finish), scoring_cut (a limit of the scorer ended it, and so gave 0). Greedy rows
    also have answer_logp, other_trace_logp and no_trace_logp: the reference answer's log-probability in nats after the
    model's own trace, after that of the next question, and after none; guess_score: what the same answer scores on
    other questions, on average; and, with alpha below 1, posterior_score: the score after a greedy trace from the
    posterior prompt. Sampled rows have answer_logp, too, and vote, by which answers count as the same in a majority.
    """
    task, examples, posterior = one.task, one.examples, config.alpha < 1
    prompts, names = [prompter(e) for e in examples], ("temperature", "top_p", "max_trace_tokens")
    temperature, top_p, longest = (getattr(config, f"eval_{name}") or getattr(config, name) for name in names)
    limits = {"max_trace_tokens": longest, "max_answer_tokens": config.max_answer_tokens}

    # On a GPU waiting questions take the seats of finished ones; a CPU drops finished rows, which is as fast.
    count, at_once = len(examples), ROWS if policy.device.type == "cpu" else 8 * ROWS

    def generated(part: slice, sample: int = -1, uniforms: torch.Tensor | None = None, **how) -> list[dict]:
        found, uniforms = [], None if uniforms is None else uniforms[part]
        drawn = predict(policy, prompter, prompts[part], **limits, **how, uniforms=uniforms)
        for example, result in zip(examples[part], drawn, strict=True):
            cut = scorer.cut
            score = float(task.score(result["prediction"], example)) if result["finished"] else 0.0
            row = {"example_id": example.id, "sample": sample, "question": example.question, "answer": example.answer}
            found.append(row | result | {"score": score, "scoring_cut": scorer.cut > cut})
        bar.update(len(found))
        return found

    def guessed(drawn: list[dict], part: slice) -> list[float | None]:
        found, others = [], range(1, min(count, 1 + max(1, min(SWAPS, SWAPPED // count))))
        for i, result in enumerate(drawn[part], part.start):
            cut, scores = scorer.cut, []
            for k in others:  # an answer that a scorer had to be stopped on is not tried again
                usable = result["finished"] and not result["scoring_cut"] and scorer.cut == cut
                scores.append(float(task.score(result["prediction"], examples[(i + k) % count])) if usable else 0.0)
            found.append(sum(scores) / len(scores) if scores else None)
        return found

    def scored(traces: list, part: slice) -> list[float]:
        return answer_logprobs(policy, prompts[part], traces[part]).tolist()

    rows, own = [], ranks.share(count)
    total = (own.stop - own.start) * (1 + one.samples + posterior)
    with tqdm(total=total, desc="evaluate", disable=not progress, leave=False) as bar:
        for sample in range(-1, one.samples):
            how = {"sample": sample, "temperature": temperature, "top_p": top_p}
            if sample >= 0:
                generator = torch.Generator().manual_seed(config.seed * 1000 + sample + 1)
                how["uniforms"] = torch.rand(count, sum(limits.values()), generator=generator, dtype=torch.float64)
            drawn = ranks.map(count, partial(generated, **how), at_once)
            traces = [row.pop("trace_ids") for row in drawn]
            rows += drawn
            if sample < 0:
                uses = ranks.map(count, partial(trace_use, policy, prompts, traces), ROWS)
                guesses = ranks.map(count, partial(guessed, drawn))
                for row, use, guess in zip(drawn, uses, guesses, strict=True):
                    row |= use | {"guess_score": guess}
            else:
                nats = ranks.map(count, partial(scored, traces), ROWS)
                for row, example, value in zip(drawn, examples, nats, strict=True):
                    row |= {"answer_logp": value, "vote": vote(row["prediction"], example) if row["finished"] else ""}
        if posterior:
            found = ranks.map(count, partial(generated, posterior=True), at_once)
            for row, result in zip(rows[:count], found, strict=True):
                row["posterior_score"] = result["score"]
    return pd.DataFrame(rows)


def trace_use(
    policy: Policy, prompts: Sequence[Prompt], traces: Sequence[Sequence[int]], part: slice
) -> list[dict[str, float]]:
    """How probable some answers are after their own traces, the next questions', and none: nats, a row a question.

    Where the three agree, the answer does not depend on the trace: the model guesses.
    """
    own, names = prompts[part], ("answer_logp", "other_trace_logp", "no_trace_logp")
    others = [*traces[1:], *traces[:1]]
    after = [z for kind in (traces, others) for z in kind[part]] + [p.empty_trace for p in own]
    values = answer_logprobs(policy, [*own, *own, *own], after).view(3, -1).T.tolist()
    return [dict(zip(names, row, strict=True)) for row in values]


def evaluate_sets(
    policy: Policy,
    prompter: Prompter,
    sets: Sequence[EvalSet],
    config: RunConfig,
    progress: bool = True,
    ranks: Ranks = ALONE,
) -> tuple[pd.DataFrame, dict]:
    """Evaluate each set on its own: all rows, with a column ``set``, the averages over sets, and each set's own.

    A set's accuracy is ``NAME/accuracy``, and so on. A lone set without a name gives what ``summarise`` gives.
    """
    frames = []
    for one in sets:
        frame = evaluate(policy, prompter, one, config, progress, ranks)
        frames.append(frame.assign(set=one.name) if one.name else frame)
    rows = pd.concat(frames, ignore_index=True)
    if rows.duplicated(["example_id", "sample"]).any():  # two files of one name, or of one preset
        rows["example_id"] = rows["set"] + " " + rows["example_id"]
    return rows, summarise_sets(rows)


def summarise_sets(rows: pd.DataFrame) -> dict[str, float]:
    """What a line of ``evaluations.jsonl`` says of its generations: ``summarise``, or averages and each set's own."""
    if "set" not in rows:
        return summarise(rows)
    summaries = {name: summarise(frame) for name, frame in rows.groupby("set", sort=False)}
    own = {f"{name}/{key}": value for name, summary in summaries.items() for key, value in summary.items()}
    return average(summaries) | own


def average(summaries: Mapping[str, Mapping[str, float]]) -> dict[str, float]:
    """The mean over sets of everything that all of them have; counts are added up, and k is left out if it differs.

    The interval of a mean of independent sets is made from theirs (Zou and Donner 2008).
    """
    table, found = pd.DataFrame(list(summaries.values())).dropna(axis="columns"), {}
    for name in table:
        values, base = table[name], name.removesuffix("_low").removesuffix("_high")
        if base != name:
            side = math.sqrt(((values - table[base]) ** 2).sum()) / len(values)
            found[name] = found[base] + (side if name.endswith("_high") else -side)
        elif name != "k" or values.nunique() == 1:
            found[name] = int(values.sum()) if name in ("eval_questions", "eval_scoring_cut") else float(values.mean())
    return found


def summarise(results: pd.DataFrame) -> dict[str, float]:
    """pass@1 (greedy) and, where there are samples, avg@k, each with a 95% interval over questions.

    The interval is Wilson's where greedy answers are right or wrong, and a bootstrap over questions for partial credit
    and for avg@k. In nats: answer_logprob after greedy traces, no_trace_logprob after none, and trace_dependence, the
    mean distance that log p(y|x,z) moves when the trace is exchanged for another question's. METHODS.md ("What an
    evaluation measures") has the others.
    """
    greedy = results[results["sample"] < 0]
    scores = greedy["score"].to_numpy()
    if set(scores) <= {0.0, 1.0}:
        accuracy, low, high = share_interval(scores.sum(), len(scores))
    else:
        accuracy, low, high = bootstrap_interval(scores)
    summary = {"accuracy": accuracy, "accuracy_low": low, "accuracy_high": high, "eval_questions": len(greedy)}
    if "answer_logp" in greedy:
        greedy = greedy.assign(moved=(greedy["answer_logp"] - greedy["other_trace_logp"]).abs())
    for name, column in MEANS.items():  # older generations lack some
        if column in greedy and greedy[column].notna().all():
            summary[name] = float(greedy[column].mean())
    if "scoring_cut" in results:
        summary["eval_scoring_cut"] = int(results["scoring_cut"].sum())
    sampled = results[results["sample"] >= 0]
    if len(sampled):
        table = sampled.pivot(index="example_id", columns="sample", values="score").to_numpy()
        mean, low, high = bootstrap_interval(table)
        summary |= {"avg_at_k": mean, "avg_at_k_low": low, "avg_at_k_high": high, "k": table.shape[1]}
        if "vote" in sampled:
            counted = sampled[sampled["vote"] != ""].groupby("example_id")["vote"]
            chosen = counted.agg(lambda votes: Counter(votes).most_common(1)[0][0])  # of equal counts the first
            voted = sampled[sampled["vote"] == sampled["example_id"].map(chosen)].groupby("example_id")["score"].mean()
            nats = sampled.pivot(index="example_id", columns="sample", values="answer_logp").to_numpy()
            summary |= {"pass_at_k": float(table.max(1).mean()), "maj_at_k": float(voted.sum() / len(table))}
            within = np.logaddexp.reduce(nats, axis=1) - math.log(nats.shape[1])
            summary |= {"bound_1": float(nats.mean()), "bound_k": float(within.mean())}
    return summary
