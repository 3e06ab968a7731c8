"""Runs unmodified Megatron on a machine without CUDA, over gloo.

Megatron addresses its device as ``torch.cuda`` throughout. :func:`install` makes the CPU stand in
for it. Calls that ask for a tensor on ``"cuda"`` get one on the CPU, streams and events do nothing,
and memory figures are zero. Importing this module changes nothing, and a run on CUDA never installs
it.

This replaces functions of PyTorch. Those of Megatron are replaced by ``upstream/patches.py``, which
takes what stands in for them on a CPU from here: :func:`with_settings_of_a_cpu`,
:func:`set_random_state` and :func:`to_host`.

It does not imitate concurrency (a stream runs in order with everything else), nor the arithmetic of
a GPU's reduced precisions.
"""

from __future__ import annotations

import functools
import os
import sys
import warnings
from argparse import Namespace
from collections.abc import Callable
from typing import Any

import torch
from torch.utils import _device as contexts

from megatron_dynmoe.backends.no_driver import Stream, answers, replace, returns
from megatron_dynmoe.settings.messages.command_line import UsageError
from megatron_dynmoe.settings.messages.refusals import FlagError

CPU = torch.device("cpu")

# Packages whose kernels run on CUDA only. Megatron takes layers and optimizers from them.
PACKAGES_FOR_CUDA = ("transformer_engine", "apex", "amp_C", "fused_weight_gradient_mlp_cuda")

# Settings of Megatron that need a GPU or a compiled extension, and their values here.
FORCED_SETTINGS: dict[str, Any] = {
    "distributed_backend": "gloo",
    "transformer_impl": "local",
    "use_cpu_initialization": True,
    "gradient_accumulation_fusion": False,
    "masked_softmax_fusion": False,
    "apply_rope_fusion": False,
    "bias_swiglu_fusion": False,
    "bias_gelu_fusion": False,
    "bias_dropout_fusion": False,
    "no_persist_layer_norm": True,
    "cross_entropy_loss_fusion": False,
    "moe_grouped_gemm": False,
    "moe_permute_fusion": False,
    "moe_router_fusion": False,
}


def wanted() -> bool:
    """Whether to use the CPU layer: there is no CUDA device, or ``DYNMOE_DEVICE`` is ``cpu``.

    Raises:
        UsageError: ``DYNMOE_DEVICE`` is not ``cpu``, ``cuda`` or ``auto``, or it asks for CUDA and
            there is no CUDA device.
    """
    device = os.environ.get("DYNMOE_DEVICE", "auto")
    if device not in ("auto", "cpu", "cuda"):
        raise UsageError(f"DYNMOE_DEVICE is {device!r}; use 'cpu', 'cuda' or 'auto' (the default).")
    has_cuda = not is_installed() and torch.cuda.is_available()
    if device == "cuda" and not has_cuda:
        raise UsageError(
            "DYNMOE_DEVICE is 'cuda', but torch finds no CUDA device. "
            "Unset it to run on the CPU, or install a driver and a torch build for your GPU."
        )
    return device == "cpu" or not has_cuda


def install() -> None:
    """Make the CPU stand in for ``torch.cuda`` in this process, once; rank 0 prints a line."""
    if is_installed():
        return
    why = "DYNMOE_DEVICE=cpu" if torch.cuda.is_available() else "no CUDA device"
    # The jit fuser would compile for an accelerator that is not there. Disabling dynamo would help,
    # too, but each process would still import the compiler. Replacing torch.compile avoids that.
    replace(torch, compile=lambda model=None, **options: model if model is not None else _identity)
    # Megatron requires this for sequence parallelism on every device.
    os.environ.setdefault("CUDA_DEVICE_MAX_CONNECTIONS", "1")

    for package in PACKAGES_FOR_CUDA:  # as if it were not installed
        sys.modules.setdefault(package, None)  # type: ignore[arg-type]

    # Eighteen lines of what makes a GPU faster, before anything that is said of this run.
    warnings.filterwarnings("ignore", "(Transformer Engine and )?Apex (is|are) not installed")
    warnings.filterwarnings("ignore", "Only transformer-engine>=1.7.0 supports MoE experts")

    host_generator = torch.Generator().manual_seed(torch.initial_seed())
    _answer_for_torch_cuda(host_generator)
    _redirect_torch(host_generator)
    replace(torch.nn.Module, cuda=lambda self, device=None: self)
    # Under tensor parallelism, the ranks of one expert hold different numbers of rows.
    replace(
        torch.distributed,
        all_gather=functools.partial(_all_gather, original=torch.distributed.all_gather),
        reduce_scatter=_reduce_scatter,
    )
    if int(os.environ.get("RANK", "0")) == 0:
        print(f"> megatron_dynmoe: running Megatron on the CPU over gloo ({why})", file=sys.stderr)


