"""Before a run: memory and minutes a step, from the configuration alone. No weights are loaded.

Memory is the larger of the two phases, sampling and update, on top of what always stays (``memory_parts``). A
product costs the larger of FLOPs / (share x rate) and bytes / bandwidth (``step_seconds``). One forward takes
c = min(n, max_packed_tokens) of the n nodes of its scoring tree, never less than one rollout's. As many rows as fit
are decoded at once, the others follow in the places of finished ones.
"""

import math
import os
import time
from bisect import bisect_left
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cache
from typing import Any, Self

from ..config import RunConfig
from ..types import ConfigError, Prompt, did_you_mean
from .limits import BLOCK, MAX_LOGITS_BYTES, MAX_MATMUL_KEYS, fast_dtype, has_room, pick_device
from .shapes import Shape, shape_of

GIB = 2**30
USABLE = 0.95  # of a device's memory
# What "auto" tries for max_packed_tokens, the largest first. A CPU gains nothing from more than CPU_PACKED, and
# below FEW_PACKED shared prompts are computed so often that recomputing activations is cheaper.
PACKED, CPU_PACKED, FEW_PACKED = (16384, 8192, 4096, 2048, 1024, 512, 256), 4096, 2048
# Kernels of a layer (tests/bench/gpu_check.py counts them), and seconds to start one: by the host, as counted on a CPU,
# and in a recorded step, an assumption.
KERNELS, LAUNCH, RECORDED = 64, 24e-6, 2e-6

# Measured with ``tests.bench.benchmark`` (notebooks/07_speed.ipynb): on CPUs the share of the machine's own
# matrix rate. That of GPUs is an assumption: nothing here was measured on one.
CPU_SHARE, GPU_SHARE = 0.55, 0.35


@dataclass(frozen=True)
class Device:
    """Where a run would be."""

    name: str
    memory: float  # bytes
    rate: float  # FLOP/s
    bandwidth: float  # bytes/s
    runtime: float = 0.75 * GIB  # bytes of the interpreter and its libraries, or of a CUDA context
    share: float = GPU_SHARE  # of ``rate`` that a whole step's products reach
    unpacks: bool = True  # whether large NF4 models are unpacked at every use, as on GPUs
    launch: float = LAUNCH  # the host's seconds to start a kernel; 0 on CPUs, whose share of the rate holds it
    dtype: str = "bfloat16"  # what "auto" stands for there


# Dense bfloat16 rate and memory bandwidth as published by the vendor.
DEVICES = {
    "rtx4080": Device("RTX 4080, 16 GB", 16 * GIB, 97.5e12, 717e9),
    "rtx4090": Device("RTX 4090, 24 GB", 24 * GIB, 165e12, 1008e9),
    "rtx5090": Device("RTX 5090, 32 GB", 32 * GIB, 209.5e12, 1792e9),
    "a100-40": Device("A100, 40 GB", 40 * GIB, 312e12, 1555e9),
    "h100-80": Device("H100 SXM, 80 GB", 80 * GIB, 989e12, 3350e9),
    "h200-141": Device("H200 SXM, 141 GB", 141 * GIB, 989e12, 4800e9),
}


def fastest(function: Callable[[], Any], seconds: float) -> float:
    """The least seconds a call took, among calls for about ``seconds``."""
    import torch

    best, until = math.inf, time.perf_counter() + seconds
    while time.perf_counter() < until:
        started = time.perf_counter()
        function()
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        best = min(best, time.perf_counter() - started)
    return best


def find_device(device: str = "auto") -> Device:
    """A device of this machine and its memory; rate and bandwidth are not known (nan). ConfigError without it."""
    import torch  # only here: a plan for another machine needs no torch

    picked = pick_device(device)
    if picked.type == "cuda":
        card = torch.cuda.get_device_properties(picked)
        return Device(card.name, card.total_memory, math.nan, math.nan, dtype=fast_dtype(picked))
    memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") if hasattr(os, "sysconf") else 2**50  # Windows
    name = f"CPU, {torch.get_num_threads()} threads"
    settings = {"share": CPU_SHARE, "unpacks": False, "launch": 0, "dtype": fast_dtype(picked)}
    return Device(name, memory, math.nan, math.nan, **settings)


