"""From the command line into Megatron's training loop."""

from __future__ import annotations

import sys
import time
from argparse import Namespace
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import TYPE_CHECKING

import megatron.training.arguments as megatron_arguments
import torch
from megatron.core.enums import ModelType
from megatron.core.utils import get_model_config
from megatron.training import get_args, pretrain, print_rank_last, set_startup_timestamps
from megatron.training.argument_utils import pretrain_cfg_container_from_args
from megatron.training.checkpointing import load_args_from_checkpoint
from megatron.training.global_vars import get_tensorboard_writer, get_wandb_writer
from megatron.training.models.hybrid import HybridModelConfig

from megatron_dynmoe.backends import choice
from megatron_dynmoe.checkpoints import collective, load
from megatron_dynmoe.checkpoints.saved_arguments import agree_with_checkpoint
from megatron_dynmoe.control.update import GlobalBatchUpdate, reduce_statistics, routers_of
from megatron_dynmoe.model.hybrid import hybrid_stack_spec
from megatron_dynmoe.model.prepare import describe, prepare_training
from megatron_dynmoe.model.settled import Settled, settle_run
from megatron_dynmoe.model.spec import layer_spec
from megatron_dynmoe.runs import metric_names
from megatron_dynmoe.runs.metrics import summarize
from megatron_dynmoe.settings.arguments import naming_flags
from megatron_dynmoe.settings.config import DynMoEConfig
from megatron_dynmoe.settings.messages.command_line import UsageError
from megatron_dynmoe.settings.messages.refusals import FlagError
from megatron_dynmoe.training import notices, run_directory, signals
from megatron_dynmoe.training.checks.settle_arguments import OTHER_MODELS, settle_arguments
from megatron_dynmoe.training.checks.upstream_refusals import in_flags
from megatron_dynmoe.training.flags import add_flags, training_parser
from megatron_dynmoe.training.script import GPT, Script
from megatron_dynmoe.training.wandb_run import complete_wandb

if TYPE_CHECKING:
    from megatron.training.models.gpt import GPTModelConfig


def train(program_start: float, script: Script = GPT) -> None:
    """Train as the command line says.

    Args:
        program_start: seconds since the epoch.
        script: what is trained.

    Raises:
        UsageError: a setting makes no sense; raised before the first step.
    """
    set_startup_timestamps(program_start=program_start, main_entry=time.time())
    with run_directory.cleaning_up_failed_starts():
        with refusing_in_flags(script=script):
            args, resolved, chosen = parse_command_line(script)
            model_config = script.model_config(args)
            with naming_flags(args):
                settled = settle_run(resolved, model_config.transformer, chosen, args)
            script.check_data(args)
        _build_and_train(args, model_config, settled, program_start, script)


def _build_and_train(
    args: Namespace,
    model_config: GPTModelConfig | HybridModelConfig,
    settled: Settled,
    program_start: float,
    script: Script,
) -> None:
    notices.print_notes(args, settled, script.is_exported)
    if use_our_layers(args, model_config, settled) and args.rank == 0:
        for line in describe(settled, model_config.transformer, args):
            print(line, flush=True)
    try:
        with (
            run_directory.recording(args, settled, program_start, script.module),
            refusing_in_flags(script=script),
        ):
            pretrain(
                pretrain_cfg_container_from_args(args, model_config),
                script.datasets,
                ModelType.encoder_or_decoder,
                script.forward_step,
                non_loss_data_func=partial(report_evaluation, evaluated=script.evaluated),
            )
    except collective.CheckpointError:
        sys.tracebacklimit = 0
        raise
    except SystemExit as exit:
        if exit.code or not hasattr(args, "curr_iteration"):
            raise  # not every rank has agreed to stop, or no step has run yet
        reason = notices.print_how_to_resume(args, signals.stop_signal(), ends=False)
        signals.exit_with_signal_code(reason)
    if not args.skip_train:
        notices.print_how_to_resume(args)


def use_our_layers(
    args: Namespace, model_config: GPTModelConfig | HybridModelConfig, settled: Settled
) -> bool:
    """Prepare the training of a model with our layers, unless upstream's alone do; say whether."""
    is_other_model = any(getattr(args, name, None) for name in OTHER_MODELS)
    is_native = settled.backend.backend == "torch_native" and not is_other_model
    if not (settled.dynmoe.is_dynamic or is_native):
        return False
    prepare_training(settled, model_config.transformer, args)
    if isinstance(model_config, HybridModelConfig):
        model_config.hybrid_stack_spec = hybrid_stack_spec(model_config.transformer, settled)
    else:
        model_config.transformer_layer_spec = partial(layer_spec, settled=settled)
    return True


