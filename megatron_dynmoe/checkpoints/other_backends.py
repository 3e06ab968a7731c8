"""Lets a run go on from the checkpoint of another back end, which has other names.

Upstream's two layer specs almost agree on the names in checkpoints. They differ in two things, at
which Megatron ends in a ``KeyError`` or a ``Missing key``:

- The norm before experts is ``pre_mlp_layernorm`` to Transformer Engine. The local spec calls it as
  if it were part of a dense MLP's first linear layer, which there it is to Transformer Engine.
- Transformer Engine's modules save a state of low precision beside their weights, which is empty
  unless the model was trained in FP8. Norms of other back ends have no such entry.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from megatron_dynmoe.checkpoints.collective import on_rank_0
from megatron_dynmoe.storage.unpickle import load_metadata

_NORM_NAMES = (".mlp.linear_fc1.layer_norm_", ".pre_mlp_layernorm.")
_EXTRA_STATE = "._extra_state"


def adopt_names(folder: Path, state_dict: dict[str, Any]) -> None:
    """Ask for norms as the checkpoint names them, and not for states that it lacks.

    All ranks take part.

    Args:
        folder: the folder of the checkpoint.
        state_dict: the nested dictionary with sharded tensors that Megatron is going to fill.
    """
    from megatron.core.dist_checkpointing.dict_utils import dict_list_map_inplace
    from megatron.core.dist_checkpointing.mapping import LocalNonpersistentObject, ShardedObject

    stored = on_rank_0(lambda: _entries_that_may_differ(folder))
    if not stored:
        return

    def adopt(value: Any) -> Any:
        key = getattr(value, "key", None)
        if not isinstance(key, str):
            return value
        if isinstance(value, ShardedObject):
            is_missing = _EXTRA_STATE in key and value.unique_key not in stored
            return LocalNonpersistentObject(value.data) if is_missing else value
        if key not in stored:
            value.key = next((name for name in _other_names(key) if name in stored), key)
        return value

    dict_list_map_inplace(adopt, state_dict)


def _entries_that_may_differ(folder: Path) -> set[str]:
    """The entries of a checkpoint that have other names, or none, under another back end."""
    path = folder / ".metadata"
    keys = load_metadata(path).state_dict_metadata if path.is_file() else ()
    return {key for key in keys if _EXTRA_STATE in key or _other_names(key)}


def _other_names(key: str) -> list[str]:
    """The names of the same entry under other back ends; none if it is no such norm."""
    ours = next((name for name in _NORM_NAMES if name in key), None)
    return [key.replace(ours, name) for name in _NORM_NAMES if name != ours] if ours else []