@cache
def measure_device(seconds: float = 1.0, device: str = "auto", dtype: str = "auto") -> Device:
    """A device of this machine: the best matrix rate in ``dtype`` and read bandwidth, in about ``seconds`` each."""
    import torch

    found = find_device(device)
    place, n = (pick_device(device), 8192) if found.unpacks else ("cpu", 1024)
    a = torch.randn(n, n, dtype=getattr(torch, found.dtype if dtype == "auto" else dtype), device=place)
    numbers = torch.ones(64 * 2**20, device=place)  # 256 MiB, more than any cache
    with torch.no_grad():
        rate = 2 * n**3 / fastest(lambda: a @ a, seconds)
        bandwidth = numbers.nbytes / fastest(numbers.sum, seconds)
    return replace(found, rate=rate, bandwidth=bandwidth)


@dataclass(frozen=True)
class Tokens:
    """How many tokens a step has, as a tree of shared prefixes."""

    rows: int  # traces
    length: int  # of each
    prompts: int  # nodes of the prompts' tree
    nodes: int  # of the update's tree: the prompts that are trained, with traces and answers
    scored: int
    context: int  # before a trace
    rollout: int = 0  # nodes of one rollout's tree alone
    longest: int = 0  # context and trace, in evaluations too
    frozen: int = 0  # nodes of the posterior's tree where it is not trained: they get a forward alone

    @classmethod
    def of(cls, config: RunConfig, shared: int, question: int, answer: int, length: int | None = None) -> Self:
        """From the tokens that all prompts share, of one question and of one answer; ``length`` is the mean trace."""
        questions = config.questions_per_step
        prior = shared + questions * question
        posterior = config.needs_posterior * (prior + questions * answer)
        return cls._under(config, prior, posterior, shared + question, answer, length)

    @classmethod
    def of_prompts(cls, config: RunConfig, prompts: Sequence[Prompt]) -> Self:
        """From the prompts of a step, if every trace is as long as allowed."""
        from .tree import count_nodes  # it imports torch

        prior, posterior = [p.prior for p in prompts], [p.posterior for p in prompts] * config.needs_posterior
        nodes, answer = count_nodes(prior), max(len(p.answer) for p in prompts)
        others = count_nodes([*prior, *posterior]) - nodes
        return cls._under(config, nodes, others, max(map(len, [*prior, *posterior])), answer, None)

    @classmethod
    def _under(
        cls, config: RunConfig, prior: int, posterior: int, context: int, answer: int, length: int | None
    ) -> Self:
        """From the nodes of the prior prompts, and those that posterior prompts add."""
        rows, contexts = config.questions_per_step * config.rollouts_per_question, 1 + config.trains_posterior
        length = length or config.max_trace_tokens
        scored = rows * (contexts * length + answer)
        # Seam and answer follow each trace under the prior prompt; what is last in a branch is not read.
        nodes = prior + config.trains_posterior * posterior + scored + (2 - contexts) * rows
        frozen = posterior + rows * (length - 1) if config.needs_posterior > config.trains_posterior else 0
        longest, rollout = context + max(length, config.eval_max_trace_tokens or 0), contexts * (context + length)
        return cls(rows, length, prior + posterior, nodes, scored, context, rollout + answer, longest, frozen)


# What exists at once: the forward of what rows begin with, decoding, the update.
PHASES = {
    "contexts": ("contexts",),
    "sampling": ("keys and values", "logits"),
    "update": ("activations", "masks", "head"),
}


