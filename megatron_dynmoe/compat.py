"""The only place that touches upstream by version or patch.

Each patch states what upstream does, in which file, and why it does not do here. A test fails when
upstream changes so that a patch is no longer needed.
"""

from __future__ import annotations

import importlib.util

import torch


def install() -> None:
    """Apply the patches that every run under Megatron 0.19 needs, once."""
    _use_the_packaged_dataset_helpers()
    _resume_the_distributed_optimizer()


def _use_the_packaged_dataset_helpers() -> None:
    """``megatron/core/datasets/utils.py`` runs ``make`` where the package ships no Makefile.

    The wheel brings the compiled helper, so there is nothing to compile, yet
    ``megatron.training.initialize`` ends the process when ``make`` fails.
    """
    import megatron.core.datasets.utils as dataset_utils

    if importlib.util.find_spec("megatron.core.datasets.helpers_cpp") is not None:
        dataset_utils.compile_helpers = lambda: None


def _resume_the_distributed_optimizer() -> None:
    """``megatron/core/optimizer/distrib_optimizer.py`` loads no checkpoint with torch's AdamW.

    That is the optimizer where neither Apex nor Transformer Engine is installed. It keeps the
    number of steps as one tensor per parameter, theirs as one number per group, and
    ``DistributedOptimizer`` expects the former in some places and the latter in others:

    - ``state_dict``, also called to prepare loading, reads the step from a state that is still
      empty then. We fill the state first, with zeros, which loading overwrites.
    - ``load_state_dict`` puts the step of the checkpoint into one tensor that all parameters share,
      so the next step would add one to it for each of them. We give each its own copy.
    - ``_set_main_param_and_optimizer_states``, which comes after, wants a step among the loaded
      tensors of each parameter and finds none, or the zero from the preparation. We hand it a step
      that is not a tensor, which it passes over. It also writes into parameters with gradients
      enabled, which autograd forbids where they are float32 and so the model's own.
    """
    from megatron.core.optimizer import distrib_optimizer

    cls = distrib_optimizer.DistributedOptimizer
    if distrib_optimizer.HAVE_APEX_OR_TE or getattr(cls, "_dynmoe_resumes", False):
        return
    state_dict, load_state_dict = cls.state_dict, cls.load_state_dict
    set_states = cls._set_main_param_and_optimizer_states

    def filled_state_dict(self):
        if _is_torch_adam(self.optimizer):
            self.init_state_fn(self.optimizer, self.config)
            for state in self.optimizer.state.values():
                state.setdefault("step", torch.zeros(()))
        return state_dict(self)

    def load_with_separate_steps(self, loaded):
        load_state_dict(self, loaded)
        if _is_torch_adam(self.optimizer):
            for state in self.optimizer.state.values():
                state["step"] = state["step"].clone()

    def set_all_but_step(self, model_param, tensors):
        with torch.no_grad():
            set_states(self, model_param, {**tensors, "step": None})

    cls.state_dict = filled_state_dict
    cls.load_state_dict = load_with_separate_steps
    cls._set_main_param_and_optimizer_states = set_all_but_step
    cls._dynmoe_resumes = True


def _is_torch_adam(optimizer: object) -> bool:
    return isinstance(optimizer, torch.optim.Adam | torch.optim.AdamW)
