"""A check for silent errors: do all ranks hold the same state of the routers?

The check is off by default. ``--moe-dynamic-check-ranks N`` runs it every N steps. It costs one
small collective.
"""

from __future__ import annotations

import itertools
import struct
from collections import Counter
from collections.abc import Mapping
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from megatron_dynmoe.moe.router import DynamicRouter  # which imports Megatron

QUANTITIES = (
    *("threshold", "integral", "next threshold", "next integral"),
    *("theta", "gate", "rule's state", "next rule's state"),
)
# Of these it is said what their bits sum to, and not their value.
MANY = {"gate": "weights", "rule's state": "numbers", "next rule's state": "numbers"}
NUM_CONTROLLED = 4  # all layers share the first four, unless each layer has its own threshold
ABSENT = torch.iinfo(torch.int64).min  # the layer is on other ranks, or there is no controller
INTEGERS = {2: torch.int16, 4: torch.int32, 8: torch.int64}  # by bytes


def check_agreement(
    routers: list[DynamicRouter],
    staged: tuple[Tensor, ...] | None,
    staged_of_rule: Mapping[str, Tensor],
    num_layers: int,
    has_one_threshold: bool,
    iteration: int,
) -> None:
    """Compare the routers' state over the world, bit for bit. Every rank must call this.

    The check compares threshold, integral, theta, sums over the bits of the gate and of what the
    rule keeps beside its threshold, and the values that are staged for the next step. All ranks
    that hold a layer, identified by its global number, must agree on it.

    Args:
        routers: this rank's routers.
        staged: next threshold and integral, [1] or [L] float32, and what else there is; None
            without a controller.
        staged_of_rule: the rule's next state by name, a row for each router; may be empty.
        num_layers: L, the number of layers of the whole model.
        has_one_threshold: whether threshold and integral must also agree between layers.
        iteration: the number of the ending iteration, for the message.

    Raises:
        RuntimeError: two ranks differ. Every rank raises it; it names the first layer and rank.
    """
    device = torch.device(torch.cuda.current_device())
    state_LQ = torch.full((num_layers, len(QUANTITIES)), ABSENT, device=device)
    for place, router in enumerate(routers):
        layer = router.layer_number - 1
        values = {
            "threshold": router.knob,
            "integral": router.integral,
            "theta": router.theta,
            "gate": router.weight,
        }
        if staged is not None:
            ahead = (value[layer if len(value) > 1 else 0] for value in staged)
            values |= zip(("next threshold", "next integral"), ahead, strict=False)
        ahead_of_rule = [values[place] for values in staged_of_rule.values()]
        own = [value for name, value in router.state.items() if name != router.rule.knob]
        for name, parts in (("rule's state", own), ("next rule's state", ahead_of_rule)):
            if parts:
                values[name] = torch.cat(parts)
        for name, value in values.items():
            bits = value.detach().contiguous().view(INTEGERS[value.element_size()])
            state_LQ[layer, QUANTITIES.index(name)] = bits.sum()
    num_ranks = torch.distributed.get_world_size()
    states = state_LQ.new_empty(num_ranks * num_layers, len(QUANTITIES))
    torch.distributed.all_gather_into_tensor(states, state_LQ)
    found = first_disagreement(states.view(num_ranks, num_layers, -1), has_one_threshold)
    if found:
        raise RuntimeError(
            f"iteration {iteration}: {found}. Routers have to be the same bit for bit on all ranks "
            "(--moe-dynamic-check-ranks). Nothing of this step is kept, but what was trained since "
            "the check before is in doubt: resume from a checkpoint of that time. Suspect memory "
            "or links of that rank's machine, code that changes routers, or ranks that run other "
            "versions or flags."
        )


def first_disagreement(states_WLQ: Tensor, has_one_threshold: bool) -> str | None:
    """Describe the first value that differs from what most ranks hold; None if all agree.

    Args:
        states_WLQ: [world size, L, quantities] int64; ABSENT if the rank does not hold the value.
        has_one_threshold: see :func:`check_agreement`.
    """
    is_absent_WLQ = states_WLQ == ABSENT
    least_LQ = states_WLQ.masked_fill(is_absent_WLQ, torch.iinfo(torch.int64).max).amin(dim=0)
    most_LQ = states_WLQ.amax(dim=0)
    if has_one_threshold:
        least_LQ[:, :NUM_CONTROLLED] = least_LQ[:, :NUM_CONTROLLED].amin(dim=0)
        most_LQ[:, :NUM_CONTROLLED] = most_LQ[:, :NUM_CONTROLLED].amax(dim=0)
    if bool((least_LQ >= most_LQ).all()):  # greater, if no rank holds the layer
        return None
    states = states_WLQ.tolist()
    for layer, quantity in itertools.product(range(len(least_LQ)), range(len(QUANTITIES))):
        is_shared = has_one_threshold and quantity < NUM_CONTROLLED
        compared = (row for rows in states for row in (rows if is_shared else [rows[layer]]))
        counts = Counter(row[quantity] for row in compared if row[quantity] != ABSENT)
        for rank, rows in enumerate(states):
            value = rows[layer][quantity]
            if value != ABSENT and value != counts.most_common(1)[0][0]:
                usual = _shown(quantity, counts.most_common(1)[0][0])
                return (
                    f"{QUANTITIES[quantity]} of layer {layer + 1} is {_shown(quantity, value)} on "
                    f"rank {rank}, and {usual} {'elsewhere' if is_shared else 'on other ranks'}"
                )
    return None


def _shown(quantity: int, bits: int) -> str:
    if (noun := MANY.get(QUANTITIES[quantity])) is not None:
        return f"{noun} whose bits sum to {bits}"
    return f"{struct.unpack('<f', struct.pack('<i', bits))[0]:.9g}"