@dataclass(frozen=True)
class Plan:
    """What a step would take on a device: bytes by part, and seconds by part.

    In ``config`` what was "auto" has its value; ``rows`` are decoded at once, and keep ``room`` tokens.
    """

    config: RunConfig
    device: Device
    memory: dict[str, float]
    seconds: dict[str, float]
    rows: int = 1
    room: float = math.inf

    def bytes_of(self, phase: str = "") -> float:
        """Bytes of a phase, one of PHASES; without one, of what always stays."""
        return sum(self.memory[part] for part in PHASES.get(phase, ("weights", "adapter", "runtime")))

    @property
    def peak(self) -> float:
        """Bytes at the worst moment of a step."""
        return self.bytes_of() + max(map(self.bytes_of, PHASES))

    @property
    def fits(self) -> bool:
        """Whether the step stays below 95% of the device's memory."""
        return self.peak < USABLE * self.device.memory

    @property
    def minutes(self) -> float:
        """Minutes a step, evaluation not counted."""
        return sum(self.seconds.values()) / 60

    @property
    def advice(self) -> str:
        """What to change when it does not fit, else nothing."""
        if self.fits:
            return ""
        if self.bytes_of() > USABLE * self.device.memory:
            return "use quantization='nf4'" if self.config.quantization == "none" else "choose a smaller model"
        if not self.config.gradient_checkpointing and self.bytes_of("update") > self.bytes_of("sampling"):
            return "set gradient_checkpointing=True, or lower max_packed_tokens"
        return "lower max_packed_tokens" if self.config.max_packed_tokens > PACKED[-1] else "lower max_trace_tokens"

    def summary(self) -> str:
        """One line: memory, minutes, fits or not and what to lower."""
        verdict = "fits" if self.fits else f"does NOT fit: {self.advice}"
        config, step = self.config, 60 * self.minutes
        return (
            f"{config.model} ({config.quantization}) on {self.device.name}: {self.peak / GIB:.1f} of "
            f"{self.device.memory / GIB:.0f} GiB, {_duration(step)} a step, {_duration(step * config.steps)} for "
            f"{config.steps} steps; {verdict}"
        )

    def table(self) -> str:
        """The parts, one a line."""
        memory = {part: size / GIB for part, size in (self.memory | {"peak": self.peak}).items()}
        lines = []
        for title, unit, parts in (("memory", "GiB", memory), ("time", "s", self.seconds)):
            lines += [f"{title:24}{unit:>8}", *(f"  {part:22}{size:8.2f}" for part, size in parts.items())]
        return "\n".join([*lines, self.summary()])


def _duration(seconds: float) -> str:
    if seconds < 100:
        return f"{seconds:.1f} s"
    return f"{seconds / 60:.1f} min" if seconds < 6000 else f"{seconds / 3600:.1f} h"


def keeps_unpacked(config: RunConfig, shape: Shape, device: Device) -> bool:
    """Whether 4-bit matrices stay in memory unpacked, too (``lora.fuse``)."""
    gpu = device.memory if device.unpacks else None
    return config.quantization == "nf4" and has_room(shape.parameters, 4 if config.dtype == "float32" else 2, gpu)


