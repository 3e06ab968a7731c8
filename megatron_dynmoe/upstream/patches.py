"""Every patch of upstream that a training on a GPU needs.

Each patch says what upstream does, in which file, and why that does not work here. For resuming
optimizers, the tracker, signals and the functions in few kernels, a test fails if upstream changes
so that the patch is no longer needed.
"""

from __future__ import annotations

import functools
import importlib.util
import multiprocessing
import queue
from typing import Any

import torch

from megatron_dynmoe import kernels
from megatron_dynmoe.upstream import fewer_kernels, optimizer_state


@functools.cache
def install() -> None:
    """Apply the patches that every run under Megatron 0.19 needs, once."""
    _use_the_packaged_dataset_helpers()
    _save_without_a_helper_process()
    _step_with_few_kernels()
    _leave_sorted_rows()
    _resume_the_distributed_optimizer()
    _resume_under_another_layout()
    _guard_checkpoints()
    _handle_every_signal()
    _end_data_workers_with_their_rank()
    _name_data_indexes_by_content()
    _refuse_empty_splits()
    _log_each_step_as_itself()
    _initialize_experts_differently()
    _make_room_for_rows()


def _use_the_packaged_dataset_helpers() -> None:
    """``megatron/core/datasets/utils.py`` runs ``make``, but the wheel ships no Makefile.

    The wheel contains the compiled helper, so there is nothing to compile. Nevertheless
    ``megatron.training.initialize`` ends the process when ``make`` fails.
    """
    import megatron.core.datasets.utils as dataset_utils

    if importlib.util.find_spec("megatron.core.datasets.helpers_cpp") is not None:
        dataset_utils.compile_helpers = lambda: None


def _save_without_a_helper_process() -> None:
    """``megatron/core/dist_checkpointing/strategies/torch.py`` starts a process to save.

    It passes the result of writing from one function to the next through the queue of a
    ``multiprocessing`` manager, even if both functions run in this process. The manager is a
    separate process that imports torch again. This costs each rank some seconds and some hundred
    MB, and the manager outlives a rank that is killed. Here a save that is not asynchronous gets a
    plain queue.
    """
    from megatron.core.dist_checkpointing.strategies import filesystem_async
    from megatron.core.dist_checkpointing.strategies.torch import TorchDistSaveShardedStrategy

    save = TorchDistSaveShardedStrategy.save

    @functools.wraps(save)
    def save_with_plain_queue(self, *args, **kwargs):
        kept, filesystem_async._results_queue = filesystem_async._results_queue, queue.Queue()
        try:
            return save(self, *args, **kwargs)
        finally:
            filesystem_async._results_queue = kept

    TorchDistSaveShardedStrategy.save = save_with_plain_queue


def _step_with_few_kernels() -> None:
    """``megatron/core/optimizer/__init__.py`` and ``clip_grads.py`` need Apex or TE to be fast.

    Without these, AdamW is not fused, and the gradient's norm and clipping take one parameter after
    another; the host waits for each one's norm. ``rope_utils.py`` takes twelve kernels to rotate
    queries, and as many for keys. If upstream has Apex or Transformer Engine, their functions run.
    See :mod:`megatron_dynmoe.upstream.fewer_kernels`.
    """
    from megatron.core import optimizer, utils
    from megatron.core.optimizer import clip_grads

    if clip_grads.l2_norm_impl is utils.local_multi_tensor_l2_norm:
        clip_grads.l2_norm_impl = fewer_kernels.l2_norm
    if clip_grads.multi_tensor_scale_impl is utils.local_multi_tensor_scale:
        clip_grads.multi_tensor_scale_impl = fewer_kernels.scale
    if optimizer.USING_PYTORCH_OPTIMIZER:
        build = "_get_megatron_optimizer_based_on_param_groups"
        setattr(optimizer, build, fewer_kernels.fused(getattr(optimizer, build)))
    if kernels.available(torch.device("cuda")):
        fewer_kernels.use_rope_kernel()


