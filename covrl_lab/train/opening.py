"""From a configuration to what a run works with: its task, its prompts, its policy."""

import logging
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from ..config import RunConfig
from ..types import ConfigError, Example
from .evaluation import EvalSet
from .models import load_policy, load_tokenizer
from .plan import Plan
from .policy import Policy
from .presets import CHATS, PRESETS
from .prompts import FEW_SHOT, PLAIN, Prompter
from .tasks import Task, eval_config, load_task

LOG = logging.getLogger(__name__)


def open_task(config: RunConfig) -> tuple[Task, Prompter]:
    """Load the task and the tokenizer, but no weights. Raises ConfigError."""
    task = load_task(config)
    chat = CHATS.get(config.model, PLAIN)
    chat = replace(chat, think_tag=config.think_tag or chat.think_tag, system=config.system_prompt or chat.system)
    prompter = Prompter(load_tokenizer(config.model), task.demonstrations, config.prompt_style, chat)
    begun = Path(config.run_dir, "config.json").exists()  # by an earlier version: it resumes
    if prompter.style is FEW_SHOT and (config.think_tag or config.system_prompt) and not begun:
        name = "think_tag" if config.think_tag else "system_prompt"
        raise ConfigError(
            f"{name} is for chat prompts, and these are few-shot; leave it out, or set prompt_style='chat'"
        )
    return task, prompter


def open_examples(
    config: RunConfig, task: Task, prompter: Prompter, verified: bool, max_context: int
) -> tuple[Task, list[EvalSet]]:
    """The task with the rows that can be trained on, and the sets to evaluate, before a model is loaded.

    Every row of a finite data set is looked at; one whose bytes fit the model's context is not encoded, as a token
    holds at least a byte. Bad rows are left out and logged where ``bad_rows`` or a preset says so; otherwise the first
    is a ConfigError. ``verified``: training grades answers, too.
    """
    longest, wrapper = max(config.max_trace_tokens, config.eval_max_trace_tokens or 0), []

    def graded(example: Example) -> None:
        prompt = prompter.fitting(example, longest, max_context, config.max_answer_tokens)
        needed = len(prompt.answer)
        if needed > config.max_answer_tokens:
            raise ConfigError(
                f"the answer of example {example.place!r} takes {needed} tokens with its end, and max_answer_tokens="
                f"{config.max_answer_tokens} would cut it and count it wrong; set max_answer_tokens to {needed} or more"
            )

    def trained(example: Example) -> None:
        prompter.check_answer(example)
        wrapper[1:] or wrapper.extend(map(len, vars(prompter(example)).values()))  # more than any row's own
        size = sum(wrapper) + len(example.question.encode()) + 2 * len(example.answer.encode())
        if size + config.max_trace_tokens + config.max_answer_tokens > max_context:
            prompter.fitting(example, config.max_trace_tokens, max_context, config.max_answer_tokens)

    def fault(task: Task, check: Callable[[Example], None], example: Example) -> str:
        """Why an example cannot be used, "" where it can. ConfigError where bad rows are refused."""
        try:
            check(example)
        except ConfigError as error:
            if config.bad_rows == "refuse" and task.name not in PRESETS or not task.rows():
                raise
            return str(error)
        return ""

    sets, count, elsewhere = [], config.eval_questions, []
    for name, samples in config.eval_sets() or [("", config.eval_samples)]:
        own = name in ("", config.task)
        tested = task if own else load_task(eval_config(config, name))
        examples, bad = [], {}
        for example in tested.whole(count, held_out=own):
            if len(examples) == count:
                break
            if reason := fault(tested, graded, example):
                bad[example.metadata["row"]] = reason
            else:
                examples.append(example)
        tested = tested.without_rows(bad) if bad else tested
        if own:
            task = tested
        else:
            elsewhere += examples
            _say_bad_rows(tested)
        examples = examples if name else tested.held_out(count)  # refused where there are too few
        if not examples:
            raise ConfigError(f"no question of {tested.name!r} can be evaluated; raise max_answer_tokens or add rows")
        sets.append(EvalSet(name, tested, examples, samples))
    check = graded if verified else trained
    if bad := {e.metadata["row"]: why for e in task.rows() if (why := fault(task, check, e))}:
        task = task.without_rows(bad)
    _say_bad_rows(task)
    return task.without(elsewhere), sets


def _say_bad_rows(task: Task) -> None:
    if bad := sorted(task.bad_rows.items()):
        numbers, reasons = ", ".join(str(n) for n, _ in bad[:20]), "; ".join(f"row {n} {why}" for n, why in bad[:3])
        LOG.warning("%s: %d rows are skipped, numbers %s: %s", task.name, len(bad), numbers, reasons)


def open_policy(config: RunConfig, *, adapter: bool = True, made: Plan | None = None) -> Policy:
    """Load the model with a new adapter, or without one; it keeps within what is planned. Raises ConfigError."""
    names = "quantization dtype lora_rank lora_alpha seed device memory_gib".split()
    settings = {name: getattr(config, name) for name in names} | ({} if adapter else {"lora_rank": 0})
    recompute = config.gradient_checkpointing is True  # where it is still "auto", nothing is trained
    policy = load_policy(config.model, **settings, gradient_checkpointing=recompute)
    if made:
        policy.rows_at_once, policy.tokens_at_once, policy.room = made.rows, made.config.max_packed_tokens, made.room
    return policy


def open_model(config: RunConfig, *, adapter: bool = True) -> tuple[Task, Prompter, Policy]:
    """Load task, prompter and policy as they are at the start of a run. Raises ConfigError."""
    return *open_task(config), open_policy(config, adapter=adapter)
