"""Signs that a run goes wrong, read from its files: each a sentence with what was seen and what to change.

A rising reward is no proof of reasoning. The first evaluation is what later ones are compared with.
"""

from collections.abc import Mapping, Sequence
from typing import Any

RECENT = 3  # steps that the last state of a run is judged by
HALF = 0.5  # traces or trace dependence below this share of their start raise an alarm; so do more one-token traces
FINISHED = 0.5  # so does a lower share of finished traces
UNLIKELY = 0.6  # so does a larger share of the answer term, over TERM_STEPS steps, on traces that leave it unlikely
TERM_STEPS = 10
USED = 1.0  # nats; a model whose answers moved less than this from the start never used its traces


def _recent(metrics: Sequence[Mapping[str, Any]], name: str, steps: int = RECENT) -> list[float]:
    """The values of the last steps; empty before there are enough."""
    values = [step[name] for step in metrics[-steps:] if step.get(name) is not None]
    return values if len(values) == steps else []


def alarms(
    metrics: Sequence[Mapping[str, Any]], evaluations: Sequence[Mapping[str, Any]], method: str = ""
) -> dict[str, str]:
    """What a reader should know about a run now, by kind; empty where nothing is wrong.

    metrics and evaluations are lines of these files; those of older versions lack some values, and the rules that need
    them are left out. The run's method decides the advice.
    """
    remedy = "use method='covrl' or 'verifree', or lower nll_weight"
    if method in ("covrl", "verifree", "grpo"):  # then it is the task: too few traces lead to the answer
        remedy = "too few traces lead to the answer: allow longer or more of them, or begin with easier questions"
    found = {}
    names = ("finished_share", "gradient_norm", "one_token_share")
    finished, norms, short = (_recent(metrics, name) for name in names)
    first, last = (evaluations[0], evaluations[-1]) if evaluations else ({}, {})
    ended = finished or [last.get("eval_finished_share", 1.0)]  # which is known before the first step
    if max(ended) < FINISHED:
        found["unfinished"] = (
            f"only {sum(ended) / len(ended):.0%} of the traces end within the limit, and an unfinished trace teaches "
            "nothing: raise max_trace_tokens, or show worked examples (trace_column, for data of your own)"
        )
    if skipped := sum(step.get("skipped") or 0 for step in metrics):
        found["not finite"] = (
            f"the updates of {skipped} steps were left out, as loss or gradient was not finite: lower learning_rate "
            "or kl_weight, or use dtype='float32'"
        )
    if short and min(short) > HALF:
        found["one token"] = (
            f"{sum(short) / len(short):.0%} of the traces are a single token, so nothing is reasoned; {remedy}"
        )
    if norms and not any(norms) and (not finished or any(finished)):  # else "unfinished" says why
        found["no gradient"] = (
            f"the gradient was 0 in the last {RECENT} steps, so nothing is being learned: the traces of a "
            "question all earn the same; raise rollouts_per_question or choose an easier task"
        )
    shares = _recent(metrics, "answer_term_unlikely", TERM_STEPS) if method != "jlb" else []  # whose term is small
    if shares and (share := sum(shares) / TERM_STEPS) > UNLIKELY:
        found["answer term"] = (
            f"{share:.0%} of the answer term trains on traces that leave the answer unlikely, so that answers stop "
            "following their traces: use evidence_power=2 (covrl), or lower nll_weight"
        )
    if (guess := last.get("guess_accuracy", 0)) > last.get("accuracy_low", 0):
        found["guessing"] = (
            f"accuracy is {last['accuracy']:.1%}, and the same answers would score {guess:.1%} on other questions: the "
            "model guesses, and accuracy moves with its favourite answer; begin with easier questions or a larger "
            "model, as rewards cannot teach what is never right"
        )
    if cut := last.get("eval_scoring_cut"):
        found["scoring cut"] = (
            f"{cut} answers were cut by the scorer's limit and count as wrong: their scoring_cut is set"
        )
    if len(evaluations) < 2:
        return found

    def change(name: str) -> tuple[float, float] | None:
        pair = first.get(name), last.get(name)
        return None if None in pair else pair

    dependence, length = change("trace_dependence"), change("eval_trace_tokens")
    answer, accuracy = change("answer_logprob"), change("accuracy")
    if dependence and dependence[0] >= USED and dependence[1] < HALF * dependence[0]:
        found["trace dependence"] = (
            f"the answer depends less on the trace: log p(y|x,z) moves by {dependence[1]:.1f} nats when the "
            f"trace is exchanged, {dependence[0]:.1f} before training; {remedy}"
        )
    if length and length[1] < HALF * length[0]:
        found["trace length"] = (
            f"traces have shrunk from {length[0]:.0f} to {length[1]:.0f} tokens, so the model may be "
            f"unlearning to reason; {remedy}"
        )
    if answer and accuracy and answer[1] > answer[0] + 1 and last["accuracy_high"] < accuracy[0]:
        found["reward without accuracy"] = (
            f"log p(y|x,z) rose from {answer[0]:.1f} to {answer[1]:.1f} nats while accuracy fell from "
            f"{accuracy[0]:.1%} to {accuracy[1]:.1%}: the reward is no longer about right answers; {remedy}"
        )
    return found
