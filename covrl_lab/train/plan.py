"""Before a run: memory and minutes a step, from the configuration alone. No weights are loaded.

``covrl-lab plan --model Qwen/Qwen2.5-7B --device rtx4090`` prints the table; every field of
``RunConfig`` is a flag. Without ``--device`` this machine is measured, which takes a few seconds.

A step has N = questions x rollouts traces of T tokens in contexts of w tokens. Its scoring tree has n nodes,
its prompts m, and s tokens are scored. P are the parameters of the L layers' matrices (in x out each), V the
vocabulary, h the hidden size, H and K heads and key-value heads of size d, I the intermediate size, r the
LoRA rank, e the bytes of ``dtype``, and c = min(n, max_packed_tokens) the nodes of one forward.

Memory in bytes is the larger of the two phases, on top of what always stays:

    weights      P (1/2 + 1/64 + 1/4096) in NF4, double quantised, or P e;  + e V h (twice if untied) + norms;
                 a CPU keeps what 4 P <= 4 GiB of NF4 matrices unpack to as well: + 4 P
    adapter      16 r L sum(in + out): float32 parameters, gradients and AdamW's two moments
    runtime      what the interpreter and its libraries, or a CUDA context, take
    sampling     keys and values 2 e L K d (3 m + N T);  logits 20 N V
    update       activations;  attention masks c e (H / K) (w + T + 128);  head 1.5 x 32 MiB + 2 e h min(s, c)
    activations  c (L + 1/2) a, or c (L e h + a) with gradient checkpointing, where one token takes in one
                 layer a = 8 h + e (2 h + 3 H d + 2 K d (1 + (w + T) / 128) + 4 I + 7 r), on a CPU with
                 w + T + 128 <= 512 also e H (w + T + 128) attention weights

Seconds: a product costs the larger of FLOPs / (share x rate) and bytes / bandwidth.

    prompts      2 P m FLOPs
    decoding     T times 2 N (P + V h) FLOPs, which read all weights, and the keys and values
    update       2 P n (1 forward + 1 backward, + 1 with gradient checkpointing, + 1 when n > c) + 4 s V h for
                 the head and its gradient; attention adds 4 (w + T + 128) H d L to each 2 P
    dequantise   where weights are unpacked at every use: (1/2 + 2 e) P bytes a pass, besides the products
"""

from __future__ import annotations

import math
import os
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any

from ..config import RunConfig
from ..types import ConfigError, did_you_mean

GIB = 2**30
# As in tree.py, scoring.py and lora.py, which need torch; tests/test_plan.py holds them equal.
BLOCK, MAX_MATMUL_KEYS, MAX_LOGITS_BYTES, MAX_UNPACKED_BYTES = 128, 512, 32 * 2**20, 4 * 2**30


@dataclass(frozen=True)
class Shape:
    """The sizes of a decoder-only transformer with gated feed-forward layers, as in its ``config.json``."""

    hidden: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    intermediate: int
    vocabulary: int
    tied: bool  # input and output embeddings are one matrix
    norms: int = 2  # of the hidden states, in a layer
    head_norms: bool = False  # each head's queries and keys are normalised, too
    biases: bool = False  # q, k and v have one

    @classmethod
    def of(cls, config: Mapping[str, Any]) -> Shape:
        """Read a Hugging Face configuration given as a mapping; ConfigError names what it lacks."""
        config = config.get("text_config") or config
        kind = config.get("model_type", "llama")
        gemma = kind.startswith("gemma")
        try:
            hidden, heads = config["hidden_size"], config["num_attention_heads"]
            return cls(
                hidden=hidden,
                layers=config["num_hidden_layers"],
                heads=heads,
                kv_heads=config.get("num_key_value_heads") or heads,
                head_dim=config.get("head_dim") or hidden // heads,
                intermediate=config["intermediate_size"],
                vocabulary=config["vocab_size"],
                tied=bool(config.get("tie_word_embeddings", gemma)),
                norms=4 if gemma else 2,
                head_norms=kind.startswith(("qwen3", "gemma3")),
                biases=kind == "qwen2",
            )
        except KeyError as error:
            raise ConfigError(f"a plan needs {error} in the model's config.json") from error

    @property
    def q(self) -> int:
        """Width of a token's queries, all heads together."""
        return self.heads * self.head_dim

    @property
    def kv(self) -> int:
        """Width of a token's keys, and of its values."""
        return self.kv_heads * self.head_dim

    @property
    def matrices(self) -> list[tuple[int, int]]:
        """(in, out) of each matrix of a layer: q, k, v, o, gate, up, down."""
        h, q, kv, i = self.hidden, self.q, self.kv, self.intermediate
        return [(h, q), (h, kv), (h, kv), (q, h), (h, i), (h, i), (i, h)]

    @property
    def parameters(self) -> int:
        """Parameters of all layers' matrices, embeddings not counted."""
        return self.layers * sum(a * b for a, b in self.matrices)

    @property
    def embedding(self) -> int:
        """Parameters of one embedding matrix."""
        return self.vocabulary * self.hidden

    def weight_bytes(self, quantization: str, width: int) -> int:
        """Bytes of the frozen model, exact. ``width`` is the bytes of an unquantised parameter."""
        vectors = self.norms * self.hidden + 2 * self.head_dim * self.head_norms + (self.q + 2 * self.kv) * self.biases
        rest = self.embedding * (1 if self.tied else 2) + self.layers * vectors + self.hidden
        if quantization == "none":
            return (self.parameters + rest) * width
        # A block of 64 values has an 8-bit scale, 256 scales have a float32 scale of their own; each matrix
        # holds the 16 values of the code, the 256 of the scales' code, and an offset, in float32.
        each = [
            a * b // 2 + math.ceil(a * b / 64) + 4 * math.ceil(a * b / 64 / 256) + 4 * (16 + 256 + 1)
            for a, b in self.matrices
        ]
        return self.layers * sum(each) + rest * width


