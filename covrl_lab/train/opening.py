"""From a configuration to what a run works with: its task, its prompts, its policy."""

from __future__ import annotations

from ..config import RunConfig
from .models import load_policy, load_tokenizer
from .policy import Policy
from .prompts import Prompter
from .tasks import Task, TaskSettings, load_task


def open_task(config: RunConfig) -> tuple[Task, Prompter]:
    """Load the task and the tokenizer, but no weights. Raises ConfigError."""
    task = load_task(config.task, **vars(TaskSettings.of(config)))
    return task, Prompter(load_tokenizer(config.model), task.demonstrations, config.prompt_style)


def open_policy(config: RunConfig, *, adapter: bool = True) -> Policy:
    """Load the model with a new adapter, or without one. Raises ConfigError."""
    return load_policy(
        config.model,
        quantization=config.quantization,
        dtype=config.dtype,
        lora_rank=config.lora_rank if adapter else 0,
        lora_alpha=config.lora_alpha,
        seed=config.seed,
        device=config.device,
        gradient_checkpointing=config.gradient_checkpointing,
    )


def open_model(config: RunConfig, *, adapter: bool = True) -> tuple[Task, Prompter, Policy]:
    """Load task, prompter and policy as they are at the start of a run. Raises ConfigError."""
    return *open_task(config), open_policy(config, adapter=adapter)