def _leave_sorted_rows() -> None:
    """``megatron/core/transformer/moe/token_dispatcher.py`` sorts rows by rank and expert.

    It does so if there is but one rank, too: it splits them by expert and puts them together again
    as they were, twice in each layer and direction.
    """
    from megatron.core.transformer.moe import token_dispatcher

    from megatron_dynmoe.upstream.fewer_kernels import sort_of_ranks

    token_dispatcher.sort_chunks_by_idxs = sort_of_ranks(token_dispatcher.sort_chunks_by_idxs)


def _resume_the_distributed_optimizer() -> None:
    """``megatron/core/optimizer/distrib_optimizer.py`` loads no checkpoint with torch's AdamW.

    Megatron uses AdamW if neither Apex nor Transformer Engine is installed. AdamW keeps the number
    of steps as one tensor per parameter; Apex and Transformer Engine keep one number per group.
    ``DistributedOptimizer`` expects the former in some places and the latter in others:

    - ``state_dict`` is also called to prepare loading. It reads the step from a state that is still
      empty at that time. We fill the state with zeros first; loading overwrites them.
    - ``load_state_dict`` puts the step of the checkpoint into one tensor that all parameters share,
      so the next step would add one to it for each parameter. We give each parameter its own copy.
    - ``_set_main_param_and_optimizer_states`` runs after that. It wants a step among the loaded
      tensors of each parameter, and finds none, or the zero from the preparation. We give it a step
      that is not a tensor, which it skips. It also writes into parameters with gradients enabled.
      Autograd forbids this if they are float32, because they are then the model's own.
    - A pipeline stage without experts has an optimizer for experts without any parameter, and so
      without a step. ``ChainedOptimizer._synchronize_steps`` is meant to give it one and runs
      before each save and after each load, but it knows only the step of a group. We do the same
      for the step in a state.
    """
    from megatron.core.optimizer import distrib_optimizer
    from megatron.core.optimizer.optimizer import ChainedOptimizer

    cls = distrib_optimizer.DistributedOptimizer
    if distrib_optimizer.HAVE_APEX_OR_TE:
        return
    state_dict, load_state_dict = cls.state_dict, cls.load_state_dict
    set_states = cls._set_main_param_and_optimizer_states

    @functools.wraps(state_dict)
    def filled_state_dict(self):
        if optimizer_state.is_torch_adam(self.optimizer):
            self.init_state_fn(self.optimizer, self.config)
            for param, state in self.optimizer.state.items():
                if "step" not in state:
                    state["step"] = fewer_kernels.no_step(self.optimizer, param)
        return state_dict(self)

    @functools.wraps(load_state_dict)
    def load_with_separate_steps(self, loaded):
        load_state_dict(self, loaded)
        if optimizer_state.is_torch_adam(self.optimizer):
            for state in self.optimizer.state.values():
                state["step"] = state["step"].clone()

    @functools.wraps(set_states)
    def set_all_but_step(self, model_param, tensors):
        with torch.no_grad():
            set_states(self, model_param, {**tensors, "step": None})

    synchronize_steps = ChainedOptimizer._synchronize_steps

    @functools.wraps(synchronize_steps)
    def synchronize_all_steps(self):
        result = synchronize_steps(self)
        parts = [part for part in self.chained_optimizers if isinstance(part, cls)]
        inner = [part.optimizer for part in parts if optimizer_state.is_torch_adam(part.optimizer)]
        states = [state for optimizer in inner for state in optimizer.state.values()]
        step = next((state["step"] for state in states if "step" in state), torch.zeros(()))
        for optimizer in inner:
            if not any(group["params"] for group in optimizer.param_groups):
                optimizer.state["no parameters"] = {"step": step.clone()}
        return result

    ChainedOptimizer._synchronize_steps = synchronize_all_steps
    cls.state_dict = filled_state_dict
    cls.load_state_dict = load_with_separate_steps
    cls._set_main_param_and_optimizer_states = set_all_but_step