# From the models' published config.json, so that a plan needs no network: hidden size, layers, heads, key-value
# heads, head size, intermediate size, vocabulary.
SHAPES = {
    "smollm2-135m": Shape(576, 30, 9, 3, 64, 1536, 49152, tied=True),
    "Qwen/Qwen2.5-0.5B": Shape(896, 24, 14, 2, 64, 4864, 151936, tied=True, biases=True),
    "Qwen/Qwen2.5-1.5B": Shape(1536, 28, 12, 2, 128, 8960, 151936, tied=True, biases=True),
    "Qwen/Qwen2.5-3B": Shape(2048, 36, 16, 2, 128, 11008, 151936, tied=True, biases=True),
    "Qwen/Qwen2.5-7B": Shape(3584, 28, 28, 4, 128, 18944, 152064, tied=False, biases=True),
    "Qwen/Qwen2.5-14B": Shape(5120, 48, 40, 8, 128, 13824, 152064, tied=False, biases=True),
    "Qwen/Qwen3-8B-Base": Shape(4096, 36, 32, 8, 128, 12288, 151936, tied=False, head_norms=True),
    "Qwen/Qwen3-14B-Base": Shape(5120, 40, 40, 8, 128, 17408, 151936, tied=False, head_norms=True),
    "meta-llama/Llama-3.1-8B": Shape(4096, 32, 32, 8, 128, 14336, 128256, tied=False),
}
# Measured with ``tests.bench.benchmark`` (notebooks/07_speed.ipynb): on CPUs the share of the machine's own
# matrix rate. That of GPUs is an assumption: nothing here was measured on one.
CPU_SHARE, GPU_SHARE = 0.55, 0.35
RUNTIME = 0.75 * GIB  # of the interpreter and its libraries, or of a CUDA context


@dataclass(frozen=True)
class Device:
    """Where a run would be: ``memory`` in bytes, ``rate`` in FLOP/s, ``bandwidth`` in bytes/s.

    runtime is the memory in bytes that is gone before any tensor; share is the part of ``rate`` that a whole
    step's products reach; unpacks says whether NF4 matrices are unpacked at every use.
    """

    name: str
    memory: float
    rate: float
    bandwidth: float
    runtime: float = RUNTIME
    share: float = GPU_SHARE
    unpacks: bool = True


