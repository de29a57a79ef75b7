"""One flat, validated configuration; its fields are the parameters of every notebook.

A setting left at ``None`` takes the value the chosen method defines in ``METHOD_DEFAULTS``, so that
``RunConfig(method="jlb")`` is JLB without further settings and ``config.json`` records the value used.
"""

import dataclasses
import hashlib
import json
import math
import os
from collections.abc import Iterable
from dataclasses import dataclass, fields
from pathlib import Path
from types import NoneType
from typing import Annotated, Any, Literal, NamedTuple, Self, get_args, get_origin

from .defaults import METHOD_DEFAULTS, METHOD_SETTINGS, UNREAD
from .files import read_object, write_whole
from .types import UNFIT, ConfigError, did_you_mean


class Range(NamedTuple):
    """Least and largest value of a setting, and the rule in words."""

    low: float
    high: float
    words: str


# The upper ends lie where memory or float32 cannot follow, or where a slip of the keyboard is the likelier reason.
Share = Annotated[float, Range(0, 1, "between 0 and 1")]
Positive = Annotated[float, Range(1e-12, 1e9, "above 0, from 1e-12 to 1e9")]
NotNegative = Annotated[float, Range(0, 1e6, "0 or more and at most 1e6")]
Few = Annotated[int, Range(1, 1000, "1 or more and at most 1,000")]
Count = Annotated[int, Range(1, 1e6, "1 or more and at most 1,000,000")]
CountOrZero = Annotated[int, Range(0, 1e6, "0 or more and at most 1,000,000")]
Temperature = Annotated[float, Range(1e-4, 1e4, "above 0 (greedy decoding belongs to evaluation), from 1e-4 to 1e4")]
TopP = Annotated[float, Range(math.ulp(0.0), 1, "above 0 and at most 1")]

Auto = Literal["auto"]  # chosen before the run, from the memory there is (train/plan.py)
# What "auto" stands for where runs are named and compared: on any machine the same, as it changes rounding only.
_AUTO = {"gradient_checkpointing": False, "max_packed_tokens": 4096, "dtype": "bfloat16"}
_BEFORE = {"evidence_power": 1.0}  # what later settings were before they could be set, where a method has a default
# Settings that came later. Left out of a run's id where they are not set, so that earlier runs keep theirs.
_LATER = "bad_rows think_tag system_prompt eval_task eval_temperature eval_top_p eval_max_trace_tokens".split()
_LATER += _BEFORE
# What Transformers, PEFT and TRL call some of our settings.
ELSEWHERE = {
    "rollouts_per_question": "num_generations group_size num_rollouts",
    "max_trace_tokens": "max_completion_length max_new_tokens",
    "questions_per_step": "batch_size per_device_train_batch_size",
    "learning_rate": "lr",
    "lr_schedule": "lr_scheduler_type",
    "kl_weight": "beta kl_coef",
    "clip_range": "epsilon cliprange",
    "clip_range_high": "epsilon_high",
    "steps": "max_steps num_steps",
    "eval_every": "eval_steps",
    "checkpoint_every": "save_steps",
    "model": "model_name_or_path model_name model_id",
    "task": "dataset dataset_name",
    "lora_rank": "lora_r r",
    "quantization": "load_in_4bit",
    "run_dir": "output_dir",
    "tracker": "report_to",
}
_LITERALS = str | int | float | bool | None | list | tuple | dict
_KINDS = {float: "a finite number", int: "a whole number", bool: "True or False"}
_KINDS[str] = "text of at most 1,000 characters without NUL"


class FieldType(NamedTuple):
    """What a field of ``RunConfig`` takes; a number or a truth value may have a choice besides: "auto"."""

    kind: type
    optional: bool
    choices: tuple[str, ...]
    range: Range | None


def field_type(field: dataclasses.Field) -> FieldType:
    """Read a field's annotation: ``int``, ``Share | None``, ``Literal["a", "b"]`` and the like."""
    hint, parts = field.type, get_args(field.type)
    optional, choices = NoneType in parts, get_args(Auto) if Auto in parts else ()
    if optional or choices:
        hint = parts[0]
    if get_origin(hint) is Literal:
        return FieldType(str, optional, get_args(hint), None)
    kind, *rules = get_args(hint) or (hint,)
    return FieldType(kind, optional, choices, rules[0] if rules else None)