def _resume_under_another_layout() -> None:
    """``megatron/core/optimizer/optimizer.py`` loads no optimizer state from EP > 1 under EP = 1.

    It also loads none under another learning rate (:func:`.optimizer_state.with_schedule_of`), and
    none of another Adam (:func:`.optimizer_state.with_step_of`).

    With expert parallelism ``ChainedOptimizer`` holds two optimizers (dense and experts), without
    it one. The tensors of a checkpoint are named after the parameters and fit both cases. The other
    values (step, hyperparameters of each parameter group, loss scale) keep the structure of the run
    that saved them, and ``load_state_dict`` refuses any other structure. We first bring these
    values into the structure of the running optimizer.
    """
    from megatron.core.optimizer.optimizer import ChainedOptimizer

    load_state_dict = ChainedOptimizer.load_state_dict

    @functools.wraps(load_state_dict)
    def load_restructured(self, loaded):
        if _overrides_schedule():
            loaded = optimizer_state.with_schedule_of(self.chained_optimizers, loaded)
        loaded = optimizer_state.restructured(loaded, self.chained_optimizers)
        load_state_dict(self, optimizer_state.with_step_of(self.chained_optimizers, loaded))
        for inner in (part.optimizer for part in self.chained_optimizers):
            if optimizer_state.is_torch_adam(inner):
                fewer_kernels.keep_fused(inner)

    ChainedOptimizer.load_state_dict = load_restructured


def _overrides_schedule() -> bool:
    from megatron.training import get_args

    try:
        return get_args().override_opt_param_scheduler
    except AssertionError:  # a user's own training loop has no Megatron arguments
        return False


def _guard_checkpoints() -> None:
    """``megatron/training/checkpointing.py`` trusts files and folders.

    - It does not check what it loads, except with ``--verify-integrity``. With this flag, one rank
      reads everything, but only after all ranks have unpickled some of it, and a checkpoint without
      checksums is refused. An unreadable tracker ends the process with exit code 0.
    - It overwrites the tracker in place. If the disk is full or the process ends at that moment,
      the tracker is empty, and the way to the previous checkpoint is lost.
    - Rank 0 alone makes the folder, ``.metadata`` and ``metadata.json`` while the others wait for
      it. If it fails, they wait until something else ends them. The cause of a failed write is
      replaced by the name of its type.

    There is no hook between the last file and the tracker. We therefore wrap ``save``, the function
    that opens the tracker, and ``_load_base_checkpoint``, through which every load goes.
    """
    from megatron.core import dist_checkpointing
    from megatron.core.dist_checkpointing import serialization
    from megatron.core.dist_checkpointing.strategies.filesystem_async import FileSystemWriterAsync
    from megatron.training import checkpointing, training

    from megatron_dynmoe.checkpoints import load, save

    guard = save.SaveGuard()
    dist_checkpointing.save = guard.with_manifest(dist_checkpointing.save)
    serialization.save_config = guard.keeping_raised_error(serialization.save_config)
    writer = FileSystemWriterAsync
    writer.finish = guard.keeping_raised_error(writer.finish)
    write = guard.keeping_returned_error(writer.write_preloaded_data)
    writer.write_preloaded_data = staticmethod(write)
    checkpointing.save_checkpoint = guard.with_folder(checkpointing.save_checkpoint)
    training.save_checkpoint = checkpointing.save_checkpoint
    checkpointing.maybe_msc = save.TrackerFileWriter(checkpointing.maybe_msc)
    checkpointing._load_base_checkpoint = load.checking(checkpointing._load_base_checkpoint)


def _handle_every_signal() -> None:
    """``megatron/training/dist_signal_handler.py`` handles one signal, and forgets which it was.

    With ``--exit-signal-handler`` the run saves and ends in an orderly way on SIGTERM, but with
    exit code 0 as if it had finished. Ctrl-C and the end of a terminal still end it without a
    checkpoint, because no flag adds other signals. Our handler takes all three.
    """
    from megatron.training import global_vars
    from megatron.training.datasets import data_samplers

    from megatron_dynmoe.training.signals import StopSignals

    global_vars.DistributedSignalHandler = StopSignals
    data_samplers.DistributedSignalHandler = StopSignals  # this one is for data workers


def _end_data_workers_with_their_rank() -> None:
    """``torch/utils/data/_utils/worker.py``: a worker ends when its parent process changes.

    The worker reads its parent for the first time some moments after it was started. If its rank
    has been killed before that, the worker takes the process that adopted it for its parent, and
    never ends.
    """
    from torch.utils.data._utils import worker

    class Watchdog(worker.ManagerWatchdog):
        def __init__(self) -> None:
            super().__init__()
            parent = multiprocessing.parent_process()
            if parent is not None and parent.pid is not None:
                self.manager_pid = parent.pid

    patched: Any = worker  # Any, because a type checker does not allow to replace a class
    patched.ManagerWatchdog = Watchdog


