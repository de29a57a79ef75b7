"""Tiny random policies shared by the tests of one process; each test leaves them as it found them."""

import pytest
import torch

from covrl_lab.train.models import load_policy


@pytest.fixture(scope="session")
def tiny_policies():
    """name -> float32 policy whose output depends visibly on its context.

    The adapter is not zero, so that gradients reach both of its factors. The output head is random and not
    tied to the embedding, else the most likely next token would mostly be the last one again.
    """
    cache = {}

    def get(name="tiny"):
        if name not in cache:
            policy = load_policy(name, quantization="none", dtype="float32", lora_rank=4)
            generator = torch.Generator().manual_seed(1)
            with torch.no_grad():
                for _, parameter in policy.trainable():
                    parameter.copy_(0.1 * torch.randn(parameter.shape, generator=generator))
                head = 0.25 * torch.randn(policy.head.weight.shape, generator=generator)
            policy.head.weight = torch.nn.Parameter(head.to(policy.device), requires_grad=False)
            cache[name] = policy
        return cache[name]

    return get


@pytest.fixture(scope="session")
def tiny_policy(tiny_policies):
    return tiny_policies()
