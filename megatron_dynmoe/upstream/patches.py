"""The table of all patches: the only place that replaces functions of Megatron.

``tests/upstream/test_patches.py`` has a test for each row, which fails if upstream changes so that
the row is no longer needed.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from typing import Any

import torch
from megatron.core import optimizer, utils
from megatron.core.optimizer import distrib_optimizer

from megatron_dynmoe import kernels
from megatron_dynmoe.backends import cpu
from megatron_dynmoe.checkpoints.load import LoadGuard
from megatron_dynmoe.checkpoints.save import SaveGuard, TrackerFileWriter
from megatron_dynmoe.control.row_buffer import with_row_buffer
from megatron_dynmoe.training.datasets import index_cache, splits
from megatron_dynmoe.training.signals import StopSignals
from megatron_dynmoe.upstream import (
    distributed_optimizer,
    fewer_kernels,
    gradient_buffer,
    shortcuts,
    wrappers,
)
from megatron_dynmoe.upstream.patch import Patch

_CHECKPOINTING = "megatron.training.checkpointing"
_DISTRIBUTED = "megatron.core.optimizer.distrib_optimizer:DistributedOptimizer"
_CHAINED = "megatron.core.optimizer.optimizer:ChainedOptimizer"
_DISPATCHER = "megatron.core.transformer.moe.token_dispatcher"
_GPT_DATASET = "megatron.core.datasets.gpt_dataset:GPTDataset"
_LAYERS = "megatron.core.tensor_parallel.layers"
_ROPE = "megatron.core.models.common.embeddings.rope_utils"
_STRATEGIES = "megatron.core.dist_checkpointing.strategies"
_WRITER = f"{_STRATEGIES}.filesystem_async:FileSystemWriterAsync"

_saving, _loading = SaveGuard(), LoadGuard()


def _takes(ours: Any) -> Callable[[Any], Any]:
    """A wrapper that forgets upstream's function."""
    return lambda _: ours


def _instead_of(local: Any, ours: Any) -> Callable[[Any], Any]:
    """A wrapper that keeps the functions of Apex or Transformer Engine, if upstream has them."""
    return lambda found: ours if found is local else found


