"""The only place that touches upstream by version or patch.

Each patch states what upstream does, in which file, and why it does not do here. A test fails when
upstream changes so that a patch is no longer needed.
"""

from __future__ import annotations

import copy
import functools
import importlib.util
import multiprocessing
import queue
from typing import Any

import torch


@functools.cache
def install() -> None:
    """Apply the patches that every run under Megatron 0.19 needs, once."""
    _use_the_packaged_dataset_helpers()
    _save_without_a_helper_process()
    _resume_the_distributed_optimizer()
    _resume_under_another_layout()
    _guard_checkpoints()
    _hear_every_signal()
    _tell_data_workers_whose_they_are()
    _name_data_indexes_by_content()
    _end_where_a_split_is_empty()
    _log_each_step_as_itself()


def _use_the_packaged_dataset_helpers() -> None:
    """``megatron/core/datasets/utils.py`` runs ``make`` where the package ships no Makefile.

    The wheel brings the compiled helper, so there is nothing to compile, yet
    ``megatron.training.initialize`` ends the process when ``make`` fails.
    """
    import megatron.core.datasets.utils as dataset_utils

    if importlib.util.find_spec("megatron.core.datasets.helpers_cpp") is not None:
        dataset_utils.compile_helpers = lambda: None


def _save_without_a_helper_process() -> None:
    """``megatron/core/dist_checkpointing/strategies/torch.py`` starts a process to save.

    It hands the result of writing from one function to the next through the queue of a
    ``multiprocessing`` manager, also where both run in this process. The manager is a process of
    its own, which imports torch again: some seconds and some hundred MB for each rank, and it
    outlives a rank that is killed. A save that is not asynchronous gets a plain queue.
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
    - A pipeline stage without experts has an optimizer for experts without parameters, so without a
      step. ``ChainedOptimizer._synchronize_steps``, which is there to give it one and runs before
      each save and after each load, knows only the step of a group. We do the same for a state.
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
        if _is_torch_adam(self.optimizer):
            self.init_state_fn(self.optimizer, self.config)
            for state in self.optimizer.state.values():
                state.setdefault("step", torch.zeros(()))
        return state_dict(self)

    @functools.wraps(load_state_dict)
    def load_with_separate_steps(self, loaded):
        load_state_dict(self, loaded)
        if _is_torch_adam(self.optimizer):
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
        inner = [part.optimizer for part in parts if _is_torch_adam(part.optimizer)]
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


def _is_torch_adam(optimizer: object) -> bool:
    return isinstance(optimizer, torch.optim.Adam | torch.optim.AdamW)


def _resume_under_another_layout() -> None:
    """``megatron/core/optimizer/optimizer.py`` loads no optimizer state from EP > 1 under EP = 1.

    Nor under another learning rate: see :func:`_with_schedule_of`.

    With expert parallelism ``ChainedOptimizer`` holds two optimizers, dense and experts, without it
    one. The tensors of a checkpoint are named after the parameters and find their place in either;
    what is stored beside them (step, hyperparameters of each parameter group, loss scale) keeps the
    structure of the run that saved it, and ``load_state_dict`` refuses any other. We bring that
    part into the structure of the running optimizer first.
    """
    from megatron.core.optimizer.optimizer import ChainedOptimizer

    load_state_dict = ChainedOptimizer.load_state_dict

    @functools.wraps(load_state_dict)
    def load_restructured(self, loaded):
        if _overrides_schedule():
            loaded = _with_schedule_of(self.chained_optimizers, loaded)
        load_state_dict(self, _restructured(loaded, self.chained_optimizers))

    ChainedOptimizer.load_state_dict = load_restructured


# Of what tells parameter groups apart, these are the schedule's and not the model's.
_SCHEDULE_OF_GROUPS = ("max_lr", "min_lr", "start_wd", "end_wd")


def _overrides_schedule() -> bool:
    from megatron.training import get_args

    try:
        return get_args().override_opt_param_scheduler
    except AssertionError:  # a training loop of one's own has no arguments
        return False


def _with_schedule_of(optimizers: list[Any], loaded: Any) -> Any:
    """A saved state whose parameter groups have this run's learning rates and weight decay.

    Upstream tells groups apart by these as well, so that under another ``--lr`` it finds none, with
    ``--override-opt-param-scheduler`` too, which asks for just that.
    """
    from megatron.core.optimizer.optimizer import param_group_identifier_keys as keys

    own = [group for optimizer in optimizers for group in optimizer.param_groups]
    model_keys = [key for key in keys if key not in _SCHEDULE_OF_GROUPS]

    def rescheduled(group: dict[str, Any]) -> dict[str, Any]:
        for ignored in (None, "is_expert_parallel"):
            for mine in own:
                if all(mine.get(k) == group.get(k) for k in model_keys if k != ignored):
                    return group | {k: mine[k] for k in _SCHEDULE_OF_GROUPS if k in mine}
        return group

    def walk(part: Any) -> Any:
        if not isinstance(part, dict):
            return part
        return {
            key: [rescheduled(group) for group in value] if key == "param_groups" else walk(value)
            for key, value in part.items()
            # The tensors of the state are left as they are.
        }

    return walk(loaded)


def _restructured(loaded: Any, optimizers: list[Any]) -> Any:
    """The state dict of a chained optimizer in the structure of the one that loads it.

    Args:
        loaded: what the checkpoint held of the optimizer's state, merged by upstream with what this
            run asked for. One optimizer's state is a dict, that of several is a dict of these with
            the keys 0, 1, ...; where the two runs differ in that, both forms lie in one dict.
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
        # Step and loss scale are common to all, so any part of the checkpoint has them.
        own = copy.deepcopy(saved[0])
        own.get("optimizer", own)["param_groups"] = [
            {**_counterpart(group, groups), "is_expert_parallel": group["is_expert_parallel"]}
            for group in optimizer.param_groups
        ]
        result[index] = merge(own, asked[index])
    return result[0] if len(optimizers) == 1 else result


