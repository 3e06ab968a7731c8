"""Megatron's distributed optimizer with torch's AdamW, and a chain of optimizers that resumes.

Megatron uses AdamW if neither Apex nor Transformer Engine is installed. AdamW keeps the number of
steps as one tensor per parameter; Apex and Transformer Engine keep one number per group.
``DistributedOptimizer`` expects the former in some places and the latter in others. Each function
here wraps one of upstream's methods, and says what that does.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch

from megatron_dynmoe.upstream import fewer_kernels, optimizer_state

_Method = Callable[..., Any]


def filling_steps(state_dict: _Method) -> _Method:
    """``state_dict`` is also called to prepare loading.

    It reads the step from a state that is still empty at that time. We fill the state with zeros
    first; loading overwrites them.
    """

    @functools.wraps(state_dict)
    def filled_state_dict(self):
        if optimizer_state.is_torch_adam(self.optimizer):
            self.init_state_fn(self.optimizer, self.config)
            for param, state in self.optimizer.state.items():
                if "step" not in state:
                    state["step"] = fewer_kernels.no_step(self.optimizer, param)
        return state_dict(self)

    return filled_state_dict


def separating_steps(load_state_dict: _Method) -> _Method:
    """``load_state_dict`` puts the checkpoint's step into one tensor that all parameters share.

    The next step would add one to it for each parameter. We give each parameter its own copy.
    """

    @functools.wraps(load_state_dict)
    def load_with_separate_steps(self, loaded):
        load_state_dict(self, loaded)
        if optimizer_state.is_torch_adam(self.optimizer):
            for state in self.optimizer.state.values():
                state["step"] = state["step"].clone()

    return load_with_separate_steps


def skipping_steps(set_states: _Method) -> _Method:
    """``_set_main_param_and_optimizer_states`` wants a step among each parameter's loaded tensors.

    It finds none, or the zero from the preparation. We give it a step that is not a tensor, which
    it skips. It also writes into parameters with gradients enabled. Autograd forbids this if they
    are float32, because they are then the model's own.
    """

    @functools.wraps(set_states)
    def set_all_but_step(self, model_param, tensors):
        with torch.no_grad():
            set_states(self, model_param, {**tensors, "step": None})

    return set_all_but_step


def synchronizing_all_steps(synchronize_steps: _Method) -> _Method:
    """``ChainedOptimizer._synchronize_steps`` knows only the step of a group.

    A pipeline stage without experts has an optimizer for experts without any parameter, and so
    without a step. This method is meant to give it one, and runs before each save and after each
    load. We do the same for the step in a state.
    """
    from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer

    @functools.wraps(synchronize_steps)
    def synchronize_all_steps(self):
        result = synchronize_steps(self)
        parts = [p for p in self.chained_optimizers if isinstance(p, DistributedOptimizer)]
        inner = [part.optimizer for part in parts if optimizer_state.is_torch_adam(part.optimizer)]
        states = [state for optimizer in inner for state in optimizer.state.values()]
        step = next((state["step"] for state in states if "step" in state), torch.zeros(()))
        for optimizer in inner:
            if not any(group["params"] for group in optimizer.param_groups):
                optimizer.state["no parameters"] = {"step": step.clone()}
        return result

    return synchronize_all_steps


def restructuring(load_state_dict: _Method) -> _Method:
    """``ChainedOptimizer.load_state_dict`` refuses the state of another layout.

    With expert parallelism the chain holds two optimizers (dense and experts), without it one. The
    tensors of a checkpoint are named after the parameters and fit both cases. The other values
    (step, hyperparameters of each parameter group, loss scale) keep the structure of the run that
    saved them. We first bring these into the structure of the running optimizer.
    """

    @functools.wraps(load_state_dict)
    def load_restructured(self, loaded):
        if _asks_for("override_opt_param_scheduler"):
            loaded = optimizer_state.with_schedule_of(self.chained_optimizers, loaded)
        elif _asks_for("use_checkpoint_opt_param_scheduler"):
            optimizer_state.take_schedule(self.chained_optimizers, loaded)
        loaded = optimizer_state.restructured(loaded, self.chained_optimizers)
        load_state_dict(self, optimizer_state.with_step_of(self.chained_optimizers, loaded))
        for inner in (part.optimizer for part in self.chained_optimizers):
            if optimizer_state.is_torch_adam(inner):
                fewer_kernels.keep_fused(inner)

    return load_restructured


def _asks_for(argument: str) -> bool:
    from megatron.training import get_args

    try:
        return getattr(get_args(), argument)
    except AssertionError:  # a user's own training loop has no Megatron arguments
        return False