def is_installed() -> bool:
    """Whether the CPU stands in for ``torch.cuda`` in this process."""
    return getattr(torch.cuda, "_dynmoe_cpu_layer", False)


# Functions of torch, and methods of its tensors, that take a device.
MAKE_TENSORS = (
    *("arange", "as_tensor", "asarray", "empty", "empty_permuted", "empty_strided", "eye", "full"),
    *("linspace", "logspace", "ones", "rand", "randint", "randn", "randperm", "range", "tensor"),
    *("scalar_tensor", "tril_indices", "triu_indices", "zeros"),
    *(f"{name}_like" for name in ("empty", "full", "ones", "rand", "randint", "randn", "zeros")),
)
MAKE_TENSORS_LIKE = tuple(
    f"new_{name}" for name in ("empty", "empty_strided", "full", "ones", "tensor", "zeros")
)


def _redirect_torch(host_generator: torch.Generator) -> None:
    """Let calls that name CUDA happen on the CPU.

    These are PyTorch's functions that make tensors and methods of tensors, each replaced by one
    that looks at its device. (A mode for all functions would see 8,000 calls in a step of the
    quickstart, most of which cannot name a device.)

    Two generators stay separate, as on a GPU: the model draws from torch's default generator, which
    stands in for CUDA's, and the host draws from ``host_generator``, which stands in for the CPU's.
    The host draws when it builds data loaders, and a resumed run does this at other times than an
    uninterrupted one. If those draws changed the model's generator, a resume with dropout would not
    be bitwise equal.
    """
    contexts._device_constructors()  # for ``with torch.device(...)`` it keeps PyTorch's own ones
    enter = contexts.DeviceContext.__init__
    replace(
        contexts.DeviceContext,
        __init__=lambda self, device: enter(self, CPU if _names_cuda(device) else device),
    )
    replace(torch, **{name: _on_cpu(getattr(torch, name)) for name in MAKE_TENSORS})
    tensor = torch.Tensor
    replace(tensor, **{name: _on_cpu(getattr(tensor, name)) for name in MAKE_TENSORS_LIKE})
    to, draw, type_of = tensor.to, tensor.random_, tensor.type

    @functools.wraps(to)
    def to_cpu(self, *args, **kwargs):
        if args and _names_cuda(args[0]):
            args = (CPU, *args[1:])
        elif kwargs and _names_cuda(kwargs.get("device")):
            kwargs["device"] = CPU
        return to(self, *args, **kwargs)

    @functools.wraps(draw)
    def draw_on_host(self, *args, generator=None, **kwargs):
        # Data loaders draw the seeds of their workers this way.
        return draw(self, *args, generator=generator or host_generator, **kwargs)

    @functools.wraps(type_of)
    def type_on_cuda(self, *args, **kwargs):
        # Gradient clipping asserts the name of a CUDA tensor type.
        found = type_of(self, *args, **kwargs)
        return found if args or kwargs else found.replace("torch.", "torch.cuda.", 1)

    replace(tensor, to=to_cpu, random_=draw_on_host, type=type_on_cuda)
    replace(tensor, cuda=_itself(tensor.cuda), pin_memory=_itself(tensor.pin_memory))
    replace(tensor, record_stream=lambda self, stream: None)


def _on_cpu(function):
    """Wrap a function that makes a tensor, on the device that a keyword names."""

    @functools.wraps(function)
    def make(*args, **kwargs):
        if kwargs:
            if _names_cuda(kwargs.get("device")):
                kwargs["device"] = CPU
            if kwargs.get("pin_memory"):
                kwargs["pin_memory"] = False
        return function(*args, **kwargs)

    return make


def _itself(method):
    return functools.wraps(method)(lambda self, *args, **kwargs: self)


def _names_cuda(device: object) -> bool:
    if isinstance(device, torch.device):
        return device.type == "cuda"
    return isinstance(device, str) and device.startswith("cuda")


class _Stream(Stream):
    device = CPU


def _discard(value: object) -> None:
    pass


def _identity(function):
    return function


