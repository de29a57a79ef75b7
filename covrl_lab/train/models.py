"""Load a language model by name: a frozen base, in 4 bits or not, with a small LoRA adapter on top.

A model name is ``smollm2-135m`` (embedded), ``tiny``, ``tiny-qwen3`` or ``tiny-gemma3`` (random weights, no files), a
local folder that holds a ``config.json``, or a Hugging Face id such as ``owner/name``.
"""

import os
import re
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path

import torch
import transformers
from huggingface_hub import try_to_load_from_cache
from peft import LoraConfig, get_peft_model
from tokenizers import Tokenizer, decoders, pre_tokenizers
from tokenizers.models import BPE
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    BitsAndBytesConfig,
    Gemma3TextConfig,
    LlamaConfig,
    PretrainedConfig,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
    Qwen3Config,
)

from ..types import ConfigError, did_you_mean
from .embedded import EMBEDDED, embedded_model_path, quiet
from .limits import fast_dtype, pick_device
from .lora import fuse
from .policy import CACHE_NAMES, Policy

TINY = "tiny"

_DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32}
# Projections are multiples of 64 on both sides, as the 4-bit blocks want.
_TINY_SIZES = {
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "intermediate_size": 128,
    "max_position_embeddings": 8192,
    "initializer_range": 0.1,  # wide enough that logits differ visibly between contexts
}
_TINY_CONFIGS = {
    TINY: LlamaConfig,
    "tiny-qwen3": Qwen3Config,
    # A window shorter than any prompt, on every other layer, so that tests see it.
    "tiny-gemma3": partial(Gemma3TextConfig, sliding_window=16, layer_types=["sliding_attention", "full_attention"]),
}
ALIASES = (EMBEDDED, *_TINY_CONFIGS)


def check_model(name: str) -> None:
    """Raise ConfigError when `name` cannot be a model; cheap, no network, nothing is loaded."""
    if name in ALIASES:
        return
    folder = Path(os.path.expanduser(name))
    if name and os.path.isdir(folder):
        if (folder / "config.json").is_file():
            return
        hint = "holds an adapter, not a model" if (folder / "adapter_config.json").is_file() else "is no model"
        raise ConfigError(f"the folder {name!r} {hint}: it has no config.json; pass one from save_pretrained")
    if re.fullmatch(r"\w[\w.-]*/\w[\w.-]*", name):
        return
    with suppress(ValueError):  # the hub's rules for names
        if re.fullmatch(r"\w[\w.-]*", name) and isinstance(try_to_load_from_cache(name, "config.json"), str):
            return
    problem = "neither a built-in name, an existing folder, nor a Hugging Face id like owner/name"
    raise ConfigError(f"unknown model {name!r}: {problem}{did_you_mean(name, ALIASES)}")


def load_tokenizer(name: str) -> PreTrainedTokenizerBase:
    """Load the tokenizer alone, before any weights."""
    check_model(name)
    if name in _TINY_CONFIGS:
        return _tiny_tokenizer()
    with _loading(name) as source:
        return AutoTokenizer.from_pretrained(source, trust_remote_code=False)


def load_config(name: str) -> PretrainedConfig:
    """Load the model's configuration alone, before any weights."""
    check_model(name)
    if name in _TINY_CONFIGS:
        tokenizer = _tiny_tokenizer()
        ends = {kind: getattr(tokenizer, kind) for kind in ("bos_token_id", "eos_token_id", "pad_token_id")}
        return _TINY_CONFIGS[name](**_TINY_SIZES, **ends, vocab_size=len(tokenizer))
    with _loading(name) as source:
        config = AutoConfig.from_pretrained(source, trust_remote_code=False)
        for field in ("hidden_size", "vocab_size", "max_position_embeddings"):
            if not isinstance(getattr(config.get_text_config(), field, None), int):
                raise ValueError(f"its config.json gives no {field}")
        return config


def context_length(name: str) -> int:
    """The tokens that fit the model's context, from its configuration alone."""
    return load_config(name).get_text_config().max_position_embeddings


def load_policy(
    name: str,
    *,
    quantization: str = "nf4",
    dtype: str = "auto",
    lora_rank: int = 16,
    lora_alpha: int = 32,
    seed: int = 0,
    device: str = "auto",
    gradient_checkpointing: bool = False,
    memory_gib: float | None = None,
) -> Policy:
    """Load a model, freeze it, and put a LoRA adapter on every linear layer except the output head.

    `quantization` "nf4" keeps the linear layers in 4 bits (double quantised; embeddings and head stay in `dtype`),
    "none" keeps them in `dtype`, which is also what they compute in. The adapter is float32, as small updates would be
    lost in bfloat16, and starts at zero change, its random half drawn from `seed`. With `lora_rank` 0 there is none.
    `memory_gib` is what there is of a GPU, if not all of it. Raises ConfigError.
    """
    for field, value, valid in (("quantization", quantization, ("nf4", "none")), ("dtype", dtype, ("auto", *_DTYPES))):
        if value not in valid:
            raise ConfigError(f"{field}={value!r} is not known{did_you_mean(value, valid)}")
    if lora_rank < 0 or lora_alpha <= 0:
        raise ConfigError(f"lora_rank={lora_rank} must be >= 0 and lora_alpha={lora_alpha} must be > 0")
    width = load_config(name).get_text_config().hidden_size
    if lora_rank > width:
        raise ConfigError(f"lora_rank={lora_rank} is above {width}, the width of {name!r}, and adds nothing; lower it")
    tokenizer = load_tokenizer(name)
    picked = pick_device(device)
    dtype = fast_dtype(picked) if dtype == "auto" else dtype
    model = _load_frozen(name, quantization, _DTYPES[dtype], picked)
    if model.device.type == "cuda":
        fuse_norms(model)
    policy = Policy(model, tokenizer, name)
    if gradient_checkpointing:
        _checkpoint_layers(policy.decoder)
    if lora_rank:
        lora = LoraConfig("CAUSAL_LM", r=lora_rank, lora_alpha=lora_alpha, target_modules="all-linear")
        with _loading(name), _own_seed(seed), warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # peft asks transformers by an old name
            policy.model = get_peft_model(model, lora)
        policy.model.peft_config["default"].base_model_name_or_path = name  # not a path of this machine
        policy.lora = fuse(policy.model, memory_gib and memory_gib * 2**30)
    policy.model.eval()
    return policy