def unknown_name(kind: str, name: str, valid: Iterable[str]) -> ConfigError:
    """The error for a name that is no ``kind``, with the valid one that is nearest, or is called so elsewhere."""
    valid = list(valid)
    ours = [setting for setting, theirs in ELSEWHERE.items() if setting in valid and name in theirs.split()]
    hint = f"; did you mean {ours[0]!r}?" if ours else did_you_mean(name, valid)
    return ConfigError(f"unknown {kind} {name!r}{hint}")


class _Checked(type):
    """Makes a keyword that is no field a ConfigError that gives the nearest name."""

    def __call__(cls, *args: Any, **settings: Any) -> Any:
        valid = [f.name for f in fields(cls)]  # type: ignore[arg-type]
        for name in settings:
            if name not in valid:
                raise unknown_name("setting", name, valid)
        return super().__call__(*args, **settings)


@dataclass(frozen=True)
class RunConfig(metaclass=_Checked):
    """Everything that decides a run's numbers. Units are in the names; ``None`` means the method's own.

    Raises ``ConfigError`` with one sentence for the first setting that cannot work.
    """

    # --- model
    model: str = "smollm2-135m"  # "smollm2-135m", "tiny", a Hugging Face id, or a local folder
    quantization: Literal["nf4", "none"] = "nf4"  # "nf4": QLoRA with double quantisation
    dtype: Literal["auto", "bfloat16", "float32"] = "auto"  # of the base model's products; auto: what is fast there
    lora_rank: Few = 16  # rank of the adapter's matrices
    lora_alpha: Count = 32  # LoRA scaling is lora_alpha / lora_rank
    gradient_checkpointing: bool | Auto = "auto"  # auto: where activations would not fit
    device: str = "auto"  # "auto", "cpu", "cuda"
    memory_gib: Positive | None = None  # of the device, for this run; None: all. A run that needs more is refused
    # --- task and prompts
    task: str = "arithmetic"  # built-in, "reasoning_gym/NAME", "hf/OWNER/NAME", a preset, or a file
    difficulty: int | None = None  # 1..5, built-in tasks only
    demonstrations: CountOrZero = 3  # worked examples in few-shot prompts
    prompt_style: Literal["auto", "few_shot", "chat"] = "auto"  # auto: few-shot where the task has demonstrations
    question_column: str | None = None  # name of the column, or a path as in prompt.0.content; None: "question"
    answer_column: str | None = None  # likewise, the reference answers; None: "answer"
    trace_column: str | None = None  # likewise, short workings for demonstrations, if there are any
    dataset_config: str | None = None  # of a Hugging Face data set, where it has several
    dataset_split: str | None = None  # of a Hugging Face data set; None: "train"
    bad_rows: Literal["refuse", "skip"] = "refuse"  # rows of data sets that cannot be used; presets skip them
    think_tag: Literal["think", "thinking"] | None = None  # of chat prompts; None: the model's own, see presets.CHATS
    system_prompt: str | None = None  # of chat prompts; None: the template's own
    # --- method
    method: Literal[*METHOD_DEFAULTS] = "covrl"  # how traces earn credit, and the loss: METHODS.md
    alpha: Share | None = None  # share of traces drawn from the prior prompt
    composite_weight: Share | None = None  # w of the composite p' = w p + (1 - w) q
    # made of p(y|x,z), in nats or as a probability; verdict: whether the model's own answer is right
    reward: Literal["sum_logprob", "mean_logprob", "probability", "mean_probability", "verdict"] | None = None
    baseline: Literal["mean", "leave_one_out", "none"] | None = None  # subtracted from rewards; of the group
    advantage_scale: Literal["std", "none"] | None = None  # std: divide by the group's standard deviation
    advantage_clip: NotNegative | None = None  # largest advantage; 0: off
    clip: Literal["ppo", "soft", "none"] | None = None  # of importance ratios
    clip_range: Positive | None = None  # ratios are held from 1 - clip_range ...
    clip_range_high: Positive | None = None  # ... to 1 + clip_range_high
    kl_weight: NotNegative | None = None  # factor of KL(p'||p)
    kl_gradient: Literal["exact", "published"] = "exact"  # published: differentiates its own sampling weights
    nll_weight: NotNegative | None = None  # factor of -log p(y|x,z)
    nll_gate: Literal["prior_positive", "none", "reward"] | None = None  # none: every trace; reward: weighted by it
    n_sample: Count | None = None  # traces inside the logarithm; above 1 with "jlb" only (JEPO)
    reference_kl_weight: NotNegative | None = None  # KL to the frozen base inside the reward (LaTRO)
    std_filter: NotNegative | None = None  # drop groups whose reward varies less than this share of average (RLPR)
    loss_aggregation: Literal["token_mean", "trace_sum"] | None = None  # trace_sum: sum per trace, mean over traces
    unfinished_penalty: NotNegative = 1.0  # an unfinished trace earns its group's worst reward minus this
    evidence_power: Positive | None = None  # k of p(y|x,z)^k: above 1, being right at times beats guessing as often
    evidence_floor: NotNegative | None = None  # c = p(y|x without a trace) ^ this; 0: c = 1
    posterior_weight: NotNegative | None = None  # factor of a term that draws q towards p(z|x,y); 0: none
    alpha_rate: Share | None = None  # 0: alpha stays; else how fast it follows the evidence upwards, a step
    # --- sampling
    steps: CountOrZero = 40  # training steps
    questions_per_step: Few = 8  # questions in a step
    rollouts_per_question: Few = 4  # traces of each question in a step
    max_trace_tokens: Count = 28  # tokens; a longer trace counts as unfinished
    temperature: Temperature = 1.0  # of sampled traces
    top_p: TopP = 1.0  # share of probability traces are sampled from; 1: all
    source_split: Literal["stratified", "bernoulli"] = "stratified"  # per group, or per trace as in the paper
    # --- optimisation
    learning_rate: Annotated[float, Range(1e-12, 10, "above 0, from 1e-12 to 10")] = 2e-4  # peak of the schedule
    lr_schedule: Literal["cosine", "constant"] = "cosine"  # after the warm-up; cosine: to zero at the last step
    warmup_steps: CountOrZero = 4  # steps of linear rise to the peak
    max_grad_norm: Positive = 1.0  # longer gradients are shortened to this L2 norm
    weight_decay: NotNegative = 0.0  # AdamW's
    updates_per_step: Few = 1  # optimiser updates on the traces of a step
    max_skipped_steps: CountOrZero = 0  # steps without a finite loss and gradient; one more stops the run
    max_packed_tokens: Count | Auto = "auto"  # tokens in one forward; longer steps are cut into micro-batches
    seed: Annotated[int, Range(0, 2**32 - 1, "from 0 to 2**32 - 1")] = 0  # of questions, traces and the new adapter
    # --- evaluation and output
    eval_every: CountOrZero = 10  # steps; 0: only before and after
    eval_task: str | None = None  # sets to evaluate, "NAME, NAME@FILE*SAMPLES"; None: the held-out part of the task
    eval_questions: Count | None = 64  # of each set, at most; None: all
    eval_samples: CountOrZero = 0  # sampled generations a question for avg@k; 0: greedy only
    eval_temperature: Temperature | None = None  # of sampled generations; None: temperature
    eval_top_p: TopP | None = None  # likewise
    eval_max_trace_tokens: Count | None = None  # of greedy traces, too; None: max_trace_tokens
    max_answer_tokens: Count = 12  # tokens of a generated answer
    judge_traces: bool = False  # also mark traces right or wrong; costs a greedy answer each, up to max_answer_tokens
    checkpoint_every: Count = 10  # steps between checkpoints
    run_dir: str | None = None  # None: runs/<task>-<method>-<hash of this configuration>
    tracker: Literal["none", "tensorboard", "wandb", "trackio"] = "none"  # also log there

    def __post_init__(self) -> None:
        for field in fields(self):
            object.__setattr__(self, field.name, _checked(field, getattr(self, field.name)))
        if self.clip_range is not None and self.clip_range_high is None:
            object.__setattr__(self, "clip_range_high", self.clip_range)  # alone it moves both bounds
        for name, value in METHOD_DEFAULTS[self.method].items():
            if getattr(self, name) is None:
                object.__setattr__(self, name, value)
        self.eval_sets()
        _refuse_combinations(self)
        _refuse_unread(self)
        if self.run_dir is None:
            task = Path(self.task).stem if "." in self.task else self.task.replace("/", "-")
            object.__setattr__(self, "run_dir", f"runs/{task[:60]}-{self.method}-{self.run_id()}")

    @property
    def needs_posterior(self) -> bool:
        """Whether traces must be scored under the posterior prompt: some are drawn from it, or p' != p."""
        return self.composite_weight < 1 or self.alpha < 1

    @property
    def trains_posterior(self) -> bool:
        """Whether a gradient reaches traces under the posterior prompt; else their log-probabilities are enough."""
        return self.composite_weight < 1 or (self.alpha < 1 and self.posterior_weight > 0)

    def eval_sets(self) -> list[tuple[str, int]]:
        """(task, samples a question) of every set in ``eval_task``; none where it is None."""
        found = {}
        for entry in filter(None, map(str.strip, (self.eval_task or "").split(","))):
            name, star, samples = map(str.strip, entry.partition("*"))
            if name in found:
                raise ConfigError(f"eval_task names {name!r} twice; name each set once")
            if star and not samples.isdigit():
                raise ConfigError(f"eval_task must say how many samples as in 'gsm8k*4', not {entry!r}")
            found[name] = int(samples) if star else self.eval_samples
        return list(found.items())

    # --- JSON in and out
    def to_dict(self) -> dict[str, Any]:
        """Every field with its resolved value."""
        return dict(vars(self))

    @classmethod
    def from_dict(cls, settings: dict[str, Any]) -> Self:
        """Build from settings by name; an unknown name is an error that gives the nearest valid one."""
        return cls(**settings)

    @classmethod
    def from_namespace(cls, names: dict[str, Any], also: Iterable[str] = ()) -> Self:
        """Build from a notebook's variables, ``globals()``; ``also`` names its own parameters. Checked as below."""
        return cls(**cls.settings_in(names, also))

    @classmethod
    def settings_in(
        cls, names: dict[str, Any], also: Iterable[str] = (), varied: Iterable[str] = ()
    ) -> dict[str, Any]:
        """The settings among a notebook's variables but the ``varied`` ones of its grid; only names are checked."""
        valid = [f.name for f in fields(cls) if f.name not in varied]
        check_parameters(names, [*valid, *also])
        return {name: names[name] for name in valid if name in names and isinstance(names[name], _LITERALS)}

    def save(self, path: str | Path) -> None:
        """Write ``config.json``."""
        write_whole(path, json.dumps(self.to_dict(), indent=2) + "\n")

    @classmethod
    def load(cls, path: str | Path) -> Self:
        """Read what ``save`` wrote."""
        settings = _BEFORE | read_object(path, "restore it, or remove it or choose another run_dir")
        if settings.get("method") == "covrl" and "evidence_floor" not in settings:
            settings["method"] = "covrl_published"  # what earlier versions called covrl
        try:
            return cls.from_dict(settings)
        except ConfigError as error:
            raise ConfigError(f"{error} (in {str(path)!r})") from error

    def differences(self, other: "RunConfig") -> dict[str, tuple[Any, Any]]:
        """Settings that change the numbers and differ, as ``{name: (self, other)}``."""
        mine, theirs = ({**config.to_dict(), **config._numbers()} for config in (self, other))
        pairs = {k: (mine[k], theirs[k]) for k in mine if k in self._numbers() or k in other._numbers()}
        return {name: pair for name, pair in pairs.items() if pair[0] != pair[1]}

    def run_id(self) -> str:
        """Eight hexadecimal digits that name this configuration, the same on every machine."""
        return hashlib.sha256(json.dumps(self._numbers(), sort_keys=True).encode()).hexdigest()[:8]

    def _numbers(self) -> dict[str, Any]:
        """The settings that change a run's numbers; later ones only where they are set, so that names stay."""
        others = ("run_dir", "tracker", "checkpoint_every", "judge_traces", "max_skipped_steps", "memory_gib")
        unset = [
            f.name
            for f in fields(self)
            if f.name in _LATER and getattr(self, f.name) == _BEFORE.get(f.name, f.default)
        ]
        settings = {k: v for k, v in self.to_dict().items() if k not in others and k not in unset}
        return settings | {k: v for k, v in _AUTO.items() if settings[k] == "auto"}