PATCHES = (
    Patch(
        "packaged dataset helpers",
        "megatron/core/datasets/utils.py runs make, but the wheel ships no Makefile. The wheel "
        "contains the compiled helper, so there is nothing to compile. Nevertheless "
        "megatron.training.initialize ends the process when make fails.",
        "The wheel ships a Makefile, or make is not run if the helper is there.",
        {"megatron.core.datasets.utils:compile_helpers": _takes(lambda: None)},
        lambda: importlib.util.find_spec("megatron.core.datasets.helpers_cpp") is not None,
    ),
    Patch(
        "saving without a helper process",
        "megatron/core/dist_checkpointing/strategies/torch.py passes the result of writing from "
        "one function to the next through the queue of a multiprocessing manager, even if both "
        "functions run in this process. The manager is a separate process that imports torch "
        "again. This costs each rank some seconds and some hundred MB, and the manager outlives a "
        "rank that is killed.",
        "A save that is not asynchronous starts no manager.",
        {f"{_STRATEGIES}.torch:TorchDistSaveShardedStrategy.save": wrappers.with_plain_queue},
    ),
    Patch(
        "optimizer in few kernels",
        "megatron/core/optimizer/__init__.py and clip_grads.py need Apex or Transformer Engine to "
        "be fast. Without these, AdamW is not fused, and the gradient's norm and clipping take one "
        "parameter after another; the host waits for each one's norm.",
        "Upstream's own norm and clipping take all parameters at once, and its AdamW is fused.",
        {
            "megatron.core.optimizer.clip_grads:l2_norm_impl": _instead_of(
                utils.local_multi_tensor_l2_norm, fewer_kernels.l2_norm
            ),
            "megatron.core.optimizer.clip_grads:multi_tensor_scale_impl": _instead_of(
                utils.local_multi_tensor_scale, fewer_kernels.scale
            ),
            "megatron.core.optimizer:_get_megatron_optimizer_based_on_param_groups": lambda build: (
                fewer_kernels.with_fused_adam(build) if optimizer.USING_PYTORCH_OPTIMIZER else build
            ),
        },
    ),
    Patch(
        "gradients at aligned addresses",
        "megatron/core/distributed/param_and_grad_buffer.py leaves no space between gradients, "
        "unless with the distributed optimizer. The one element of a router's theta_offset moves "
        "all after it, 46 of the quickstart's 51, away from the addresses that processors read "
        "fastest.",
        "Upstream pads the beginnings of parameters without the distributed optimizer, too.",
        {
            "megatron.core.distributed.param_and_grad_buffer"
            ":_compute_default_per_buffer_param_layout": gradient_buffer.aligned
        },
    ),
    Patch(
        "rotary positions in one kernel",
        "megatron/core/models/common/embeddings/rope_utils.py takes twelve kernels to rotate "
        "queries, and as many for keys, if there is no Transformer Engine.",
        "Upstream has a fused rotation without Transformer Engine.",
        {
            f"{_ROPE}:fused_apply_rotary_pos_emb": fewer_kernels.rotation,
            f"{_ROPE}:fused_apply_rotary_pos_emb_thd": fewer_kernels.packed_rotation,
        },
        lambda: kernels.available(torch.device("cuda")),
    ),
    Patch(
        "rotary positions in few calls",
        "megatron/core/models/common/embeddings/rope_utils.py rotates in eighteen calls, and "
        "autograd goes through each of them again. The last one appends what does not rotate, "
        "which is usually an empty tensor.",
        "Upstream concatenates nothing if everything rotates.",
        {f"{_ROPE}:_apply_rotary_pos_emb_bshd": shortcuts.rotating_halves},
        cpu.is_installed,
    ),
    Patch(
        "the loss in few passes",
        "megatron/core/tensor_parallel/cross_entropy.py takes six passes over the logits, as parts "
        "of a vocabulary on several ranks need them, also if a rank has all of it; on a CPU they "
        "take twice the time of three.",
        "Upstream takes a softmax of logits that are whole.",
        {
            "megatron.core.tensor_parallel:vocab_parallel_cross_entropy": (
                shortcuts.with_whole_vocabularies
            )
        },
        cpu.is_installed,
    ),
    Patch(
        "rows go to other ranks only",
        "megatron/core/tensor_parallel/mappings.py exchanges rows in a function of autograd in "
        "Python, which returns them as they are if there is but one rank: six calls of a layer and "
        "its backward pass, which take a CPU half a percent of a step.",
        "Upstream asks for the number of ranks before it calls the function.",
        {f"{_DISPATCHER}:all_to_all": shortcuts.sending},
    ),
    Patch(
        "rows in order are not sorted",
        "megatron/core/transformer/moe/token_dispatcher.py sorts rows by rank and expert. It does "
        "so if there is but one rank, too: it splits them by expert and puts them together again "
        "as they were, twice in each layer and direction.",
        "Upstream returns rows unchanged if they are in order.",
        {f"{_DISPATCHER}:sort_chunks_by_idxs": shortcuts.sort_of_ranks},
    ),
    Patch(
        "resuming the distributed optimizer",
        "megatron/core/optimizer/distrib_optimizer.py loads no checkpoint with torch's AdamW, "
        "which keeps its steps elsewhere than Apex's and Transformer Engine's Adam. See "
        "upstream/distributed_optimizer.py.",
        "DistributedOptimizer resumes with torch.optim.AdamW.",
        {
            f"{_CHAINED}._synchronize_steps": distributed_optimizer.synchronizing_all_steps,
            f"{_DISTRIBUTED}.state_dict": distributed_optimizer.filling_steps,
            f"{_DISTRIBUTED}.load_state_dict": distributed_optimizer.separating_steps,
            f"{_DISTRIBUTED}._set_main_param_and_optimizer_states": (
                distributed_optimizer.skipping_steps
            ),
        },
        lambda: not distrib_optimizer.HAVE_APEX_OR_TE,
    ),
    Patch(
        "resuming under another layout",
        "megatron/core/optimizer/optimizer.py loads no optimizer state from EP > 1 under EP = 1, "
        "under another learning rate, or of another Adam. See upstream/optimizer_state.py.",
        "ChainedOptimizer loads the state of another layout, learning rate and Adam.",
        {f"{_CHAINED}.load_state_dict": distributed_optimizer.restructuring},
    ),
    Patch(
        "the saved weight decay at once",
        "megatron/core/optimizer_param_scheduler.py sets the weight decay of all parameters before "
        "it has loaded that of the checkpoint. With --use-checkpoint-opt-param-scheduler, the "
        "first step therefore has that of the command line.",
        "The schedule's last call of step comes after all of its state (NVIDIA/Megatron-LM#5213).",
        {
            "megatron.core.optimizer_param_scheduler:OptimizerParamScheduler.load_state_dict": (
                wrappers.decaying_by_what_was_loaded
            )
        },
    ),
    Patch(
        "guarded saves",
        "megatron/training/checkpointing.py overwrites the tracker in place. If the disk is full "
        "or the process ends at that moment, the tracker is empty, and the way to the previous "
        "checkpoint is lost. Rank 0 alone makes the folder, .metadata and metadata.json while the "
        "others wait for it. If it fails, they wait until something else ends them. The cause of a "
        "failed write is replaced by the name of its type. There is no hook between the last file "
        "and the tracker, so that the function that opens it is wrapped, too.",
        "The tracker is replaced whole, a failed save fails on all ranks, and a hook runs before "
        "the tracker is written.",
        {
            "megatron.core.dist_checkpointing:save": _saving.with_manifest,
            "megatron.core.dist_checkpointing.serialization:save_config": (
                _saving.record_raised_error
            ),
            f"{_WRITER}.finish": _saving.record_raised_error,
            f"{_WRITER}.write_preloaded_data": lambda write: staticmethod(
                _saving.record_returned_error(write)
            ),
            f"{_CHECKPOINTING}:save_checkpoint": _saving.with_folder,
            "megatron.training.training:save_checkpoint": _saving.with_folder,
            f"{_CHECKPOINTING}:maybe_msc": TrackerFileWriter,
        },
    ),
    Patch(
        "checked loads",
        "megatron/training/checkpointing.py does not check what it loads, except with "
        "--verify-integrity. With this flag, one rank reads everything, but only after all ranks "
        "have unpickled some of it, and a checkpoint without checksums is refused. An unreadable "
        "tracker ends the process with exit code 0.",
        "Upstream compares a checkpoint with checksums before it reads it, on every load, and a "
        "load can be given the checkpoint that it takes.",
        {
            f"{_CHECKPOINTING}:_load_base_checkpoint": _loading.checking,
            f"{_CHECKPOINTING}:read_metadata": _loading.choosing,
        },
    ),
    Patch(
        "every signal saves",
        "megatron/training/dist_signal_handler.py handles one signal, and forgets which it was. "
        "With --exit-signal-handler the run saves and ends in an orderly way on SIGTERM, but with "
        "exit code 0 as if it had finished. Ctrl-C and the end of a terminal still end it without "
        "a checkpoint, because no flag adds other signals. The second name is for data workers.",
        "DistributedSignalHandler takes several signals and tells which one came.",
        {
            "megatron.training.global_vars:DistributedSignalHandler": _takes(StopSignals),
            "megatron.training.datasets.data_samplers:DistributedSignalHandler": _takes(
                StopSignals
            ),
        },
    ),
    Patch(
        "data workers end with their rank",
        "torch/utils/data/_utils/worker.py: a worker ends when its parent process changes. It "
        "reads its parent for the first time some moments after it was started. If its rank has "
        "been killed before that, the worker takes the process that adopted it for its parent, "
        "and never ends.",
        "ManagerWatchdog takes the parent from multiprocessing, or from its caller.",
        {"torch.utils.data._utils.worker:ManagerWatchdog": wrappers.noting_parent_at_start},
    ),
    Patch(
        "data indexes named by content",
        "megatron/core/datasets/{gpt,blended}_dataset.py name cached indexes by path alone. If new "
        "tokens are written under the same path, they are read with the index of the old ones. See "
        "training/datasets/index_cache.py.",
        "The name of a cached index depends on the content of the token files, and its files are "
        "replaced whole.",
        {
            f"{_GPT_DATASET}._build_document_sample_shuffle_indices": lambda build: (
                index_cache.named_by_content(
                    index_cache.written_atomically(build, index_cache.folder_of_gpt)
                )
            ),
            "megatron.core.datasets.blended_dataset:BlendedDataset._build_indices": lambda build: (
                index_cache.written_atomically(build, lambda data: data.config.path_to_cache)
            ),
        },
    ),
    Patch(
        "empty splits are refused",
        "megatron/core/datasets/gpt_dataset.py adds epochs until there are enough tokens. If an "
        "epoch has no tokens, it never stops. This happens, for example, if there are few "
        "documents and a split gets none of them under Megatron's default --split, even if the run "
        "reads nothing from that split.",
        "GPTDataset refuses a split without tokens.",
        {f"{_GPT_DATASET}._get_num_epochs": splits.refusing_empty_epochs},
    ),
    Patch(
        "each step is logged as itself",
        "megatron/training/training.py always logs the first step of a process, and also counts it "
        "in the interval that the step begins. With --log-interval 1 the step is the whole "
        "interval, so the second line shows the mean of the first two losses and times.",
        "The first step's losses are not counted again if the step ends an interval.",
        {"megatron.training.training:training_log": wrappers.with_first_interval_logged},
    ),
    Patch(
        "experts begin differently",
        "megatron/core/tensor_parallel/layers.py: with --use-cpu-initialization, which the CPU "
        "layer needs, weights are drawn from torch's own generator. Its seed is that of the "
        "pipeline stage, so the first expert of each expert-parallel rank begins as the first of "
        "all others. (On a GPU, experts have a generator of their own with a seed by rank.)",
        "Experts are drawn by a seed of their rank on the CPU, too.",
        {
            f"{_LAYERS}:{cls}.__init__": wrappers.seeded_by_rank
            for cls in ("ColumnParallelLinear", "RowParallelLinear")
        },
    ),
    Patch(
        "the norm counts all sinks",
        "megatron/core/transformer/dot_product_attention.py and Transformer Engine's do not mark "
        "the learnable offset of --softmax-type learnable as split over tensor-parallel ranks. "
        "Each rank holds that of its heads, but only the first one's is counted in the gradient's "
        "norm, so gradients are clipped less than they should be.",
        "The offset is marked as tensor-parallel (NVIDIA/Megatron-LM#7530).",
        {"megatron.core.optimizer:_get_param_groups": wrappers.counting_all_sinks},
    ),
    Patch(
        "room for rows",
        "megatron/training/training.py has no hook around the schedule of a global batch, so that "
        "nothing could run it again. See control/row_buffer.py. A training loop of one's own gets "
        "its schedule elsewhere, and its layers count their rows.",
        "The training loop calls a hook that may run a global batch again.",
        {"megatron.training.training:get_forward_backward_func": with_row_buffer},
    ),
    Patch(
        "settings of a CPU",
        "megatron/training/arguments.py takes settings that need a GPU, and has no others for a "
        "machine without one.",
        "Upstream trains without CUDA.",
        {"megatron.training.arguments:validate_args": cpu.with_settings_of_a_cpu},
        cpu.is_installed,
    ),
    Patch(
        "random state of a CPU",
        "megatron/core/tensor_parallel/random.py writes the state into torch.cuda's list of "
        "generators, which is empty without a GPU.",
        "It writes by torch.cuda.set_rng_state, for which backends/cpu.py stands in.",
        {"megatron.core.tensor_parallel.random:_set_cuda_rng_state": _takes(cpu.set_random_state)},
        cpu.is_installed,
    ),
    Patch(
        "splits that are on the host already",
        "megatron/core/transformer/moe/token_dispatcher.py turns splits into numpy arrays only "
        "when it copies them from a GPU.",
        "as_numpy is obeyed on every device.",
        {f"{_DISPATCHER}:maybe_move_tensor_to_cpu": _takes(cpu.to_host)},
        cpu.is_installed,
    ),
)