@contextmanager
def refusing_in_flags(words: Sequence[str] | None = None, script: Script = GPT) -> Iterator[None]:
    """State in one line, in terms of flags, why a run is refused; active until the first step.

    Args:
        words: the command line; None: this process's.
        script: whose flags there are.
    """
    try:
        yield
    except Exception as error:
        parser = script.add_flags(training_parser())
        refusal = in_flags(error, parser, sys.argv[1:] if words is None else words)
        if refusal is None:
            raise
        raise UsageError(refusal) from None


def parse_command_line(
    script: Script = GPT,
) -> tuple[Namespace, DynMoEConfig, choice.BackEnd]:
    """Parse and check all flags, and register them as Megatron's global arguments.

    Returns:
        Megatron's arguments; our settings with their defaults filled in; and the back end, on which
        some of Megatron's arguments depend.
    """
    args = megatron_arguments.parse_args(lambda parser: script.add_flags(add_flags(parser)))
    script.settle(args)
    if args.yaml_cfg is not None:
        raise FlagError(
            "yaml_cfg",
            args.yaml_cfg,
            ", and Megatron's experimental YAML arguments pass by the checks of this entry point",
            "give flags instead",
        )
    if args.use_checkpoint_args:
        _take_arguments_of_checkpoint(args)
    resolved, chosen = _check(args)
    # From the module, because on a CPU another function takes its place.
    megatron_arguments.validate_args(args, {})
    choice.group_recomputed_experts(chosen.backend, args)  # the CPU layer turns the flag off
    megatron_arguments.set_global_variables(args)
    return args, resolved, chosen


def _take_arguments_of_checkpoint(args: Namespace) -> None:
    """Obey ``--use-checkpoint-args``, as upstream's ``parse_and_validate_args`` does."""
    if args.load is None and args.pretrained_checkpoint is None:
        raise FlagError(
            "use_checkpoint_args", True, " without --load", "give --load, or leave it out"
        )
    if args.non_persistent_ckpt_type == "local":
        raise FlagError(
            "non_persistent_ckpt_type",
            "local",
            ", which --use-checkpoint-args cannot read",
            "leave one of them out",
        )
    for source in ("pretrained_checkpoint", "load"):
        load_args_from_checkpoint(args, load_arg=source)


def _check(args: Namespace) -> tuple[DynMoEConfig, choice.BackEnd]:
    """Check and complete the arguments before upstream does."""
    run_directory.set_paths(args)
    complete_wandb(args)
    signals.disable_without_training(args)
    resolved, chosen = settle_arguments(args)
    load.check_paths(args)
    agree_with_checkpoint(args)
    return resolved, chosen


def report_evaluation(
    model: list[torch.nn.Module],
    evaluated: Callable[[list[torch.nn.Module]], None] = GPT.evaluated,
) -> None:
    """Print and write the mean experts per token of the evaluation that just ran.

    Megatron calls it on every rank at the end of an evaluation (``non_loss_data_func``).

    Args:
        model: the rank's model chunks.
        evaluated: what a script does after it.
    """
    _report_experts(model)
    evaluated(model)


def _report_experts(model: list[torch.nn.Module]) -> None:
    config = get_model_config(model[0])
    if not isinstance(config.finalize_model_grads_func, GlobalBatchUpdate):
        return  # stock top-k has no such count
    statistics = reduce_statistics(
        list(routers_of(model)), config.num_layers, config.num_moe_experts, evaluation=True
    )
    if torch.distributed.get_rank() != torch.distributed.get_world_size() - 1:
        return
    summary = summarize(statistics)
    print_rank_last(
        f" validation experts per token: {summary.experts_per_token:.4f} "
        f"(std {summary.std_experts_per_token:.3f}) | by layer: "
        + " ".join(f"{value:.3f}" for value in summary.experts_per_token_by_layer)
    )
    args = get_args()
    # Upstream counts the iteration after the step; without training it sets no such argument.
    iteration = args.curr_iteration + 1 if hasattr(args, "curr_iteration") else args.iteration
    values = {
        metric_names.VALIDATION_EXPERTS: summary.experts_per_token,
        metric_names.VALIDATION_STD_EXPERTS: summary.std_experts_per_token,
    }
    writer, wandb_writer = get_tensorboard_writer(), get_wandb_writer()
    if writer is not None:
        for name, value in values.items():
            writer.add_scalar(name, value, iteration)
    if wandb_writer is not None:
        wandb_writer.log(values, iteration)
