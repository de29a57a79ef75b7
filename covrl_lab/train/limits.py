"""The device of a run: which it is, what it multiplies in, and sizes that decide memory. torch is imported on use."""

from typing import TYPE_CHECKING

from ..types import ConfigError

if TYPE_CHECKING:
    import torch

BLOCK = 128  # nodes of a tree whose attention is computed together
# Up to this many keys a block, a CPU computes attention with plain matrix products. They are faster there
# than the flash kernel, but keep the attention weights for the backward pass.
MAX_MATMUL_KEYS = 512
# Float32 logits that exist at once, by device: a CPU keeps them in its caches, a GPU starts fewer kernels.
MAX_LOGITS_BYTES = {"cpu": 32 * 2**20, "cuda": 256 * 2**20}
# Of unpacked weights, so that they are not unpacked at every token: on a CPU, and as a share of a GPU's memory.
MAX_UNPACKED_BYTES, MAX_UNPACKED_SHARE = 4 * 2**30, 1 / 4


def pick_device(device: str) -> "torch.device":
    """The device of a name, "auto" being a GPU where there is one. ConfigError where torch cannot use it."""
    import torch

    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        picked = torch.device(device)
        if picked.type != "cuda" or torch.cuda.is_available():
            torch.zeros(1, device=picked).item()  # "meta", and what this machine has not, fail
    except Exception as error:
        raise ConfigError(f"device={device!r} is not known; choose auto, cpu, cuda or cuda:0") from error
    if picked.type == "cuda" and not torch.cuda.is_available():
        raise ConfigError("device='cuda', but torch sees no CUDA GPU here; use device='auto' or 'cpu'")
    return picked


def fast_dtype(device: "torch.device") -> str:
    """What dtype="auto" stands for on a device: bfloat16, or float32 where the hardware has no products in it.

    A CPU without AVX512-BF16 or AMX takes several times as long in bfloat16 as in float32; old GPUs emulate it.
    """
    import torch

    if device.type == "cuda":
        native = bool(torch.version.hip) or torch.cuda.get_device_capability(device) >= (8, 0)
    else:
        # oneDNN takes any CPU with AVX512, and emulates; macOS on ARM has no oneDNN.
        emulates = torch.cpu._is_avx512_supported() and not torch.cpu._is_avx512_bf16_supported()
        native = has_onednn_bfloat16() and device.type == "cpu" and not emulates
    return "bfloat16" if native else "float32"


def has_onednn_bfloat16() -> bool:
    """Whether oneDNN multiplies in bfloat16 on this CPU, if need be by emulation."""
    import torch

    return torch.backends.mkldnn.is_available() and torch.ops.mkldnn._is_mkldnn_bf16_supported()


def has_room(parameters: int, width: int, gpu: float | None) -> bool:
    """Whether unpacked weights of ``width`` bytes are kept, in a GPU's memory of ``gpu`` bytes or a CPU's."""
    return 4 * parameters <= MAX_UNPACKED_BYTES if gpu is None else width * parameters <= MAX_UNPACKED_SHARE * gpu