def _shown(value: Any) -> str:
    """A value in a message, cut where it is long."""
    return f"{value!r:.100}" if not isinstance(value, int) or abs(value) < 10**80 else "a number that long"


def _checked(field: dataclasses.Field, value: Any) -> Any:
    """Convert what papermill delivers (ints for floats, numbers as text); ConfigError where it does not fit."""
    kind, optional, choices, allowed = field_type(field)
    if value is None and optional:
        return None
    if isinstance(value, str) and value in choices:
        return value
    if choices and kind is str:
        near = did_you_mean(value if isinstance(value, str) else "", choices)
        raise ConfigError(f"unknown {field.name} {_shown(value)}{near}")
    words = " or ".join([_KINDS[kind], *map(repr, choices)])
    try:
        if kind in (str, bool):
            if not isinstance(value, str | Path if kind is str else bool):
                raise ValueError
            if kind is str and (UNFIT.search(str(value)) or len(str(value)) > 1000):
                raise ValueError
            return kind(value)
        number = float(value)
        if isinstance(value, bool) or not math.isfinite(number) or kind(number) != number:
            raise ValueError
    except (TypeError, ValueError, OverflowError):
        raise ConfigError(f"{field.name} must be {words}, not {_shown(value)}") from None
    if allowed and not allowed.low <= number <= allowed.high:
        raise ConfigError(f"{field.name} must be {allowed.words}, not {_shown(value)}")
    return kind(number)