# Dense bfloat16 rate and memory bandwidth as published by the vendor.
DEVICES = {
    "rtx4080": Device("RTX 4080, 16 GB", 16 * GIB, 97.5e12, 717e9),
    "rtx4090": Device("RTX 4090, 24 GB", 24 * GIB, 165e12, 1008e9),
    "a100-40": Device("A100, 40 GB", 40 * GIB, 312e12, 1555e9),
    "h100-80": Device("H100 SXM, 80 GB", 80 * GIB, 989e12, 3350e9),
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


@cache
def measure_device(seconds: float = 1.0) -> Device:
    """This machine: the best bfloat16 matrix rate and read bandwidth seen in about ``seconds`` each."""
    import torch  # only here: a plan for another machine needs no torch

    cuda = torch.cuda.is_available()
    device = torch.device("cuda" if cuda else "cpu")

    n = 8192 if cuda else 1024
    a = torch.randn(n, n, dtype=torch.bfloat16, device=device)
    numbers = torch.ones(64 * 2**20, device=device)  # 256 MiB, more than any cache
    with torch.no_grad():
        rate = 2 * n**3 / fastest(lambda: a @ a, seconds)
        bandwidth = numbers.nbytes / fastest(numbers.sum, seconds)
    if cuda:
        memory = torch.cuda.get_device_properties(0).total_memory
        return Device(torch.cuda.get_device_name(), memory, rate, bandwidth)
    memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    name = f"CPU, {torch.get_num_threads()} threads"
    return Device(name, memory, rate, bandwidth, share=CPU_SHARE, unpacks=False)


@dataclass(frozen=True)
class Tokens:
    """How many tokens a step has, as a tree of shared prefixes.

    N ``rows`` decode ``length`` T tokens each, after ``context`` w tokens. The tree of the prompts has m nodes, that
    of the update n; s tokens are scored.
    """

    rows: int
    length: int
    prompts: int
    nodes: int
    scored: int
    context: int

    @classmethod
    def of(cls, config: RunConfig, shared: int, question: int, answer: int, length: int | None = None) -> Tokens:
        """Of a configuration, from the tokens that all prompts share, of one question and of one answer.

        Under each prompt the shared part, the questions and the traces appear once. ``length`` is the mean trace,
        by default the longest allowed.
        """
        questions, length = config.questions_per_step, length or config.max_trace_tokens
        rows = questions * config.rollouts_per_question
        contexts = 1 if config.composite_weight == config.alpha == 1 else 2
        prompts = contexts * (shared + questions * question) + (contexts - 1) * questions * answer
        scored = rows * (contexts * length + answer)
        # Seam and answer follow each trace under the prior prompt; what is last in a branch is not read.
        nodes = prompts + scored + (2 - contexts) * rows
        return cls(rows, length, prompts, nodes, scored, shared + question)


@dataclass(frozen=True)
class Plan:
    """What a step would take on a device: bytes by part, and seconds by part.

    ``memory`` holds what always stays (weights, adapter, runtime) and both phases. Of the phases only the larger one
    counts.
    """

    config: RunConfig
    device: Device
    memory: dict[str, float]
    seconds: dict[str, float]

    def bytes_of(self, phase: str = "") -> float:
        """Bytes of a phase, "sampling" or "update"; without one, of what always stays."""
        parts = {
            "": ("weights", "adapter", "runtime"),
            "sampling": ("keys and values", "logits"),
            "update": ("activations", "masks", "head"),
        }
        return sum(self.memory[part] for part in parts[phase])

    @property
    def peak(self) -> float:
        """Bytes at the worst moment of a step."""
        return self.bytes_of() + max(self.bytes_of("sampling"), self.bytes_of("update"))

    @property
    def fits(self) -> bool:
        """Whether the step stays below 95% of the device's memory."""
        return self.peak < 0.95 * self.device.memory

    @property
    def minutes(self) -> float:
        """Minutes a step, evaluation not counted."""
        return sum(self.seconds.values()) / 60

    @property
    def advice(self) -> str:
        """What to change when it does not fit, else nothing."""
        if self.fits:
            return ""
        if self.bytes_of() > 0.95 * self.device.memory:
            return "use quantization='nf4'" if self.config.quantization == "none" else "choose a smaller model"
        if self.bytes_of("sampling") > self.bytes_of("update"):
            return "lower questions_per_step, rollouts_per_question or max_trace_tokens"
        if not self.config.gradient_checkpointing:
            return "set gradient_checkpointing=True, or lower max_packed_tokens"
        return "lower max_packed_tokens"

    def summary(self) -> str:
        """One line: memory, minutes, fits or not and what to lower."""
        verdict = "fits" if self.fits else f"does NOT fit: {self.advice}"
        step, steps = 60 * self.minutes, self.config.steps
        return (
            f"{self.config.model} ({self.config.quantization}) on {self.device.name}: "
            f"{self.peak / GIB:.1f} of {self.device.memory / GIB:.0f} GiB, "
            f"{_duration(step)} a step, {_duration(step * steps)} for {steps} steps; {verdict}"
        )

    def table(self) -> str:
        """The parts, one a line."""
        lines = [f"{'memory':24}{'GiB':>8}"]
        lines += [f"  {part:22}{size / GIB:8.2f}" for part, size in self.memory.items()]
        lines += [f"  {'peak':22}{self.peak / GIB:8.2f}", f"{'time':24}{'s':>8}"]
        lines += [f"  {part:22}{seconds:8.2f}" for part, seconds in self.seconds.items()]
        return "\n".join([*lines, self.summary()])


def _duration(seconds: float) -> str:
    if seconds < 100:
        return f"{seconds:.1f} s"
    return f"{seconds / 60:.1f} min" if seconds < 6000 else f"{seconds / 3600:.1f} h"


def shape_of(model: str) -> Shape:
    """The sizes of a model named as in ``RunConfig``: from the table here, else from its config.json."""
    if model in SHAPES:
        return SHAPES[model]
    from .models import load_config  # only here: it imports torch

    return Shape.of(load_config(model).to_dict())


def keeps_unpacked(config: RunConfig, shape: Shape, device: Device) -> bool:
    """Whether 4-bit matrices stay in memory unpacked, too (``lora.fuse``)."""
    return config.quantization == "nf4" and not device.unpacks and 4 * shape.parameters <= MAX_UNPACKED_BYTES


def memory_parts(config: RunConfig, shape: Shape, tokens: Tokens, device: Device) -> dict[str, float]:
    """Bytes by part; the formula is the module's docstring."""
    e = 2 if config.dtype == "bfloat16" else 4
    h, q, kv = shape.hidden, shape.q, shape.kv
    c, length = min(tokens.nodes, config.max_packed_tokens), tokens.context + tokens.length
    scored = min(tokens.scored, c)
    weights = shape.weight_bytes(config.quantization, e)
    if keeps_unpacked(config, shape, device):
        weights += 4 * shape.parameters  # in float32 once; in bfloat16 twice, for both passes
    layer = 4 * shape.norms * h + 4 * (q + kv) * shape.head_norms
    layer += e * (2 * h + 3 * q + 2 * kv * (1 + length / BLOCK) + 4 * shape.intermediate)
    layer += e * 7 * config.lora_rank
    if not device.unpacks and length + BLOCK <= MAX_MATMUL_KEYS:
        layer += e * shape.heads * (length + BLOCK)  # attention weights
    kept = shape.layers * e * h + layer if config.gradient_checkpointing else (shape.layers + 0.5) * layer
    stored = 3 * tokens.prompts + tokens.rows * tokens.length  # once as computed, in blocks up to twice
    return {
        "weights": weights,
        "adapter": 16 * config.lora_rank * shape.layers * sum(a + b for a, b in shape.matrices),
        "runtime": device.runtime,
        "keys and values": 2 * e * shape.layers * kv * stored,
        "logits": 20 * tokens.rows * shape.vocabulary,
        "activations": c * kept,
        "masks": c * e * (shape.heads // shape.kv_heads) * (length + BLOCK),
        "head": 1.5 * min(MAX_LOGITS_BYTES, 4 * scored * shape.vocabulary) + 2 * scored * e * h,
    }


def step_seconds(
    config: RunConfig, shape: Shape, tokens: Tokens, device: Device, ideal: bool = False
) -> dict[str, float]:
    """Seconds by part; the formula is the module's docstring.

    ``ideal`` leaves out what is done beyond the step's own arithmetic: unpacking, attention to masked tokens,
    and shared keys and values read more than once. With ``device.share`` 1 that is the machine's limit.
    """
    e = 2 if config.dtype == "bfloat16" else 4
    p, head = shape.parameters, shape.embedding
    n, part, length = tokens.nodes, config.max_packed_tokens, tokens.context + tokens.length
    passes = 2 + config.gradient_checkpointing + (n > part)

    def product(flops: float, read: float) -> float:
        return max(flops / (device.share * device.rate), read / device.bandwidth)

    def forward(nodes: int, keys: float) -> float:
        return 2 * p * nodes + 4 * nodes * keys * shape.q * shape.layers

    stored, block = e * (p + head), 0 if ideal else BLOCK
    mean = tokens.context + tokens.length / 2
    shared = tokens.prompts if ideal else min(2 * tokens.prompts, tokens.rows * tokens.context)
    cached = shared + tokens.rows * tokens.length / 2
    decoding = forward(tokens.rows, mean if ideal else mean + tokens.context) + 2 * tokens.rows * head
    seconds = {
        "prompts": product(forward(tokens.prompts, tokens.context + block), stored),
        "decoding": tokens.length * product(decoding, stored + 2 * e * shape.layers * shape.kv * cached),
        "update": product(passes * forward(n, length + block) + 4 * tokens.scored * head, passes * stored),
    }
    if config.quantization == "nf4" and not ideal and not keeps_unpacked(config, shape, device):
        times = 1 + tokens.length + passes * math.ceil(n / part)
        seconds["dequantise"] = times * (0.5 + 2 * e) * p / device.bandwidth
    return seconds


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
        device = measure_device()
    elif isinstance(device, str):
        if device not in DEVICES:
            raise ConfigError(f"unknown device {device!r}{did_you_mean(device, [*DEVICES, 'auto'])}")
        device = DEVICES[device]
    shape = shape_of(config.model)
    tokens = Tokens.of(config, prompt_tokens, question_tokens, answer_tokens, trace_tokens)
    memory = memory_parts(config, shape, tokens, device)
    return Plan(config, device, memory, step_seconds(config, shape, tokens, device))
