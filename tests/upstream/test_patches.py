"""The table of patches: it holds every change to Megatron, and upstream still needs each row."""

from __future__ import annotations

import ast
import inspect
import re
from argparse import ArgumentParser
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import megatron_dynmoe
from tests.moe.one_rank import megatron_on_cpu
from tests.training.test_index_cache import GROWN, build, one, write

pytestmark = pytest.mark.megatron
PACKAGE = Path(megatron_dynmoe.__file__).parent


@pytest.fixture(scope="module", autouse=True)
def _patched() -> None:
    megatron_on_cpu()


def upstreams(full_name: str) -> Any:
    from megatron_dynmoe.upstream.patch import upstreams

    return upstreams(full_name)


def source(full_name: str) -> str:
    return inspect.getsource(inspect.unwrap(upstreams(full_name)))


# --- each answers whether upstream still does what its patch is for -------------------------------


def make_is_run_without_a_makefile(_: Path) -> bool:
    from megatron.core.datasets import utils

    has_makefile = Path(utils.__file__).with_name("Makefile").exists()
    return '"make"' in source("megatron.core.datasets.utils:compile_helpers") and not has_makefile


def a_save_starts_a_manager(_: Path) -> bool:
    module = "megatron.core.dist_checkpointing.strategies.filesystem_async"
    save = source(f"{module}:FileSystemWriterAsync.prepare_write_data")
    is_asked_for = "get_write_results_queue()" in save
    return is_asked_for and ".Manager()" in source(f"{module}:get_write_results_queue")


class Counter(TorchDispatchMode):
    """Counts the operations within it."""

    operations = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.operations += 1
        return function(*args, **(kwargs or {}))


def operations(function: Callable[..., Any], *args: Any) -> int:
    with Counter() as counter:
        function(0, torch.zeros(1), *args)
    return counter.operations


def optimizers_take_one_parameter_after_another(_: Path) -> bool:
    from megatron.core import utils

    from megatron_dynmoe.upstream import fewer_kernels

    tensors = [torch.ones(2) for _ in range(9)]
    norm, scale = ([tensors], False), ([tensors, tensors], 0.5)
    return (
        operations(utils.local_multi_tensor_l2_norm, *norm) > 9
        and operations(utils.local_multi_tensor_scale, *scale) > 9
        and operations(fewer_kernels.l2_norm, *norm) < 9
        and operations(fewer_kernels.scale, *scale) < 9
    )


def no_kernel_rotates(_: Path) -> bool:
    rope = "megatron.core.models.common.embeddings.rope_utils"
    return upstreams(f"{rope}:fused_apply_rotary_pos_emb") is None


def nothing_is_appended(_: Path) -> bool:
    rotate = upstreams(
        "megatron.core.models.common.embeddings.rope_utils:_apply_rotary_pos_emb_bshd"
    )
    with torch.profiler.profile() as profile:
        rotate(torch.ones(2, 1, 1, 4), torch.ones(2, 1, 1, 4))
    return sum(event.name == "aten::cat" for event in profile.events()) > 1


def gradients_follow_each_other(_: Path) -> bool:
    name = "megatron.core.distributed.param_and_grad_buffer"
    layout = upstreams(f"{name}:_compute_default_per_buffer_param_layout")
    weight, offset = (torch.nn.Parameter(torch.ones(size)) for size in (64, 1))
    return layout([weight, offset], None).param_index_map[weight][0] == 1


def a_loss_takes_one_pass_after_another(_: Path) -> bool:
    loss = upstreams("megatron.core.tensor_parallel:vocab_parallel_cross_entropy")
    group = SimpleNamespace(size=lambda: 1, rank=lambda: 0)
    with mock.patch.object(torch.distributed, "all_reduce"), torch.profiler.profile() as profile:
        loss(torch.randn(3, 2, 9), torch.ones(3, 2, dtype=torch.int64), tp_group=group)
    names = {event.name for event in profile.events()}
    return {"aten::exp", "aten::sub_", "aten::div_"} <= names


def rows_of_one_rank_pass_autograd(_: Path) -> bool:
    from types import SimpleNamespace

    exchange = upstreams("megatron.core.transformer.moe.token_dispatcher:all_to_all")
    rows = torch.ones(4, 2, requires_grad=True)
    found = exchange(SimpleNamespace(size=lambda: 1), rows)
    return torch.equal(found, rows) and found.grad_fn is not None


def rows_in_order_are_sorted(_: Path) -> bool:
    sort = upstreams("megatron.core.transformer.moe.token_dispatcher:sort_chunks_by_idxs")
    rows = torch.ones(4, 2)
    found, _probs = sort(rows, torch.tensor([1, 3]), torch.tensor([0, 1]))
    return torch.equal(found, rows) and found.data_ptr() != rows.data_ptr()


def the_tracker_is_overwritten(_: Path) -> bool:
    save = source("megatron.training.checkpointing:save_checkpoint")
    return "maybe_msc.open(tracker_filename, 'w')" in save


def an_unreadable_tracker_is_exit_code_0(_: Path) -> bool:
    return "sys.exit()" in source("megatron.training.checkpointing:read_metadata")