def _saved_groups(part: dict[Any, Any]) -> list[dict[str, Any]]:
    """The parameter groups of a checkpoint, without those that only list this run's parameters."""
    groups = part.get("optimizer", part).get("param_groups", [])
    return [group for group in groups if set(group) != {"params"}]


def _counterpart(group: dict[str, Any], saved_groups: list[dict[str, Any]]) -> dict[str, Any]:
    """The hyperparameters that the checkpoint holds for one of this run's parameter groups.

    Groups are told apart as upstream does, except that being an expert's or not does not count
    where the checkpoint has only one of the two.
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


def _guard_checkpoints() -> None:
    """``megatron/training/checkpointing.py`` trusts files and folders.

    - What it loads it does not check, except with ``--verify-integrity``: then one rank reads
      everything, after all of them have unpickled some of it, and a checkpoint without checksums is
      refused. An unreadable tracker ends the process with exit code 0.
    - It opens the tracker for writing in place: a full disk, or the end of the process at that
      moment, leave it empty, and with it no way to the checkpoint before.
    - The folder, ``.metadata`` and ``metadata.json`` are made by rank 0 alone, while the others
      wait for it; if it fails they wait until something else ends them. The cause of a failed write
      is replaced by the name of its type.

    There is no hook between the last file and the tracker, so we stand around ``save``, around
    ``_load_base_checkpoint``, which every load goes through, and around what opens the tracker.
    """
    from megatron.core import dist_checkpointing
    from megatron.core.dist_checkpointing import serialization
    from megatron.core.dist_checkpointing.strategies.filesystem_async import FileSystemWriterAsync
    from megatron.training import checkpointing, training

    from megatron_dynmoe.checkpoints import load, save

    guard = save.SaveGuard()
    dist_checkpointing.save = guard.sealing(dist_checkpointing.save)
    serialization.save_config = guard.keeping(serialization.save_config)
    writer = FileSystemWriterAsync
    writer.finish = guard.keeping(writer.finish)
    writer.write_preloaded_data = staticmethod(guard.noting(writer.write_preloaded_data))
    checkpointing.save_checkpoint = guard.preparing(checkpointing.save_checkpoint)
    training.save_checkpoint = checkpointing.save_checkpoint
    checkpointing.maybe_msc = save.TrackerFiles(checkpointing.maybe_msc)
    checkpointing._load_base_checkpoint = load.checking(checkpointing._load_base_checkpoint)


def _hear_every_signal() -> None:
    """``megatron/training/dist_signal_handler.py`` hears one signal, and forgets which it was.

    With ``--exit-signal-handler`` the run saves and ends in good order on SIGTERM, with exit code 0
    as if it had finished; Ctrl-C and the end of a terminal still end it without a checkpoint, since
    no flag names other signals. Ours hears all three.
    """
    from megatron.training import global_vars
    from megatron.training.datasets import data_samplers

    from megatron_dynmoe.training.signals import StopSignals

    global_vars.DistributedSignalHandler = StopSignals
    data_samplers.DistributedSignalHandler = StopSignals  # in the processes that load data


def _tell_data_workers_whose_they_are() -> None:
    """``torch/utils/data/_utils/worker.py``: a worker ends when its parent changes.

    It looks for the first time some moments after it was started. Where its rank has been killed in
    between, it takes whoever has adopted it for its parent, and stays for ever.
    """
    from torch.utils.data._utils import worker

    class Watchdog(worker.ManagerWatchdog):
        def __init__(self) -> None:
            super().__init__()
            parent = multiprocessing.parent_process()
            if parent is not None and parent.pid is not None:
                self.manager_pid = parent.pid

    patched: Any = worker  # to replace a class is beyond types
    patched.ManagerWatchdog = Watchdog


def _name_data_indexes_by_content() -> None:
    """``megatron/core/datasets/{gpt,blended}_dataset.py`` name cached indexes by path alone.

    Tokens that are written again under the same path are then read by the index of the old ones.
    See :mod:`megatron_dynmoe.training.index_cache`.
    """
    from megatron.core.datasets.blended_dataset import BlendedDataset
    from megatron.core.datasets.gpt_dataset import GPTDataset

    from megatron_dynmoe.training import index_cache

    method = "_build_document_sample_shuffle_indices"
    build = index_cache.written_whole(getattr(GPTDataset, method), index_cache.folder_of_gpt)
    setattr(GPTDataset, method, index_cache.named_by_content(build))
    BlendedDataset._build_indices = index_cache.written_whole(
        BlendedDataset._build_indices, lambda dataset: dataset.config.path_to_cache
    )


def _end_where_a_split_is_empty() -> None:
    """``megatron/core/datasets/gpt_dataset.py`` adds epochs until there are enough tokens.

    Where an epoch has none, it does so for ever: a split that gets no document of few, for example,
    with Megatron's own default of ``--split``, also where the run reads nothing of that split.
    """
    from megatron.core.datasets.gpt_dataset import GPTDataset

    from megatron_dynmoe.training import splits

    GPTDataset._get_num_epochs = splits.refusing_no_token(GPTDataset._get_num_epochs)


def _log_each_step_as_itself() -> None:
    """``megatron/training/training.py`` counts the first step twice if each step is logged.

    It logs the first step of a process in any case and lets it count for the interval that it
    begins. With ``--log-interval 1`` that interval is the step, so the second line shows the mean
    of the first two losses and times.
    """
    from megatron.training import get_args, training

    log = training.training_log

    @functools.wraps(log)
    def log_interval(*args, is_first_iteration=False, **kwargs):
        iteration = kwargs.get("iteration", args[3] if len(args) > 3 else 0)
        ends_interval = iteration % get_args().log_interval == 0
        return log(*args, is_first_iteration=is_first_iteration and not ends_interval, **kwargs)

    training.training_log = log_interval