def _answer_for_torch_cuda(host_generator: torch.Generator) -> None:
    default = torch.default_generator
    memory_bytes = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    ours = {
        "_dynmoe_cpu_layer": True,
        "device_count": returns(1),
        "current_device": returns(CPU),
        "_lazy_call": lambda function, **kwargs: function(),
        # random numbers: see _redirect_torch
        "get_rng_state": lambda *args, **kwargs: default.get_state(),
        "set_rng_state": lambda state, *args, **kwargs: default.set_state(state),
        "manual_seed": lambda seed: _discard(default.manual_seed(int(seed))),
        # torch.manual_seed seeds the default generator, then calls this.
        "manual_seed_all": lambda seed: _discard(host_generator.manual_seed(int(seed))),
        # tensor types
        "FloatTensor": torch.FloatTensor,
        "DoubleTensor": torch.DoubleTensor,
        "HalfTensor": torch.HalfTensor,
        "BFloat16Tensor": torch.BFloat16Tensor,
        "ByteTensor": torch.ByteTensor,
        "IntTensor": torch.IntTensor,
        "LongTensor": torch.LongTensor,
    }
    machine = answers(
        name="cpu", capability=(0, 0), memory_bytes=memory_bytes, processors=1, stream=_Stream
    )
    replace(torch.cuda, **machine, **ours)
    replace(torch.cuda.random, get_rng_state=torch.cuda.get_rng_state)
    for module in (torch, torch.random):
        replace(
            module,
            get_rng_state=lambda: host_generator.get_state(),
            set_rng_state=lambda state: _discard(host_generator.set_state(state)),
        )
    replace(torch.cuda.nvtx, range_push=returns(None), range_pop=returns(None))
    # Without this the data loader would pin memory.
    replace(torch.accelerator, is_available=returns(False), current_accelerator=returns(None))


# Settings that need Transformer Engine's attention or kernels, and what to do instead.
_GRAPHS = "a CUDA graph is recorded on a GPU. Leave it out"
_NEEDS_A_GPU = {
    "use_torch_fsdp2": (False, "it shards over GPUs. Leave it out"),
    "cuda_graph_impl": ("none", _GRAPHS),
    "enable_cuda_graph": (False, _GRAPHS),
    "external_cuda_graph": (False, _GRAPHS),
}


def refuse_what_needs_a_gpu(args: Namespace) -> None:
    """Refuse settings for which there is no substitute on a CPU.

    Raises:
        FlagError: the message names the flag, its value and the remedy.
    """
    for name, (possible, reason) in _NEEDS_A_GPU.items():
        value = getattr(args, name, possible)
        if value != possible:
            raise FlagError(name, value, " on the CPU", reason)
    if getattr(args, "profile", False) and not getattr(args, "use_pytorch_profiler", False):
        remedy = "it marks steps for a profiler of CUDA. Leave it out"
        raise FlagError("profile", True, " on the CPU", remedy)


def _all_gather(
    outputs: list[torch.Tensor],
    tensor: torch.Tensor,
    group: Any = None,
    async_op: bool = False,
    *,
    original: Callable[..., Any],
) -> Any:
    """``all_gather`` for parts of different lengths, which NCCL supports and gloo does not."""
    if len({output.shape for output in outputs}) == 1:
        return original(outputs, tensor, group, async_op)
    for rank, output in enumerate(outputs):
        if rank == torch.distributed.get_rank(group):
            output.copy_(tensor)
        if output.numel():
            torch.distributed.broadcast(output, group=group, group_src=rank)
    return None


def _reduce_scatter(
    output: torch.Tensor,
    parts: list[torch.Tensor],
    op: Any = torch.distributed.ReduceOp.SUM,
    group: Any = None,
    async_op: bool = False,
) -> None:
    """``reduce_scatter`` for parts of different lengths, which gloo does not support either."""
    for rank, part in enumerate(parts):
        summed = part.clone()
        if part.numel():
            torch.distributed.reduce(summed, op=op, group=group, group_dst=rank)
        if rank == torch.distributed.get_rank(group):
            output.copy_(summed)


def to_host(tensor: Any, as_numpy: bool = False, record_stream: bool = False) -> Any:
    """Stand in for ``maybe_move_tensor_to_cpu``: obey ``as_numpy`` on the CPU, too."""
    return tensor.numpy() if as_numpy and isinstance(tensor, torch.Tensor) else tensor


def set_random_state(state: torch.Tensor, *args: object, **kwargs: object) -> None:
    """Stand in for ``_set_cuda_rng_state``."""
    torch.cuda.set_rng_state(state)


def with_settings_of_a_cpu(validate: Callable[..., Any]) -> Callable[..., Any]:
    """Wrap ``validate_args``: first refuse or replace settings that need a GPU."""

    @functools.wraps(validate)
    def validate_for_cpu(args: Namespace, defaults: dict[str, Any] | None = None) -> Any:
        refuse_what_needs_a_gpu(args)
        for name, value in FORCED_SETTINGS.items():
            flag = "--" + name.replace("_", "-")
            if flag in sys.argv and getattr(args, name) != value and args.rank == 0:
                print(f"> megatron_dynmoe: {flag} needs a GPU and becomes {value}", file=sys.stderr)
            if hasattr(args, name):
                setattr(args, name, value)
        return validate(args, defaults or {})

    return validate_for_cpu
