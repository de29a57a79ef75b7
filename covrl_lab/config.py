"""One flat, validated configuration; its fields are the parameters of every notebook.

A setting left at ``None`` takes the value the chosen method defines in ``METHOD_DEFAULTS``, so that
``RunConfig(method="jlb")`` is JLB without further settings and ``config.json`` records the value used.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
from collections.abc import Iterable
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from .defaults import METHOD_DEFAULTS, METHOD_SETTINGS, UNREAD
from .files import write_whole
from .types import ConfigError, did_you_mean

CHOICES: dict[str, tuple[str, ...]] = {
    "quantization": ("nf4", "none"),
    "dtype": ("bfloat16", "float32"),
    "prompt_style": ("auto", "few_shot", "chat"),
    "method": tuple(METHOD_DEFAULTS),
    "source_split": ("stratified", "bernoulli"),
    "reward": ("sum_logprob", "mean_logprob", "probability", "mean_probability", "verdict"),
    "baseline": ("mean", "leave_one_out", "none"),
    "advantage_scale": ("std", "none"),
    "clip": ("ppo", "soft", "none"),
    "loss_aggregation": ("token_mean", "trace_sum"),
    "kl_gradient": ("exact", "published"),
    "nll_gate": ("prior_positive", "none", "reward"),
    "lr_schedule": ("cosine", "constant"),
    "tracker": ("none", "tensorboard", "wandb", "trackio"),
}

# Least and largest value, and the rule in words. The least positive float stands for "above 0".
_TINY = math.ulp(0.0)
_SHARE = (0, 1, "between 0 and 1")
_POSITIVE = (_TINY, math.inf, "above 0")
_NOT_NEGATIVE = (0, math.inf, "0 or more")
_COUNT = (1, math.inf, "1 or more")
RANGES: dict[str, tuple[float, float, str]] = {
    **dict.fromkeys(("alpha", "composite_weight", "alpha_rate"), _SHARE),
    "top_p": (_TINY, 1, "above 0 and at most 1"),
    "temperature": (_TINY, math.inf, "above 0 (greedy decoding belongs to evaluation)"),
    **dict.fromkeys("clip_range clip_range_high learning_rate max_grad_norm".split(), _POSITIVE),
    **dict.fromkeys(
        "kl_weight nll_weight advantage_clip unfinished_penalty weight_decay reference_kl_weight std_filter "
        "evidence_floor posterior_weight "
        "steps eval_every eval_samples warmup_steps demonstrations".split(),
        _NOT_NEGATIVE,
    ),
    **dict.fromkeys(
        "questions_per_step rollouts_per_question max_trace_tokens eval_questions checkpoint_every "
        "updates_per_step n_sample max_answer_tokens max_packed_tokens lora_rank lora_alpha".split(),
        _COUNT,
    ),
    "seed": (0, 2**32 - 1, "from 0 to 2**32 - 1"),
}

_LITERALS = str | int | float | bool | None | list | tuple | dict


class _Checked(type):
    """Makes a keyword that is no field a ConfigError that gives the nearest name."""

    def __call__(cls, *args: Any, **settings: Any) -> Any:
        valid = [f.name for f in fields(cls)]  # type: ignore[arg-type]
        for name in settings:
            if name not in valid:
                raise ConfigError(f"unknown setting {name!r}{did_you_mean(name, valid)}")
        return super().__call__(*args, **settings)


@dataclass(frozen=True)
class RunConfig(metaclass=_Checked):
    """Everything that decides a run's numbers. Units are in the names; ``None`` means the method's own.

    Raises ``ConfigError`` with one sentence for the first setting that cannot work.
    """

    # --- model
    model: str = "smollm2-135m"  # "smollm2-135m", "tiny", a Hugging Face id, or a local folder
    quantization: str = "nf4"  # "nf4" (QLoRA: 4-bit base, double quantisation) or "none"
    dtype: str = "bfloat16"  # compute type of the base model: "bfloat16" or "float32"
    lora_rank: int = 16
    lora_alpha: int = 32  # LoRA scaling is lora_alpha / lora_rank
    gradient_checkpointing: bool = False
    device: str = "auto"  # "auto", "cpu", "cuda"
    # --- task and prompts
    task: str = "arithmetic"  # built-in, "reasoning_gym/NAME", "hf/OWNER/NAME", or a .jsonl/.csv/.parquet file
    difficulty: int | None = None  # 1..5, built-in tasks only
    demonstrations: int = 3  # worked examples in few-shot prompts
    prompt_style: str = "auto"  # "few_shot", "chat", or "auto": few-shot where the task has demonstrations
    question_column: str | None = None  # files and datasets: column names
    answer_column: str | None = None
    trace_column: str | None = None
    dataset_config: str | None = None
    dataset_split: str | None = None
    # --- method
    method: str = "covrl"
    alpha: float | None = None  # share of traces drawn from the prior prompt
    composite_weight: float | None = None  # w of the composite p' = w p + (1 - w) q
    reward: str | None = None
    baseline: str | None = None  # "mean" of the group, "leave_one_out", "none"
    advantage_scale: str | None = None  # "std": divide by the group's standard deviation
    advantage_clip: float | None = None  # 0: off
    clip: str | None = None  # "ppo", "soft", "none"
    clip_range: float | None = None  # epsilon of either clip: ratios from 1 - clip_range ...
    clip_range_high: float | None = None  # ... to 1 + clip_range_high
    kl_weight: float | None = None  # beta of KL(p'||p)
    kl_gradient: str = "exact"  # "exact" or "published"
    nll_weight: float | None = None  # factor of -log p(y|x,z)
    nll_gate: str | None = None  # "prior_positive", "none" (every trace), "reward" (weighted by it)
    n_sample: int | None = None  # traces inside the logarithm; above 1 with "jlb" only (JEPO)
    reference_kl_weight: float | None = None  # KL to the frozen base inside the reward (LaTRO)
    std_filter: float | None = None  # drop groups whose reward varies less than this share of average (RLPR)
    loss_aggregation: str | None = None  # "token_mean", or "trace_sum": sum per trace, mean over traces
    unfinished_penalty: float = 1.0  # an unfinished trace earns its group's worst reward minus this
    evidence_floor: float | None = None  # c = p(y|x without a trace) ^ this, what a trace must explain better
    posterior_weight: float | None = None  # factor of the term that draws q towards p(z|x,y)
    alpha_rate: float | None = None  # 0: alpha stays; else how fast it follows the evidence upwards, a step
    # --- sampling
    steps: int = 40
    questions_per_step: int = 8
    rollouts_per_question: int = 4
    max_trace_tokens: int = 28
    temperature: float = 1.0
    top_p: float = 1.0
    source_split: str = "stratified"  # per group, or "bernoulli" per trace as in the paper
    # --- optimisation
    learning_rate: float = 2e-4
    lr_schedule: str = "cosine"
    warmup_steps: int = 4
    max_grad_norm: float = 1.0
    weight_decay: float = 0.0
    updates_per_step: int = 1
    max_packed_tokens: int = 4096  # tokens in one forward; longer steps are cut into micro-batches
    seed: int = 0
    # --- evaluation and output
    eval_every: int = 10  # steps; 0: only before and after
    eval_questions: int = 64
    eval_samples: int = 0  # sampled generations a question for avg@k; 0: greedy only
    max_answer_tokens: int = 12
    checkpoint_every: int = 10  # steps
    run_dir: str | None = None  # None: runs/<task>-<method>-<hash of this configuration>
    tracker: str = "none"

    def __post_init__(self) -> None:
        _check_types(self)
        for name, valid in CHOICES.items():
            value = getattr(self, name)
            if value is not None and value not in valid:
                raise ConfigError(f"unknown {name} {value!r}{did_you_mean(value, valid)}")
        if self.clip_range is not None and self.clip_range_high is None:
            object.__setattr__(self, "clip_range_high", self.clip_range)  # alone it moves both bounds
        for name, value in METHOD_DEFAULTS[self.method].items():
            if getattr(self, name) is None:
                object.__setattr__(self, name, value)
        _check_ranges(self)
        _refuse_unread(self)
        if self.run_dir is None:
            task = Path(self.task).stem if "." in self.task else self.task.replace("/", "-")
            object.__setattr__(self, "run_dir", f"runs/{task}-{self.method}-{self.run_id()}")

    # --- JSON in and out
    def to_dict(self) -> dict[str, Any]:
        """Every field with its resolved value."""
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, settings: dict[str, Any]) -> RunConfig:
        """Build from settings by name; an unknown name is an error that gives the nearest valid one."""
        return cls(**settings)

    @classmethod
    def from_namespace(cls, names: dict[str, Any], also: Iterable[str] = ()) -> RunConfig:
        """Build from a notebook's variables, ``globals()``, after ``check_parameters``.

        ``also`` names the notebook's own parameters.
        """
        valid = [f.name for f in fields(cls)]
        check_parameters(names, [*valid, *also])
        plain = {name: names[name] for name in valid if name in names}
        return cls(**{name: value for name, value in plain.items() if isinstance(value, _LITERALS)})

    def save(self, path: str | Path) -> None:
        """Write ``config.json``."""
        write_whole(path, json.dumps(self.to_dict(), indent=2) + "\n")

    @classmethod
    def load(cls, path: str | Path) -> RunConfig:
        """Read what ``save`` wrote."""
        try:
            settings = json.loads(Path(path).read_text(encoding="utf-8"))
        except ValueError as error:
            raise ConfigError(
                f"{str(path)!r} cannot be read ({error}); remove it or choose another run_dir"
            ) from error
        if settings.get("method") == "covrl" and "evidence_floor" not in settings:
            settings["method"] = "covrl_published"  # what earlier versions called covrl
        return cls.from_dict(settings)

    def differences(self, other: RunConfig) -> dict[str, tuple[Any, Any]]:
        """Settings that change the numbers and differ, as ``{name: (self, other)}``."""
        mine, theirs = self._numbers(), other._numbers()
        return {k: (mine[k], theirs[k]) for k in mine if mine[k] != theirs[k]}

    def run_id(self) -> str:
        """Eight hexadecimal digits that name this configuration, the same on every machine."""
        return hashlib.sha256(json.dumps(self._numbers(), sort_keys=True).encode()).hexdigest()[:8]

    def _numbers(self) -> dict[str, Any]:
        """The settings that change a run's numbers."""
        others = ("run_dir", "tracker", "checkpoint_every")
        return {k: v for k, v in self.to_dict().items() if k not in others}


