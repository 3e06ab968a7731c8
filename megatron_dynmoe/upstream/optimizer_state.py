"""From the state of the optimizer that a run saved to that of the run that loads it."""

from __future__ import annotations

import copy
from typing import Any

import torch

# Among the keys that distinguish parameter groups, these belong to the schedule, not to the model.
_SCHEDULE_OF_GROUPS = ("max_lr", "min_lr", "start_wd", "end_wd")
# Whether a group follows --lr, which tells it from those with a --decoupled-lr.
_FOLLOWS_LR = "default_config"


def with_schedule_of(optimizers: list[Any], loaded: Any) -> Any:
    """Give the parameter groups of a saved state this run's learning rates and weight decay.

    Upstream also uses these values to distinguish groups. Under another ``--lr`` it therefore finds
    no group, even with ``--override-opt-param-scheduler``, which allows another learning rate.
    """
    own = [group for optimizer in optimizers for group in optimizer.param_groups]

    def rescheduled(group: dict[str, Any]) -> dict[str, Any]:
        return group | _schedule(_same_parameters(group, own) or group)

    def walk(part: Any) -> Any:
        if not isinstance(part, dict):
            return part
        return {
            key: [rescheduled(group) for group in value] if key == "param_groups" else walk(value)
            for key, value in part.items()
            # The tensors of the state are not changed.
        }

    return walk(loaded)


def take_schedule(optimizers: list[Any], loaded: Any) -> None:
    """Give this run's parameter groups the learning rates and weight decay of a saved state.

    For the same reason, upstream would find no group under another ``--lr`` with
    ``--use-checkpoint-opt-param-scheduler`` either, which asks for the saved learning rate.
    """
    saved: list[dict[str, Any]] = []

    def walk(part: Any) -> None:
        for key, value in part.items() if isinstance(part, dict) else ():
            if key == "param_groups":
                saved.extend(value)
            else:
                walk(value)

    walk(loaded)
    for group in [group for optimizer in optimizers for group in optimizer.param_groups]:
        group.update(_schedule(_same_parameters(group, saved) or {}))


def _schedule(group: dict[str, Any]) -> dict[str, Any]:
    return {key: group[key] for key in _SCHEDULE_OF_GROUPS if key in group}


def _same_parameters(group: dict[str, Any], others: list[dict[str, Any]]) -> dict[str, Any] | None:
    """The group of another run that holds the same kind of parameters, whatever its schedule."""
    from megatron.core.optimizer.optimizer import param_group_identifier_keys as keys

    model_keys = [key for key in keys if key not in _SCHEDULE_OF_GROUPS]

    def is_same(other: dict[str, Any], ignored: str | None) -> bool:
        return other.get(_FOLLOWS_LR, True) == group.get(_FOLLOWS_LR, True) and all(
            other.get(key) == group.get(key) for key in model_keys if key != ignored
        )

    for ignored in (None, "is_expert_parallel"):
        for other in others:
            if is_same(other, ignored):
                return other
    return None


def restructured(loaded: Any, optimizers: list[Any]) -> Any:
    """Bring the state dict of a chained optimizer into the structure of the one that loads it.

    Args:
        loaded: the optimizer's state from the checkpoint, which upstream has merged with the state
            that this run asked for. The state of one optimizer is a dict; the state of several is a
            dict of these with the keys 0, 1, ... If the two runs differ in this, both forms are in
            one dict.
        optimizers: the optimizers of this run, each with its parameter groups.

    Raises:
        ValueError: a parameter group of this run has no counterpart in the checkpoint.
    """
    from megatron.core.dist_checkpointing.dict_utils import merge

    if not isinstance(loaded, dict):
        return loaded
    whole = {key: value for key, value in loaded.items() if not isinstance(key, int)}
    parts = {key: value for key, value in loaded.items() if isinstance(key, int)}
    asked = [whole] if len(optimizers) == 1 else [parts.get(i, {}) for i in range(len(optimizers))]
    saved = [part for part in (whole, *parts.values()) if _saved_groups(part)]
    if not saved or len(saved) == len(optimizers):
        return loaded

    groups = [group for part in saved for group in _saved_groups(part)]
    result = {}
    for index, optimizer in enumerate(optimizers):
        # All optimizers have the same step and loss scale, so any part of the checkpoint will do.
        own = copy.deepcopy(saved[0])
        own.get("optimizer", own)["param_groups"] = [
            {**_counterpart(group, groups), "is_expert_parallel": group["is_expert_parallel"]}
            for group in optimizer.param_groups
        ]
        result[index] = merge(own, asked[index])
    return result[0] if len(optimizers) == 1 else result


def _saved_groups(part: dict[Any, Any]) -> list[dict[str, Any]]:
    """Return the parameter groups of a checkpoint, without those that only list parameters."""
    groups = part.get("optimizer", part).get("param_groups", [])
    return [group for group in groups if set(group) != {"params"}]


def _counterpart(group: dict[str, Any], saved_groups: list[dict[str, Any]]) -> dict[str, Any]:
    """Find the hyperparameters in the checkpoint for one of this run's parameter groups.

    Groups are matched as upstream matches them. If there is no match, the match ignores whether a
    group belongs to experts.
    """
    from megatron.core.optimizer.optimizer import param_group_identifier_keys as keys

    def matches(saved: dict[str, Any], ignored: str | None = None) -> bool:
        return all(group.get(key) == saved.get(key) for key in keys if key != ignored)

    for ignored in (None, "is_expert_parallel"):
        for saved in saved_groups:
            if matches(saved, ignored):
                return saved
    wanted = {key: group.get(key) for key in keys}
    raise ValueError(
        f"The checkpoint has no optimizer parameter group with {wanted}. Resume with the flags of "
        "the run that saved it (learning rates, weight decay), or give --no-load-optim to start "
        "with a fresh optimizer."
    )


def with_step_of(optimizers: list[Any], loaded: Any) -> Any:
    """Count steps where the optimizer of this run does.

    Megatron uses the Adam of Transformer Engine or Apex if one of them is installed, and torch's
    AdamW if not. Theirs keep the number of steps in each parameter group. Torch's keeps it in the
    state of each parameter, which Megatron saves as one ``common_step``; only its distributed
    optimizer puts it into the groups. Each Adam also has settings that a group of the other lacks.

    Args:
        optimizers: the optimizers of this run.
        loaded: the optimizers' state from the checkpoint, in the structure of this run.
    """
    inner = next((part.optimizer for part in optimizers if part.optimizer is not None), None)

    def walk(part: Any) -> Any:
        if not isinstance(part, dict):
            return part
        if "param_groups" in part and inner is not None:
            return _with_step(part, inner)
        return {key: walk(value) for key, value in part.items()}

    return walk(loaded)


def _with_step(saved: dict[str, Any], optimizer: Any) -> dict[str, Any]:
    state, groups = dict(saved.get("state", {})), saved["param_groups"]
    steps = (
        [state.pop("common_step")]
        if "common_step" in state
        else [group["step"] for group in groups if "step" in group]
    )
    if not steps:  # not of an Adam
        return saved
    step = int(max(steps))
    groups = [{**optimizer.defaults, **group, "step": step} for group in groups]
    if state and is_torch_adam(optimizer):
        state["common_step"] = torch.tensor(float(step))
        for group in groups:  # a group of torch's has no step, and would save one from now on
            del group["step"]
    return saved | {"param_groups": groups} | ({"state": state} if state else {})


def is_torch_adam(optimizer: object) -> bool:
    """Whether an optimizer is PyTorch's Adam or AdamW."""
    return isinstance(optimizer, torch.optim.Adam | torch.optim.AdamW)