def memory_parts(
    config: RunConfig, shape: Shape, tokens: Tokens, device: Device, rows: int | None = None
) -> dict[str, float]:
    """Bytes by part; ``rows`` are decoded at once, by default all.

    adapter: float32 parameters, gradients and AdamW's two moments. contexts: the forward of what rows begin with, in
    judging and evaluation whole traces, and the keys and values that it leaves.
    """
    e = 4 if config.dtype == "float32" else 2
    h, q, kv, rows = shape.hidden, shape.q, shape.kv, rows or tokens.rows
    c, length = min(tokens.nodes, max(config.max_packed_tokens, tokens.rollout)), tokens.context + tokens.length
    scored = min(tokens.scored, c)
    weights = shape.weight_bytes(config.quantization, e)
    if keeps_unpacked(config, shape, device):
        # In float32 once; in bfloat16 a CPU has a layout for either pass.
        weights += (e if device.unpacks else 4) * shape.parameters
    layer = 4 * shape.norms * h + 4 * (q + kv) * shape.head_norms
    layer += e * (2 * h + 3 * q + 2 * kv * (1 + length / BLOCK) + 4 * shape.intermediate)
    layer += e * 7 * config.lora_rank
    plain = not device.unpacks and length + BLOCK <= MAX_MATMUL_KEYS
    scores = plain * e * shape.heads * (length + BLOCK)  # and attention weights, which the backward pass needs
    layer += scores
    kept = shape.layers * e * h + layer if config.gradient_checkpointing else (shape.layers + 0.5) * layer
    masks = e * (shape.heads // shape.kv_heads) * (length + BLOCK)
    begun, room = max(config.max_packed_tokens, tokens.longest), room_of(config, tokens, rows)
    token = e * (2 * shape.layers + 1) * kv  # of keys and values: a layer's keys are moved, then its values
    logits = MAX_LOGITS_BYTES["cuda" if device.unpacks else "cpu"]
    return {
        "weights": weights,
        "adapter": 16 * config.lora_rank * shape.layers * sum(a + b for a, b in shape.matrices),
        "runtime": device.runtime,
        "keys and values": token * room,
        "contexts": begun * (layer + scores + masks) + token * max(room / 2, room - rows * tokens.longest),
        "logits": 20 * rows * shape.vocabulary,
        "activations": c * kept,
        "masks": c * masks,
        "head": 1.5 * min(logits, 4 * scored * shape.vocabulary) + 2 * scored * e * h,
    }


def room_of(config: RunConfig, tokens: Tokens, rows: int) -> float:
    """Tokens that have keys and values at once: new ones of ``rows``, and contexts once and in blocks up to twice.

    The larger of two: traces after the prompts of a step, and answers after as many traces as one forward computes.
    """
    trace, packed = tokens.longest - tokens.context, config.max_packed_tokens
    prompts = max(tokens.context, min(1.5 * tokens.prompts, 4 * packed))  # half as much again for padding
    return max(3 * prompts + rows * trace, 3 * max(tokens.longest, packed) + rows * config.max_answer_tokens)


def rows_at_once(config: RunConfig, shape: Shape, tokens: Tokens, device: Device) -> int:
    """How many of a step's rows can be decoded at once, at least 1."""

    def taken(rows: int) -> float:
        made = Plan(config, device, memory_parts(config, shape, tokens, device, rows), {})
        return made.bytes_of() + max(made.bytes_of("contexts"), made.bytes_of("sampling"))

    return max(1, bisect_left(range(1, tokens.rows + 1), USABLE * device.memory, key=taken))


def step_seconds(
    config: RunConfig, shape: Shape, tokens: Tokens, device: Device, ideal: bool = False, rows: int | None = None
) -> dict[str, float]:
    """Seconds by part.

    decoding reads all weights, and the keys and values, at every token. update: a forward and a backward pass, one
    more with gradient checkpointing, one where a question has more nodes than one forward, and one forward of a
    posterior that is not trained. launches: the host's time to start a GPU's kernels, where it is longer than what
    they do. ``ideal`` leaves out what is done beyond the step's own arithmetic: unpacking, attention to masked tokens,
    and shared keys and values read more than once.
    """
    e = 4 if config.dtype == "float32" else 2
    p, head = shape.parameters, shape.embedding
    n, part, length = tokens.nodes, config.max_packed_tokens, tokens.context + tokens.length
    group = tokens.rollout + (config.rollouts_per_question - 1) * tokens.scored / tokens.rows
    passes, rows = 2 + config.gradient_checkpointing + (n > part and group > part), rows or tokens.rows

    def product(flops: float, read: float) -> float:
        return max(flops / (device.share * device.rate), read / device.bandwidth)

    def forward(nodes: int, keys: float) -> float:
        return 2 * p * nodes + 4 * nodes * keys * shape.q * shape.layers

    stored, block = e * (p + head), 0 if ideal else BLOCK
    mean = tokens.context + tokens.length / 2
    shared = tokens.prompts if ideal else min(2 * tokens.prompts, tokens.rows * tokens.context)
    cached, times = shared + rows * tokens.length / 2, tokens.length * tokens.rows / rows
    decoding = forward(rows, mean if ideal else mean + tokens.context) + 2 * rows * head
    update = passes * forward(n, length + block) + 4 * tokens.scored * head
    update += forward(tokens.frozen, length + block) + 2 * min(tokens.frozen, tokens.rows * tokens.length) * head
    forwards = passes * math.ceil(n / part) + math.ceil(tokens.frozen / part)
    seconds = {
        "prompts": product(forward(tokens.prompts, tokens.context + block), stored),
        "decoding": times * product(decoding, stored + 2 * e * shape.layers * shape.kv * cached),
        "update": product(update, passes * stored),
    }
    if config.quantization == "nf4" and not ideal and not keeps_unpacked(config, shape, device):
        uses = 1 + times + forwards
        seconds["dequantise"] = uses * (0.5 + 2 * e) * p / device.bandwidth
    if device.launch and not ideal:
        started = device.launch * (1 + forwards) + min(device.launch, RECORDED) * times
        seconds["launches"] = max(0.0, KERNELS * shape.layers * started - sum(seconds.values()))
    return seconds


def make_plan(config: RunConfig, shape: Shape, tokens: Tokens, device: Device) -> Plan:
    """The plan with the first of the settings that "auto" stands for that fit, or the last that might have."""
    config = replace(config, dtype=device.dtype) if config.dtype == "auto" else config
    if config.memory_gib:
        device = replace(device, memory=config.memory_gib * GIB)
    sizes = [size for size in PACKED if device.unpacks or size <= CPU_PACKED]
    sizes = sizes if config.max_packed_tokens == "auto" else [config.max_packed_tokens]
    tried = [(False, size) for size in sizes if len(sizes) == 1 or size >= FEW_PACKED]
    tried += [(True, size) for size in sizes]
    if config.gradient_checkpointing != "auto":
        tried = [(config.gradient_checkpointing, size) for size in sizes]
    for recompute, size in tried:
        chosen = replace(config, gradient_checkpointing=recompute, max_packed_tokens=size)
        rows = rows_at_once(chosen, shape, tokens, device)
        parts = memory_parts(chosen, shape, tokens, device, rows)
        made = Plan(chosen, device, parts, {}, rows, room_of(chosen, tokens, rows))
        if made.fits:
            break
    return replace(made, seconds=step_seconds(chosen, shape, tokens, device, rows=rows))


def fit(config: RunConfig, prompts: Sequence[Prompt], processes: int = 1, trains: bool = True) -> Plan:
    """The plan of a run on this machine, from the prompts of a step. ConfigError where it ``trains`` and cannot fit.

    ``processes`` that train it share a CPU's memory, and have a GPU each.
    """
    shape, tokens = shape_of(config.model), Tokens.of_prompts(config, prompts)
    device = find_device(config.device)
    device = device if device.unpacks else replace(device, memory=device.memory / processes)
    made = make_plan(config, shape, tokens, device)
    if trains and not made.fits:
        need, there = f"{made.peak / GIB:.1f} GiB", f"{made.device.name} has {made.device.memory / GIB:.1f}"
        advice = f"{made.advice}; if you know better, set memory_gib to what there is"
        raise ConfigError(f"this run needs about {need}, and {there}: {advice}")
    return made


def plan(
    config: RunConfig | None = None,
    *,
    device: str | Device = "auto",
    prompt_tokens: int = 110,
    question_tokens: int = 20,
    answer_tokens: int = 5,
    trace_tokens: int | None = None,
    **settings: Any,
) -> Plan:
    """Estimate a run given as a ``RunConfig`` or by its fields.

    device: "auto" (this machine, measured), a name in ``DEVICES``, or a ``Device``.
    prompt_tokens: of what all questions share (system text, demonstrations); question_tokens and
    answer_tokens: of one question and one answer; trace_tokens: the mean trace, by default the longest.
    """
    config = config or RunConfig(**settings)
    given = {"prompt_tokens": prompt_tokens, "question_tokens": question_tokens, "answer_tokens": answer_tokens}
    for name, value in (given | {"trace_tokens": trace_tokens}).items():
        if value is not None and value < 1:
            raise ConfigError(f"{name} must be 1 or more, not {value!r}")
    if device in ("auto", "cpu", "cuda"):
        device = measure_device(device=config.device if device == "auto" else device, dtype=config.dtype)
    elif isinstance(device, str):
        if device not in DEVICES:
            raise ConfigError(f"unknown device {device!r}{did_you_mean(device, [*DEVICES, 'auto'])}")
        device = DEVICES[device]
    shape = shape_of(config.model)
    tokens = Tokens.of(config, prompt_tokens, question_tokens, answer_tokens, trace_tokens)
    return make_plan(config, shape, tokens, device)