def _check_types(config: RunConfig) -> None:
    """Accept what papermill delivers: ints for floats, whole floats and numeric strings for numbers."""
    for f in fields(config):
        value = getattr(config, f.name)
        if value is None and "None" in f.type:
            continue
        kind = f.type.split(" |")[0]
        try:
            if kind == "float" and not isinstance(value, bool):
                fixed: Any = float(value)
            elif kind == "int" and not isinstance(value, bool) and float(value) == int(float(value)):
                fixed = int(float(value))
            elif kind == "str" and isinstance(value, str | Path):
                fixed = str(value)
            elif kind == "bool" and isinstance(value, bool):
                fixed = value
            else:
                raise ValueError
            if kind == "float" and not math.isfinite(fixed):
                raise ValueError
        except (TypeError, ValueError, OverflowError):
            names = {
                "float": "a finite number",
                "int": "a whole number",
                "str": "text",
                "bool": "True or False",
            }
            raise ConfigError(f"{f.name} must be {names[kind]}, not {value!r}") from None
        object.__setattr__(config, f.name, fixed)


def _refuse_unread(config: RunConfig) -> None:
    """A setting that the method does not read would have no effect, and yet stand in the record."""
    read = METHOD_SETTINGS[config.method]
    for name, default in {**METHOD_DEFAULTS[config.method], **UNREAD}.items():
        if name not in read and (value := getattr(config, name)) != default:
            raise ConfigError(
                f"method={config.method!r} does not use {name}, so {name}={value!r} would have no effect; "
                f"leave it out (it uses: {', '.join(sorted(read))})"
            )