def one_signal_is_handled(_: Path) -> bool:
    from megatron.training.dist_signal_handler import DistributedSignalHandler

    return list(inspect.signature(DistributedSignalHandler).parameters) == ["sig"]


def workers_look_for_their_parent_late(_: Path) -> bool:
    return "os.getppid()" in source("torch.utils.data._utils.worker:ManagerWatchdog")


def new_tokens_are_read_by_the_old_index(folder: Path) -> bool:
    from megatron.core.datasets.gpt_dataset import GPTDataset

    name = "_build_document_sample_shuffle_indices"
    with pytest.MonkeyPatch.context() as patch:
        unpatched = upstreams(f"megatron.core.datasets.gpt_dataset:GPTDataset.{name}")
        patch.setattr(GPTDataset, name, unpatched)
        write(folder / "a", [9] * 20)
        build(**one(folder), cache=folder / "cache")
        write(folder / "a", GROWN, seed=1)
        found = build(**one(folder), cache=folder / "cache")
        return found != build(**one(folder), cache=folder / "fresh")


class Endless(Exception):
    """Raised when an empty epoch is added."""


class NoTokens(int):
    """Tokens of an epoch without text."""

    def __add__(self, other: Any) -> Any:
        raise Endless


def empty_epochs_are_added(_: Path) -> bool:
    count = upstreams("megatron.core.datasets.gpt_dataset:GPTDataset._get_num_epochs")
    config = SimpleNamespace(sequence_length=8, add_extra_token_to_sequence=1)
    with pytest.raises(Endless):
        count(SimpleNamespace(num_samples=4, config=config), NoTokens(0))
    return True


def the_first_step_is_counted_twice(_: Path) -> bool:
    log = source("megatron.training.training:training_log")
    return "should_reset = not is_first_iteration" in log


def experts_are_drawn_without_their_rank(_: Path) -> bool:
    from megatron.core.tensor_parallel import layers

    return "expert" not in inspect.getsource(layers._initialize_affine_weight_cpu)


def sinks_are_not_marked(_: Path) -> bool:
    from megatron.core.transformer.dot_product_attention import DotProductAttention

    made = inspect.getsource(DotProductAttention.__init__)
    assert "self.softmax_offset" in made
    return "partition_dim" not in made and "tensor_model_parallel_attributes" not in made


def the_weight_decay_is_set_before_it_is_known(_: Path) -> bool:
    load = source("megatron.core.optimizer_param_scheduler:OptimizerParamScheduler.load_state_dict")
    return load.index("self.step(") < load.index("self.end_wd =")


def only_the_loop_itself_wraps_a_schedule(_: Path) -> bool:
    train = source("megatron.training.training:train")
    wrappers = set(re.findall(r"forward_backward_func = (\w+)\(", train))
    return wrappers == {"get_forward_backward_func", "FullCudaGraphWrapper", "PagedStashRunner"}


def settings_need_a_gpu(_: Path) -> bool:
    from megatron.training.arguments import add_megatron_arguments

    from megatron_dynmoe.backends.cpu import FORCED_SETTINGS

    defaults = vars(add_megatron_arguments(ArgumentParser(allow_abbrev=False)).parse_args([]))
    assert FORCED_SETTINGS.keys() <= defaults.keys(), "a setting that upstream no longer has"
    return any(defaults[name] != value for name, value in FORCED_SETTINGS.items())


def the_state_goes_to_a_list_of_generators(_: Path) -> bool:
    return "default_generators" in source(
        "megatron.core.tensor_parallel.random:_set_cuda_rng_state"
    )


def splits_on_the_host_stay_tensors(_: Path) -> bool:
    move = upstreams("megatron.core.transformer.moe.token_dispatcher:maybe_move_tensor_to_cpu")
    return isinstance(move(torch.ones(2), as_numpy=True), torch.Tensor)


def steps_have_no_hook(_: Path) -> bool:
    step = upstreams("megatron.training.training:train_step")
    return not any(
        "hook" in name or "callback" in name for name in inspect.signature(step).parameters
    )


STILL_NEEDED: dict[str, Callable[[Path], bool]] = {
    "packaged dataset helpers": make_is_run_without_a_makefile,
    "saving without a helper process": a_save_starts_a_manager,
    "optimizer in few kernels": optimizers_take_one_parameter_after_another,
    "gradients at aligned addresses": gradients_follow_each_other,
    "rotary positions in one kernel": no_kernel_rotates,
    "rotary positions in few calls": nothing_is_appended,
    "the loss in few passes": a_loss_takes_one_pass_after_another,
    "rows go to other ranks only": rows_of_one_rank_pass_autograd,
    "rows in order are not sorted": rows_in_order_are_sorted,
    "guarded saves": the_tracker_is_overwritten,
    "checked loads": an_unreadable_tracker_is_exit_code_0,
    "every signal saves": one_signal_is_handled,
    "data workers end with their rank": workers_look_for_their_parent_late,
    "data indexes named by content": new_tokens_are_read_by_the_old_index,
    "empty splits are refused": empty_epochs_are_added,
    "each step is logged as itself": the_first_step_is_counted_twice,
    "experts begin differently": experts_are_drawn_without_their_rank,
    "the norm counts all sinks": sinks_are_not_marked,
    "the saved weight decay at once": the_weight_decay_is_set_before_it_is_known,
    "room for rows": only_the_loop_itself_wraps_a_schedule,
    "settings of a CPU": settings_need_a_gpu,
    "random state of a CPU": the_state_goes_to_a_list_of_generators,
    "splits that are on the host already": splits_on_the_host_stay_tensors,
    "a dry run watches": steps_have_no_hook,
}
# Trainings that resume without the patch, and have to fail.
IN_TEST_RESUME = {"resuming the distributed optimizer", "resuming under another layout"}