def _refuse_unread(config: RunConfig) -> None:
    """A setting that the method does not read would have no effect, and yet stand in the record."""
    read = METHOD_SETTINGS[config.method]
    for name, default in {**METHOD_DEFAULTS[config.method], **UNREAD}.items():
        if name not in read and (value := getattr(config, name)) != default:
            problem = f"method={config.method!r} does not use {name}, so {name}={value!r} would have no effect"
            raise ConfigError(f"{problem}; leave it out (it uses: {', '.join(sorted(read))})")


def _refuse_combinations(config: RunConfig) -> None:
    """ConfigError for the first value that does not go with another."""

    def need(ok: bool, name: str, rule: str) -> None:
        if not ok:
            raise ConfigError(f"{name} must be {rule}, not {getattr(config, name)!r}")

    need(config.run_dir != "", "run_dir", "the name of a folder, or left out")
    rule = "at most 100,000 / rollouts_per_question, as a step's traces are in memory together"
    need(config.questions_per_step * config.rollouts_per_question <= 100_000, "questions_per_step", rule)
    if config.n_sample > 1:
        need(config.method == "jlb", "n_sample", "1 unless method='jlb'")
        need(config.reward == "sum_logprob", "reward", "'sum_logprob' when n_sample is above 1")
        divides = config.rollouts_per_question % config.n_sample == 0
        need(divides, "n_sample", "a divisor of rollouts_per_question")
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

    So a misspelt parameter is an error, whoever set it. Call it in the first cell after the parameters; later calls
    check nothing, as the notebook's own variables stand beside its parameters by then.
    """
    if names.get("_parameters_checked"):
        return
    valid = list(valid)
    for name, value in names.items():
        plain = not name.startswith("_") and name not in ("In", "Out") and isinstance(value, _LITERALS)
        if plain and name not in valid:
            raise unknown_name("parameter", name, valid)
    names["_parameters_checked"] = True


def enter_project() -> None:
    """In a notebook of the checkout: work in the checkout's folder, as commands do, so that both use one ``runs/``.

    JupyterLab starts a notebook in the notebook's own folder. A run of a sweep stays where the sweep is.
    """
    here = Path.cwd()
    if here.name == "notebooks" and (here.parent / "covrl_lab").is_dir() and "COVRL_LAB_PARENT" not in os.environ:
        os.chdir(here.parent)