def _check_ranges(config: RunConfig) -> None:
    """ConfigError for the first value out of range, or that does not go with another."""

    def need(ok: bool, name: str, rule: str) -> None:
        if not ok:
            raise ConfigError(f"{name} must be {rule}, not {getattr(config, name)!r}")

    for name, (low, high, rule) in RANGES.items():
        need(low <= getattr(config, name) <= high, name, rule)
    if config.n_sample > 1:
        need(config.method == "jlb", "n_sample", "1 unless method='jlb'")
        need(config.reward == "sum_logprob", "reward", "'sum_logprob' when n_sample is above 1")
        need(
            config.rollouts_per_question % config.n_sample == 0,
            "n_sample",
            "a divisor of rollouts_per_question",
        )
    if config.nll_gate == "reward" and "probability" not in config.reward:
        raise ConfigError("nll_gate='reward' needs reward='probability' or 'mean_probability': weights >= 0")
    if (config.reward == "verdict") != (config.method == "grpo"):
        raise ConfigError("reward='verdict' goes with method='grpo' and with no other; leave reward at None")
    if config.baseline != "none":
        rule = f"2 or more with baseline={config.baseline!r}: one trace alone has nothing to be compared with"
        need(config.rollouts_per_question >= 2, "rollouts_per_question", rule)
    if config.nll_gate == "prior_positive" and config.nll_weight:
        need(config.alpha > 0, "alpha", "above 0 with nll_gate='prior_positive', which needs prior traces")
    if config.method == "latro":
        rule = "'sum_logprob' or 'mean_logprob' with method='latro': its KL is taken off a log-probability"
        need("logprob" in config.reward, "reward", rule)
    if config.composite_weight == 0:
        need(config.alpha == 0 or config.clip != "none", "alpha", "0 when composite_weight is 0, or set a clip")
    if config.composite_weight == 1:
        need(config.alpha > 0, "alpha", "above 0 when composite_weight is 1: p' = p needs prior traces")


def check_parameters(names: dict[str, Any], valid: Iterable[str]) -> None:
    """ConfigError for a plain value in a notebook's variables, ``globals()``, that is none of its parameters.

    So a misspelt parameter is an error whether papermill injected it or a person typed it. Call it in the
    first cell after the parameters. Not looked at: names with an underscore, IPython's own, and values that
    are no literals (modules, functions, objects). Later calls check nothing: by then the notebook's own
    variables stand beside its parameters.
    """
    if names.get("_parameters_checked"):
        return
    valid = list(valid)
    for name, value in names.items():
        plain = not name.startswith("_") and name not in ("In", "Out") and isinstance(value, _LITERALS)
        if plain and name not in valid:
            raise ConfigError(f"unknown parameter {name!r}{did_you_mean(name, valid)}")
    names["_parameters_checked"] = True
