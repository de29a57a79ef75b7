"""From a configuration to what a run works with: its task, its prompts, its policy."""

from __future__ import annotations

from dataclasses import fields

from ..config import RunConfig
from .models import load_policy, load_tokenizer
from .policy import Policy
from .prompts import Prompter
from .tasks import Task, TaskSettings, load_task


def task_settings(config: RunConfig) -> TaskSettings:
    """What a configuration says about its task."""
    return TaskSettings(**{field.name: getattr(config, field.name) for field in fields(TaskSettings)})


def open_task(config: RunConfig) -> tuple[Task, Prompter]:
    """Load the task and the tokenizer, but no weights. Raises ConfigError."""
    task = load_task(config.task, **vars(task_settings(config)))
    return task, Prompter(load_tokenizer(config.model), task.demonstrations, config.prompt_style)


def open_policy(config: RunConfig, *, adapter: bool = True) -> Policy:
    """Load the model with a new adapter, or without one. Raises ConfigError."""
    names = ("quantization", "dtype", "lora_rank", "lora_alpha", "seed", "device", "gradient_checkpointing")
    settings = {name: getattr(config, name) for name in names}
    return load_policy(config.model, **settings | ({} if adapter else {"lora_rank": 0}))


def open_model(config: RunConfig, *, adapter: bool = True) -> tuple[Task, Prompter, Policy]:
    """Load task, prompter and policy as they are at the start of a run. Raises ConfigError."""
    return *open_task(config), open_policy(config, adapter=adapter)
