"""What a training script brings to the loop: its flags, model, data and step."""

from __future__ import annotations

from argparse import ArgumentParser, Namespace
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from megatron_dynmoe.model.hybrid import model_config_from_args
from megatron_dynmoe.training.datasets.provider import train_valid_test_datasets_provider
from megatron_dynmoe.training.datasets.token_files import check_token_files
from megatron_dynmoe.training.forward import forward_step


@dataclass(frozen=True)
class Script:
    """The parts of a training that depend on its model; by default a language model of tokens.

    A script of your own gives some of them to :func:`megatron_dynmoe.training.loop.train`, and
    keeps flags, controller, checkpoints and run folder. ``examples/diffusion`` is one.

    Attributes:
        module: how ``python -m`` calls it, for the command in the run's folder.
        is_exported: whether its models can be exported to Hugging Face; else no note at the start
            says what stands in the way.
        add_flags: adds flags of its own to Megatron's and ours; it may change defaults.
        settle: completes the parsed arguments before they are checked, such as ``seq_length``.
        model_config: the model's config from validated arguments. A subclass of upstream's
            ``GPTModelConfig`` names its own builder. The model keeps its ``TransformerBlock`` in
            the attribute ``decoder``, and its layers come from ``transformer_layer_spec``.
        check_data: refuses data that cannot be trained on, before anything is built.
        datasets: Megatron's ``train_valid_test_datasets_provider``.
        forward_step: Megatron's ``forward_step_func``.
        evaluated: called with the model chunks on every rank at the end of an evaluation.
    """

    module: str = "megatron_dynmoe.pretrain"
    is_exported: bool = True
    add_flags: Callable[[ArgumentParser], ArgumentParser] = lambda parser: parser
    settle: Callable[[Namespace], None] = lambda args: None
    model_config: Callable[[Namespace], Any] = model_config_from_args
    check_data: Callable[[Namespace], None] = check_token_files
    datasets: Callable[..., tuple[Any, Any, Any]] = train_valid_test_datasets_provider
    forward_step: Callable[..., Any] = forward_step
    evaluated: Callable[[list[torch.nn.Module]], None] = lambda model: None


GPT = Script()