def _name_data_indexes_by_content() -> None:
    """``megatron/core/datasets/{gpt,blended}_dataset.py`` name cached indexes by path alone.

    If new tokens are written under the same path, they are read with the index of the old ones. See
    :mod:`megatron_dynmoe.training.index_cache`.
    """
    from megatron.core.datasets.blended_dataset import BlendedDataset
    from megatron.core.datasets.gpt_dataset import GPTDataset

    from megatron_dynmoe.training import index_cache

    method = "_build_document_sample_shuffle_indices"
    build = index_cache.written_atomically(getattr(GPTDataset, method), index_cache.folder_of_gpt)
    setattr(GPTDataset, method, index_cache.named_by_content(build))
    BlendedDataset._build_indices = index_cache.written_atomically(
        BlendedDataset._build_indices, lambda dataset: dataset.config.path_to_cache
    )


def _refuse_empty_splits() -> None:
    """``megatron/core/datasets/gpt_dataset.py`` adds epochs until there are enough tokens.

    If an epoch has no tokens, it never stops. This happens, for example, if there are few documents
    and a split gets none of them under Megatron's default ``--split``, even if the run reads
    nothing from that split.
    """
    from megatron.core.datasets.gpt_dataset import GPTDataset

    from megatron_dynmoe.training import splits

    GPTDataset._get_num_epochs = splits.refusing_empty_epochs(GPTDataset._get_num_epochs)


def _log_each_step_as_itself() -> None:
    """``megatron/training/training.py`` counts the first step twice if each step is logged.

    It always logs the first step of a process, and also counts it in the interval that the step
    begins. With ``--log-interval 1`` the step is the whole interval, so the second line shows the
    mean of the first two losses and times.
    """
    from megatron.training import get_args, training

    log = training.training_log

    @functools.wraps(log)
    def log_interval(*args, is_first_iteration=False, **kwargs):
        iteration = kwargs.get("iteration", args[3] if len(args) > 3 else 0)
        ends_interval = iteration % get_args().log_interval == 0
        return log(*args, is_first_iteration=is_first_iteration and not ends_interval, **kwargs)

    training.training_log = log_interval


def _initialize_experts_differently() -> None:
    """``megatron/core/tensor_parallel/layers.py``: every expert-parallel rank has the same experts.

    With ``--use-cpu-initialization``, which the CPU layer needs, weights are drawn from torch's own
    generator. Its seed is that of the pipeline stage, so the first expert of each rank begins as
    the first of all others. (On a GPU, experts have a generator of their own with a seed by rank.)
    Here the experts of a rank are drawn by a seed that includes the rank. A run with one
    expert-parallel rank draws as before.
    """
    from megatron.core import parallel_state
    from megatron.core.tensor_parallel import layers

    def differing(init: Any) -> Any:
        @functools.wraps(init)
        def init_by_rank(self, *args, **kwargs):
            num_ranks = parallel_state.get_expert_model_parallel_world_size()
            by_rank = kwargs.get("is_expert") and kwargs["config"].use_cpu_initialization
            if not by_rank or num_ranks == 1:
                return init(self, *args, **kwargs)
            generator = torch.default_generator
            # All ranks draw this number, so they go on alike with what is not an expert.
            seed = int(torch.randint(2**48, (), generator=generator))
            state = generator.get_state()
            generator.manual_seed(seed + parallel_state.get_expert_model_parallel_rank())
            try:
                return init(self, *args, **kwargs)
            finally:
                generator.set_state(state)

        return init_by_rank

    for cls in (layers.ColumnParallelLinear, layers.RowParallelLinear):
        cls.__init__ = differing(cls.__init__)


def _make_room_for_rows() -> None:
    """``megatron/training/training.py`` has no hook around the schedule of a global batch.

    See :mod:`megatron_dynmoe.control.row_buffer`. A training loop of one's own calls upstream's
    function from elsewhere, and its layers count their rows.
    """
    from megatron.training import training

    from megatron_dynmoe.control.row_buffer import with_row_buffer

    training.get_forward_backward_func = with_row_buffer(training.get_forward_backward_func)
