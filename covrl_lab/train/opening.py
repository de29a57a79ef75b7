"""From a configuration to what a run works with: its task, its prompts, its policy."""

from __future__ import annotations

from typing import Any

from ..config import RunConfig
from .models import load_policy, load_tokenizer
from .policy import Policy
from .prompts import Prompter
from .tasks import Task, load_task


def task_settings(config: RunConfig) -> dict[str, Any]:
    """The keyword arguments of ``load_task`` and ``check_task``."""
    names = ("difficulty", "demonstrations", "question_column", "answer_column", "trace_column")
    return {name: getattr(config, name) for name in (*names, "dataset_config", "dataset_split")}


def open_task(config: RunConfig) -> tuple[Task, Prompter]:
    """Load the task and the tokenizer, but no weights. Raises ConfigError."""
    task = load_task(config.task, **task_settings(config))
    return task, Prompter(load_tokenizer(config.model), task.demonstrations, config.prompt_style)


def open_policy(config: RunConfig, *, adapter: bool = True) -> Policy:
    """Load the model with a new adapter, or without one. Raises ConfigError."""
    names = ("quantization", "dtype", "lora_rank", "lora_alpha", "seed", "device", "gradient_checkpointing")
    settings = {name: getattr(config, name) for name in names}
    return load_policy(config.model, **settings | ({} if adapter else {"lora_rank": 0}))


def open_model(config: RunConfig, *, adapter: bool = True) -> tuple[Task, Prompter, Policy]:
    """Load task, prompter and policy as they are at the start of a run. Raises ConfigError."""
    return *open_task(config), open_policy(config, adapter=adapter)
