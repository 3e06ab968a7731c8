"""Whether a checkpoint holds what the routers of this run keep, before Megatron looks for it.

Megatron's own answer is a ``KeyError`` that names one entry, on every rank, below a traceback.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from megatron_dynmoe.checkpoints.collective import CheckpointError, on_rank_0, together
from megatron_dynmoe.conversion.names import ROUTER_STATE
from megatron_dynmoe.storage.unpickle import load_metadata

_ROUTER, _WEIGHT, _THETA = ".mlp.router.", "weight", "theta_offset"
# These load what there is, and leave the rest as it was initialised.
_LENIENT = ("log_", "return_", "ignore_")
_AFRESH = "--dist-ckpt-strictness log_all --no-load-optim"


def check_router_entries(folder: Path, state_dict: dict[str, Any], strictness: str) -> None:
    """Refuse a checkpoint whose routers kept less than these; all ranks take part.

    Args:
        folder: the checkpoint.
        state_dict: what Megatron is going to fill: nested, with sharded tensors.
        strictness: ``--dist-ckpt-strictness``.

    Raises:
        CheckpointError: on all ranks: other routing trained it; with the flags that load it.
    """
    if strictness.startswith(_LENIENT):
        return
    wanted = set().union(*together(lambda: _of_routers(_keys(state_dict))))
    there = on_rank_0(lambda: _of_routers(_stored_keys(folder))) if wanted else set()
    missing = sorted(wanted - there)
    # Without weights for its routers it has no experts either: nothing for these flags.
    if not missing or _WEIGHT not in there:
        return
    if missing != [_THETA]:
        raise CheckpointError(
            f"the checkpoint {folder} was not trained with dynamic routing: its routers have no "
            f"{', '.join(missing)}. {_AFRESH} loads its weights and starts what is missing, and "
            "the optimizer, afresh; with --finetune also at iteration 0."
        )
    raise CheckpointError(
        f"the checkpoint {folder} has routers without {', '.join(missing)}, which was trained with "
        "another --moe-dynamic-normalization: give none, as that run had it, or "
        f"{_AFRESH}, which starts what is missing, and the optimizer, afresh."
    )


def _of_routers(keys: Iterable[str]) -> set[str]:
    """What of a router's weight, state and theta is among the keys."""
    found = {key.rpartition(_ROUTER)[2] for key in keys if _ROUTER in key}
    return found & {_WEIGHT, _THETA, *ROUTER_STATE}


def _keys(state_dict: dict[str, Any]) -> Iterable[str]:
    from megatron.core.dist_checkpointing.dict_utils import nested_values

    return (str(getattr(value, "key", "")) for value in nested_values(state_dict))


def _stored_keys(folder: Path) -> Iterable[str]:
    path = folder / ".metadata"
    return load_metadata(path).state_dict_metadata if path.is_file() else ()
