"""A policy: a frozen base model with a small LoRA adapter on top, its tokenizer, and the adapter's files."""

import inspect
import json
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path

import torch
from peft import PeftModel, get_peft_model_state_dict
from safetensors.torch import load_file, save_file
from transformers import PreTrainedTokenizerBase

from ..files import check_checksums, read_object, readable
from ..types import ConfigError
from .lora import LoraGroup
from .tree import check_logits, enable_packing

CACHE_NAMES = ("cache", "past_key_values")  # of a forward's keys and values, from transformers 5.24 on and before


@dataclass
class Policy:
    """A causal language model that is ready to sample and to train; always in eval mode (no dropout)."""

    model: torch.nn.Module
    tokenizer: PreTrainedTokenizerBase
    name: str
    cache_name: str = field(init=False)  # the one of CACHE_NAMES that the decoder takes
    packs: bool = field(init=False)  # whether the model can run a prefix tree
    flex: bool = field(init=False)  # whether it does so with FlexAttention
    graphs: bool = field(init=False)  # whether decoding is recorded as CUDA graphs
    rows_at_once: int | None = field(init=False, default=None)  # that decoding has memory for; None: any
    tokens_at_once: float = field(init=False, default=float("inf"))  # in a forward without gradients
    room: float = field(init=False, default=float("inf"))  # tokens whose keys and values decoding may keep
    lora: list[LoraGroup] = field(init=False, default_factory=list)  # the adapter's layers

    def __post_init__(self) -> None:
        check_logits(self)
        accepted = inspect.signature(self.decoder.forward).parameters
        self.cache_name = next((name for name in CACHE_NAMES if name in accepted), CACHE_NAMES[-1])
        self.flex = self.device.type == "cuda"
        self.packs = enable_packing(self)
        self.graphs = self.packs and self.device.type == "cuda"

    @property
    def causal_lm(self) -> torch.nn.Module:
        """The ``*ForCausalLM`` module, with the adapter's layers injected."""
        return self.model.get_base_model() if isinstance(self.model, PeftModel) else self.model

    @property
    def decoder(self) -> torch.nn.Module:
        """The stack of layers: token ids to final hidden states."""
        return self.causal_lm.get_decoder()

    @property
    def head(self) -> torch.nn.Module:
        """The output embedding: hidden states to logits over the vocabulary."""
        return self.causal_lm.get_output_embeddings()

    @property
    def device(self) -> torch.device:
        return self.head.weight.device

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of activations and of everything in the base that is not quantised."""
        return self.head.weight.dtype

    @property
    def max_context(self) -> int:
        """The most tokens, prompt and generation together, that the model was made for."""
        return self.causal_lm.config.get_text_config().max_position_embeddings

    def abilities(self) -> dict[str, str]:
        """How it computes on this machine, in words, for ``policy.json`` in the run folder."""
        kept = "dequantised once and kept" if any(group.kept for group in self.lora) else "dequantised at every use"
        quantised = getattr(self.causal_lm, "is_quantized", False)
        return {
            "scores": "packed trees" if self.packs else "padded rows",
            "decodes": "recorded steps (CUDA graphs)" if self.graphs else "plain steps",
            "weights": kept if quantised else "not quantised",
            "products": str(self.dtype).removeprefix("torch."),
            "attention": ("FlexAttention" if self.flex else "blocks of the tree") if self.packs else "the model's own",
        }

    def base(self) -> AbstractContextManager[None]:
        """Inside this context the adapter is off: the frozen base policy, without a second model."""
        return self.model.disable_adapter() if isinstance(self.model, PeftModel) else nullcontext()

    def trainable(self) -> list[tuple[str, torch.nn.Parameter]]:
        """The parameters to optimise, sorted by name; empty when there is no adapter."""
        return sorted((name, p) for name, p in self.model.named_parameters() if p.requires_grad)


def save_adapter(policy: Policy, folder: str | Path) -> None:
    """Write the adapter in PEFT's own layout: adapter_model.safetensors and adapter_config.json."""
    if not isinstance(policy.model, PeftModel):
        raise ConfigError("this policy has no adapter to save; load it with lora_rank > 0")
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    state = {key: value.contiguous() for key, value in _adapter_state(policy).items()}
    save_file(state, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    policy.model.peft_config["default"].save_pretrained(str(folder))
    settings = json.loads((folder / "adapter_config.json").read_text(encoding="utf-8"))
    settings = {name: sorted(v) if isinstance(v, list) else v for name, v in settings.items()}  # PEFT's are sets
    (folder / "adapter_config.json").write_text(json.dumps(settings, indent=2, sort_keys=True) + "\n", "utf-8")


def load_adapter(policy: Policy, folder: str | Path) -> None:
    """Copy a saved adapter's weights into the live policy; the parameters stay the same objects.

    Raises ConfigError when the files are missing or belong to another model, rank or scaling.
    """
    if not isinstance(policy.model, PeftModel):
        raise ConfigError("this policy has no adapter to load into; load it with lora_rank > 0")
    folder = Path(folder)
    check_checksums(folder)
    saved = read_object(folder / "adapter_config.json")
    with readable(f"the adapter in {str(folder)!r}"):
        state = load_file(folder / "adapter_model.safetensors")
    live = policy.model.peft_config["default"]
    for name in ("r", "lora_alpha", "use_rslora", "use_dora"):
        if (theirs := saved.get(name)) != (ours := getattr(live, name)):
            problem = f"the adapter in {str(folder)!r} has {name}={theirs!r}, this policy has {ours!r}"
            raise ConfigError(f"{problem}; load the policy with the same LoRA settings")
    own = _adapter_state(policy)
    if wrong := sorted(key for key in own | state if _shape(own.get(key)) != _shape(state.get(key))):
        key = wrong[0]
        raise ConfigError(
            f"the adapter in {str(folder)!r} does not fit {policy.name!r}: {len(wrong)} tensors differ, "
            f"first {key!r} with {_shape(state.get(key))} there and {_shape(own.get(key))} here"
        )
    for key, value in own.items():
        value.copy_(state[key])


def _adapter_state(policy: Policy) -> dict[str, torch.Tensor]:
    """The adapter's tensors under their names on disk; they share memory with the live parameters."""
    # Off: looking for resized embeddings would ask the network for the base model's vocabulary.
    return get_peft_model_state_dict(policy.model, save_embedding_layers=False)


def _shape(tensor: torch.Tensor | None) -> str:
    return "nothing" if tensor is None else f"shape {tuple(tensor.shape)}"