@pytest.mark.parametrize("name", STILL_NEEDED)
def test_upstream_still_needs(name: str, tmp_path: Path) -> None:
    assert STILL_NEEDED[name](tmp_path), f"upstream has changed: see whether {name!r} can go"


def test_each_patch_has_such_a_test_a_reason_and_an_end() -> None:
    from megatron_dynmoe.upstream.patches import PATCHES, watching

    patches = [*PATCHES, watching(*[lambda found: found] * 5)]
    names = [patch.name for patch in patches]
    assert len({*names}) == len(names)
    assert {*names} == STILL_NEEDED.keys() | IN_TEST_RESUME
    for patch in patches:
        assert patch.reason and patch.ends
        for full_name in patch.wraps:
            upstreams(full_name)  # which has to be there


def test_the_entry_point_does_what_upstreams_parse_and_validate_args_does() -> None:
    """It repeats that function, to check arguments between the steps."""
    from megatron.training import arguments

    tree = ast.parse(inspect.getsource(arguments.parse_and_validate_args))
    called = {ast.unparse(node.func) for node in ast.walk(tree) if isinstance(node, ast.Call)}
    assert called == {
        *("parse_args", "args_defaults.get", "load_args_from_checkpoint"),
        *("validate_yaml", "validate_args", "set_global_variables"),
    }


def test_every_patch_that_applies_takes_effect() -> None:
    from megatron_dynmoe.upstream.patch import _applied, _find
    from megatron_dynmoe.upstream.patches import PATCHES

    for patch in PATCHES:
        assert (patch.name in _applied) is patch.applies(), patch.name
        if patch.applies():
            for full_name in patch.wraps:
                owner, name = _find(full_name)
                assert getattr(owner, name) is not upstreams(full_name), full_name


# --- no other place -------------------------------------------------------------------------------


def replaced_in(code: str) -> list[str]:
    """Assignments to something of Megatron's, in a module that imports it."""
    tree = ast.parse(code)
    imported: dict[str, str] = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for name in node.names:
                imported[name.asname or name.name.partition(".")[0]] = name.name
        elif isinstance(node, ast.ImportFrom):
            for name in node.names:
                imported[name.asname or name.name] = f"{node.module}.{name.name}"

    def is_megatrons(node: ast.AST) -> bool:
        while isinstance(node, ast.Attribute):
            node = node.value
        return isinstance(node, ast.Name) and imported.get(node.id, "").startswith("megatron.")

    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store | ast.Del):
            owner: ast.AST = node.value
        elif isinstance(node, ast.Call) and ast.unparse(node.func) in ("setattr", "replace"):
            owner = node.args[0]
        else:
            continue
        if is_megatrons(owner):
            found.append(ast.unparse(node))
    return found


@pytest.mark.parametrize(
    "code",
    [
        "from megatron.training import training\ntraining.train_step = None",
        "import megatron.training.arguments as a\na.x, a.validate_args = 1, 2",
        "from megatron.core.transformer.moe.layer import MoE\nsetattr(MoE, 'forward', 1)",
        "from megatron.training import training\nreplace(training, train_step=1)",
        "import megatron.core\ndel megatron.core.utils.f",
    ],
)
def test_a_replacement_is_found(code: str) -> None:
    assert replaced_in(code)


def test_no_other_room_replaces_functions_of_megatron() -> None:
    found = {
        str(path.relative_to(PACKAGE)): replacements
        for path in PACKAGE.rglob("*.py")
        if (replacements := replaced_in(path.read_text(encoding="utf-8")))
    }
    # The room itself assigns through its table; a queue is set for as long as a save takes.
    assert found.keys() == {"upstream/wrappers.py"}


def test_sinks_are_marked_before_an_optimizer_copies_them() -> None:
    from megatron.core import optimizer
    from megatron.core.optimizer import OptimizerConfig
    from megatron.core.transformer.dot_product_attention import DotProductAttention
    from megatron.core.transformer.enums import AttnMaskType

    from tests.moe.one_rank import transformer_config, world_of_one

    world_of_one()
    config = transformer_config(softmax_type="learnable", kv_channels=4)
    attention = DotProductAttention(config, 1, AttnMaskType.causal, "self")
    assert not getattr(attention.softmax_offset, "tensor_model_parallel", False)
    optimizer._get_param_groups([attention], OptimizerConfig(lr=1e-3), {})
    assert attention.softmax_offset.tensor_model_parallel
    assert attention.softmax_offset.partition_dim == 0
