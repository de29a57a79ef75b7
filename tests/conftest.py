"""Tiny random policies shared by the tests of one process; each test leaves them as it found them."""

import pytest
import torch

from covrl_lab.models import load_policy


@pytest.fixture(scope="session")
def tiny_policies():
    """name -> float32 policy whose adapter is not zero, so that gradients reach both of its factors."""
    cache = {}

    def get(name="tiny"):
        if name not in cache:
            policy = load_policy(name, quantization="none", dtype="float32", lora_rank=4)
            generator = torch.Generator().manual_seed(1)
            with torch.no_grad():
                for _, parameter in policy.trainable():
                    parameter.copy_(0.1 * torch.randn(parameter.shape, generator=generator))
            cache[name] = policy
        return cache[name]

    return get


@pytest.fixture(scope="session")
def tiny_policy(tiny_policies):
    return tiny_policies()