def install() -> None:
    """Apply the patches that this process needs and does not have yet."""
    for patch in PATCHES:
        patch.apply()


def watching(
    step: Callable[[Any], Any],
    forward: Callable[[Any], Any],
    backward: Callable[[Any], Any],
    preprocess: Callable[[Any], Any],
    read_means: Callable[[Any], Any],
) -> Patch:
    """Patch Megatron for a dry run, in a process that trains nothing.

    Args:
        step, forward, backward, preprocess, read_means: take a function and return what replaces
            it.
    """
    schedules = "megatron.core.pipeline_parallel.schedules"
    return Patch(
        "a dry run watches",
        "megatron/training/training.py and the schedules have no hook at the beginning and end of "
        "a step and of a pass. The dispatcher reads the numbers of rows from the device, which "
        "has none in a dry run. The log reads losses that do not exist.",
        "Upstream calls hooks around steps and passes.",
        {
            "megatron.training.training:train_step": step,
            "megatron.training.training:training_log": _takes(lambda *args, **kwargs: False),
            f"{schedules}:forward_step": forward,
            f"{schedules}:backward_step": backward,
            f"{_DISPATCHER}:MoEAlltoAllTokenDispatcher.preprocess": preprocess,
            # Ours inherits from it, and has a method of its own.
            "megatron_dynmoe.moe.dispatch:VariableKAlltoAllTokenDispatcher.preprocess": preprocess,
            "megatron_dynmoe.control.row_buffer:read": read_means,
        },
    )
