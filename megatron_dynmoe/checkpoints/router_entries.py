"""Checks that a checkpoint holds the entries of this run's routers, and no others.

If it holds fewer, Megatron's own answer is a ``KeyError`` on every rank that names one entry, below
a traceback. If it holds more, Megatron says nothing: stock layers, such as lm-eval's, would route
the tokens of a dynamic model by top-k.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from megatron_dynmoe.checkpoints.collective import CheckpointError, on_all_ranks, on_rank_0
from megatron_dynmoe.moe.rules import RULES
from megatron_dynmoe.settings.distribution import KNOTS
from megatron_dynmoe.storage.unpickle import load_metadata

_ROUTER, _WEIGHT, _THETA = ".mlp.router.", "weight", "theta_offset"
_INTEGRAL, _MEASURED = "integral", "measured"  # those that all rules have
# With these, Megatron loads the entries that exist and leaves the others as initialized.
_LENIENT = ("log_", "return_", "ignore_")
_AFRESH = "--dist-ckpt-strictness log_all --no-load-optim"


def check_router_entries(folder: Path, state_dict: dict[str, Any], strictness: str) -> None:
    """Refuse a checkpoint that lacks entries of this run's routers; all ranks take part.

    If routers are top-k here and were dynamic there, a warning is printed.

    Args:
        folder: the folder of the checkpoint.
        state_dict: the nested dictionary with sharded tensors that Megatron is going to fill.
        strictness: the value of ``--dist-ckpt-strictness``.

    Raises:
        CheckpointError: on all ranks: other routing trained it; names the flags that load it.
    """
    if strictness.startswith(_LENIENT):
        return
    wanted = set().union(*on_all_ranks(lambda: _of_routers(_keys(state_dict))))
    there = on_rank_0(lambda: _of_routers(_stored_keys(folder))) if wanted else set()
    if _WEIGHT in wanted and _MEASURED in there - wanted:
        on_rank_0(
            lambda: print(
                f"> warning: the checkpoint {folder} was trained with --moe-dynamic-routing, and "
                "the model that loads it routes by top-k: what it computes is not what was "
                "trained. To evaluate the checkpoint, use dynmoe evaluate --load",
                flush=True,
            )
        )
    missing = sorted(wanted - there)
    if missing == sorted(KNOTS):
        raise CheckpointError(
            f"the checkpoint {folder} was trained at one target, so its routers have no "
            f"{', '.join(missing)}, and --moe-dynamic-target-experts-per-token is a distribution: "
            "give that target, or --dist-ckpt-strictness log_all, which loads everything else and "
            "starts the thresholds of all targets afresh."
        )
    # If the checkpoint has no router weights, it has no experts either: these flags cannot help.
    if not missing or _WEIGHT not in there:
        return
    if (of_nulls := _of_larger_gates()) & wanted != of_nulls & there:
        raise CheckpointError(
            f"the checkpoint {folder} was trained with another --moe-dynamic-routing, whose gates "
            "have another number of rows: its weights fit only that routing."
        )
    if missing != [_THETA]:
        trained = (
            "was trained with another --moe-dynamic-routing"
            if _MEASURED in there
            else "was not trained with dynamic routing"
        )
        raise CheckpointError(
            f"the checkpoint {folder} {trained}: its routers have no {', '.join(missing)}. "
            f"{_AFRESH} loads its weights and starts what is missing, and the optimizer, afresh; "
            "with --finetune also at iteration 0."
        )
    raise CheckpointError(
        f"the checkpoint {folder} has routers without {', '.join(missing)}, which was trained with "
        "another --moe-dynamic-normalization: give none, as that run had it, or "
        f"{_AFRESH}, which starts what is missing, and the optimizer, afresh."
    )


def _of_routers(keys: Iterable[str]) -> set[str]:
    """The keys that belong to a router's weight, state or theta."""
    found = {key.rpartition(_ROUTER)[2] for key in keys if _ROUTER in key}
    entries = {name for rule in RULES.values() for name in rule.entries}
    return found & {_WEIGHT, _THETA, _INTEGRAL, _MEASURED, *KNOTS, *entries}


def _of_larger_gates() -> set[str]:
    """The state of the rules whose gates have rows beside those of the experts."""
    return {name for rule in RULES.values() if rule.extra_logits for name in rule.entries}


def _keys(state_dict: dict[str, Any]) -> Iterable[str]:
    from megatron.core.dist_checkpointing.dict_utils import nested_values

    return (str(getattr(value, "key", "")) for value in nested_values(state_dict))


def _stored_keys(folder: Path) -> Iterable[str]:
    path = folder / ".metadata"
    return load_metadata(path).state_dict_metadata if path.is_file() else ()
