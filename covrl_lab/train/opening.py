"""From a configuration to what a run works with: its task, its prompts, its policy."""

from __future__ import annotations

from collections.abc import Sequence

from ..config import RunConfig
from ..types import ConfigError, Example
from .models import load_policy, load_tokenizer
from .policy import Policy
from .prompts import Prompter
from .tasks import Task, TaskSettings, load_task


def open_task(config: RunConfig) -> tuple[Task, Prompter]:
    """Load the task and the tokenizer, but no weights. Raises ConfigError."""
    task = load_task(config.task, **vars(TaskSettings.of(config)))
    return task, Prompter(load_tokenizer(config.model), task.demonstrations, config.prompt_style)


def check_examples(
    config: RunConfig, task: Task, prompter: Prompter, evaluated: Sequence[Example], verified: bool, max_context: int
) -> None:
    """Raise ConfigError for an example that cannot be trained on or evaluated, before a model is loaded.

    ``evaluated`` are held-out examples. Of a finite data set every row is looked at; one whose bytes fit the model's
    context is not encoded, as a token holds at least a byte. ``verified``: training grades answers, too.
    """
    rows = task.rows()
    limits = (config.max_trace_tokens, max_context)
    for example in [*evaluated, *(rows if verified else ())]:
        prompt = prompter(example)
        prompter.check_length(prompt, *limits, example.place, config.max_answer_tokens)
        needed = len(prompt.answer)
        if needed > config.max_answer_tokens:
            raise ConfigError(
                f"the answer of example {example.place!r} takes {needed} tokens with its end, and max_answer_tokens="
                f"{config.max_answer_tokens} would cut it and count it wrong; set max_answer_tokens to {needed} or more"
            )
    if verified or not rows:
        return
    wrapper = sum(map(len, vars(prompter(rows[0])).values()))  # more than any row's own
    for example in rows:
        prompter.check_answer(example)
        size = len(example.question.encode()) + 2 * len(example.answer.encode())
        if wrapper + size + config.max_trace_tokens + config.max_answer_tokens > max_context:
            prompter.check_length(prompter(example), *limits, example.place, config.max_answer_tokens)


def open_policy(config: RunConfig, *, adapter: bool = True, rows: int | None = None) -> Policy:
    """Load the model with a new adapter, or without one; ``rows`` are decoded at once. Raises ConfigError."""
    names = "quantization dtype lora_rank lora_alpha seed device memory_gib".split()
    settings = {name: getattr(config, name) for name in names} | ({} if adapter else {"lora_rank": 0})
    recompute = config.gradient_checkpointing is True  # where it is still "auto", nothing is trained
    policy = load_policy(config.model, **settings, gradient_checkpointing=recompute)
    policy.rows_at_once = rows
    return policy


def open_model(config: RunConfig, *, adapter: bool = True) -> tuple[Task, Prompter, Policy]:
    """Load task, prompter and policy as they are at the start of a run. Raises ConfigError."""
    return *open_task(config), open_policy(config, adapter=adapter)
