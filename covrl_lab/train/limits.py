"""Sizes that decide memory, where they act and where ``plan`` counts them. torch is imported where it is asked only."""

BLOCK = 128  # nodes of a tree whose attention is computed together
# Up to this many keys a block, a CPU computes attention with plain matrix products. They are faster there
# than the flash kernel, but keep the attention weights for the backward pass.
MAX_MATMUL_KEYS = 512
# Float32 logits that exist at once, by device: a CPU keeps them in its caches, a GPU starts fewer kernels.
MAX_LOGITS_BYTES = {"cpu": 32 * 2**20, "cuda": 256 * 2**20}
# Of unpacked weights, so that they are not unpacked at every token: on a CPU, and as a share of a GPU's memory.
MAX_UNPACKED_BYTES, MAX_UNPACKED_SHARE = 4 * 2**30, 1 / 4


def fast_dtype(device: str) -> str:
    """What dtype="auto" stands for on a device: bfloat16, or float32 where the hardware has no products in it.

    A CPU without AVX512-BF16 or AMX takes several times as long in bfloat16 as in float32; old GPUs emulate it.
    """
    import torch

    if device == "cpu":
        return "bfloat16" if torch.ops.mkldnn._is_mkldnn_bf16_supported() else "float32"
    return "bfloat16" if torch.cuda.is_bf16_supported(including_emulation=False) else "float32"


def has_room(parameters: int, width: int, gpu: float | None) -> bool:
    """Whether unpacked weights of ``width`` bytes are kept, in a GPU's memory of ``gpu`` bytes or a CPU's."""
    return 4 * parameters <= MAX_UNPACKED_BYTES if gpu is None else width * parameters <= MAX_UNPACKED_SHARE * gpu
