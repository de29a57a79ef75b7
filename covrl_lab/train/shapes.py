"""The sizes of models, from their configuration alone: what a plan counts with. No weights are loaded."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Self

from ..types import ConfigError


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
    def of(cls, config: Mapping[str, Any]) -> Self:
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
        sizes = [a * b for a, b in self.matrices]
        each = (n // 2 + math.ceil(n / 64) + 4 * math.ceil(n / 64 / 256) + 4 * (16 + 256 + 1) for n in sizes)
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
    "Qwen/Qwen3-8B": Shape(4096, 36, 32, 8, 128, 12288, 151936, tied=False, head_norms=True),
    "Qwen/Qwen3-14B": Shape(5120, 40, 40, 8, 128, 17408, 151936, tied=False, head_norms=True),
    "Qwen/Qwen3-8B-Base": Shape(4096, 36, 32, 8, 128, 12288, 151936, tied=False, head_norms=True),
    "Qwen/Qwen3-14B-Base": Shape(5120, 40, 40, 8, 128, 17408, 151936, tied=False, head_norms=True),
    "meta-llama/Llama-3.1-8B": Shape(4096, 32, 32, 8, 128, 14336, 128256, tied=False),
}


def shape_of(model: str) -> Shape:
    """The sizes of a model named as in ``RunConfig``: from the table here, else from its config.json."""
    if model in SHAPES:
        return SHAPES[model]
    from .models import load_config  # only here: it imports torch

    return Shape.of(load_config(model).to_dict())
