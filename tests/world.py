"""The library's enumerable world, and the expectation of a loss over all groups of its rollouts."""

from __future__ import annotations

import dataclasses
from itertools import product

import torch
from torch import Tensor

from covrl_lab.config import RunConfig
from covrl_lab.theory.world import REFERENCE, VOCABULARY, World
from covrl_lab.train.objectives import Totals, coupled_loss, likelihood_credit
from covrl_lab.types import Credit

__all__ = ["REFERENCE", "VOCABULARY", "World", "expected_loss", "select"]


def select(rows, index, **changes):
    """The rows ``index`` of a batch type, with further fields replaced."""
    values = {f.name: getattr(rows, f.name) for f in dataclasses.fields(rows)}
    picked = {name: v[index] for name, v in values.items() if isinstance(v, Tensor)}
    return dataclasses.replace(rows, **(picked | changes))


def expected_loss(
    world: World, config: RunConfig, old: World | None = None, group: int = 1, credit: Credit | None = None
) -> Tensor:
    """Expectation of the library's loss over all groups of i.i.d. rollouts drawn from ``old``.

    Goes through likelihood_credit and coupled_loss once a group; probabilities are constants.
    """
    new, before, batch = world.logprobs(), (old or world).logprobs().detach(), world.batch()
    law, total = (old or world).sampling_probs(config.alpha), torch.zeros((), dtype=torch.float64)
    for members in product(range(len(batch)), repeat=group):
        index = list(members)
        part, part_old = select(batch, index, group_size=group), select(before, index)
        earned = select(credit, index) if credit else likelihood_credit(part, part_old, config)
        totals = Totals.of(part, earned, part_old.answer_mask)
        loss, _ = coupled_loss(select(new, index), part_old, part, earned, totals, config)
        total = total + law[index].prod() * loss
    return total