def _load_frozen(name: str, quantization: str, dtype: torch.dtype, device: torch.device) -> torch.nn.Module:
    """The base model in eval mode, every parameter frozen."""
    options = {"dtype": dtype, "attn_implementation": "sdpa", "device_map": {"": device}}
    if quantization == "nf4":
        options["quantization_config"] = BitsAndBytesConfig(
            load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True, bnb_4bit_compute_dtype=dtype
        )
    if name in _TINY_CONFIGS:
        config = load_config(name)
        model_class = transformers.MODEL_FOR_CAUSAL_LM_MAPPING[type(config)]
        with _own_seed(1234):  # the same weights for every seed: a tiny model is a fixture
            state = model_class(config).state_dict()
        with quiet():
            model = model_class.from_pretrained(None, config=config, state_dict=state, **options)
    else:
        with _loading(name) as source:
            model, report = AutoModelForCausalLM.from_pretrained(
                source, trust_remote_code=False, use_safetensors=True, output_loading_info=True, **options
            )
        if missing := sorted(report["missing_keys"]):  # transformers would fill in random numbers
            raise ConfigError(
                f"the model {name!r} is incomplete: {len(missing)} weights missing, {missing[0]!r} first"
            )
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            # On CPUs with AVX512-BF16, bitsandbytes repacks a weight in place at the first no-grad forward in
            # eval mode; later forwards then take a kernel without autograd and silently drop gradients.
            module.support_avx512bf16_for_cpu = False
    return model.requires_grad_(False).eval()


def _checkpoint_layers(decoder: torch.nn.Module) -> None:
    """Recompute each layer in the backward pass instead of keeping its activations.

    transformers' own switch works in train mode only, and there it drops the cache while sampling.
    """

    def recomputed(forward, *args, **kwargs):
        if torch.is_grad_enabled() and all(kwargs.get(name) is None for name in CACHE_NAMES):
            return checkpoint(partial(forward, **kwargs), *args, use_reentrant=False)
        return forward(*args, **kwargs)

    for layer in decoder.layers:
        layer.forward = partial(recomputed, layer.forward)


def fuse_norms(model: torch.nn.Module) -> None:
    """Let RMS norms run as PyTorch's own, which is one kernel on CUDA instead of eight; others stay as they are."""
    for module in model.modules():
        if (eps := getattr(module, "variance_epsilon", None)) and type(module).__name__.endswith("RMSNorm"):
            weight = module.weight
            usual = partial(F.rms_norm, normalized_shape=weight.shape, weight=weight, eps=eps)
            x = torch.linspace(-1, 1, len(weight), dtype=weight.dtype, device=weight.device)
            if torch.allclose(usual(x), module(x), rtol=0.02):  # bfloat16 has 8 bits
                module.forward = usual


def _tiny_tokenizer() -> PreTrainedTokenizerFast:
    """Byte-level BPE over single bytes and a few pairs, so that a joined text has other tokens than its parts.

    One token in ten holds a newline, so that a random model's few-shot traces end after about ten tokens.
    """
    letters = "th he in er an re on at en es or te st ar nd to it is ha et"
    merges = [(pair[0], pair[1]) for pair in letters.split()] + [("Ġ", letter) for letter in "taiswobcmp="]
    merges += [(letter, "Ċ") for letter in "abcdefghijklmnopqrstuvwxyz.,!?"]
    special = text_end, bos, eos = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    tokens = special + sorted(pre_tokenizers.ByteLevel.alphabet()) + [a + b for a, b in merges]
    backend = Tokenizer(BPE(vocab={token: i for i, token in enumerate(tokens)}, merges=merges))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token=bos, eos_token=eos, pad_token=text_end, unk_token=text_end
    )
    tokenizer.chat_template = (
        "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n"
        "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )
    return tokenizer


@contextmanager
def _own_seed(seed: int) -> Iterator[None]:
    """Draw from `seed` inside and leave the global generators as they were."""
    with torch.random.fork_rng(devices=range(torch.cuda.device_count())):
        torch.manual_seed(seed)
        yield


@contextmanager
def _loading(name: str) -> Iterator[str]:
    """Yield where transformers finds the model; its failures become one sentence."""
    source = embedded_model_path() if name == EMBEDDED else Path(os.path.expanduser(name))
    try:
        with quiet():
            yield str(source) if source.is_dir() else name
    except Exception as error:  # damaged files fail in many ways
        reason = str(error).strip().splitlines()[0][:300] if str(error).strip() else type(error).__name__
        raise ConfigError(f"could not load the model {name!r}: {reason}") from error
