"""Watches every operation of a training on fake tensors."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from megatron_dynmoe.dry_run.devices import known
from megatron_dynmoe.dry_run.recording import flops, traffic
from megatron_dynmoe.dry_run.recording.collectives import Collective, Collectives
from megatron_dynmoe.dry_run.recording.memory import AllocationJournal
from megatron_dynmoe.dry_run.recording.places import Place, Places

_aten = torch.ops.aten
_COPIES = (_aten._to_copy.default, _aten.copy_.default)
# These have a result whose size depends on values, so the host waits for it.
_SIZED_BY_VALUES = (
    _aten.masked_select.default,
    _aten.nonzero.default,
    _aten.repeat_interleave.Tensor,
)
# Operations that start no kernel, beside views.
_NO_KERNEL = ("_unsafe_view", "detach", "empty", "lift_fresh", "new_empty", "set_")


class Moment(NamedTuple):
    """When something happens.

    Attributes:
        phase: forward, backward or optimizer, or else what surrounds these.
        chunk: the part of the model on this pipeline rank, 0 without virtual stages.
        micro_batch: the micro-batch whose pass runs, or was the last to run; -1 outside of both.
    """

    phase: str
    chunk: int = 0
    micro_batch: int = -1


class Recorder(TorchDispatchMode):
    """Counts what operations do, by moment and place.

    Attributes:
        kernels: by moment, place and name.
        flops: by moment and place.
        traffic: bytes that kernels read and write, by moment and place.
        waits: of the host for the device, by moment, place and what waits.
        copies: from the host that block it, by moment and place.
        sent: collectives by moment.
        off_device: tensors that are made on the host, by moment, place, and operation and shape.
        kept: bytes that the last forward pass which was asked for has left, by layer and part.
        state_bytes: what was alive when the last step ended.
        num_true: how many values of a mask are true, by a size that only such masks have.
    """

    def __init__(self, share_of_experts: float = 1.0) -> None:
        """Begin in the phase ``build``.

        Args:
            share_of_experts: the part of a mask of tokens and experts that is true.
        """
        super().__init__()
        self.share_of_experts = share_of_experts
        self.memory, self.places = AllocationJournal(), Places()
        self.collectives = Collectives(self.places)
        self.kernels: Counter[tuple[Moment, Place, str]] = Counter()
        self.flops: defaultdict[tuple[Moment, Place], float] = defaultdict(float)
        self.traffic: defaultdict[tuple[Moment, Place], float] = defaultdict(float)
        self.waits: Counter[tuple[Moment, Place, str]] = Counter()
        self.copies: Counter[tuple[Moment, Place]] = Counter()
        self.sent: Counter[tuple[Moment, Collective]] = Counter()
        self.off_device: Counter[tuple[Moment, Place, str]] = Counter()
        self.kept: dict[tuple[int, str], int] = {}
        self.state_bytes = 0
        self.num_true: dict[int, int] = {}
        self._launching: dict[Any, bool] = {}
        self._within: traffic.WithinKernel | None = None
        self.moment = Moment("build")
        self.memory.enter("build")

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False  # nothing is compiled, and the check would cost much of the time

    @contextmanager
    def during(self, moment: Moment) -> Iterator[None]:
        """What runs in this block belongs to the moment."""
        before = self.moment
        self.enter(moment)
        try:
            yield
        finally:
            self.enter(before)

    def enter(self, moment: Moment) -> None:
        """What runs from now on belongs to the moment."""
        self.moment = moment
        self.memory.enter(moment.phase)

    @contextmanager
    def one_kernel(self, name: str) -> Iterator[None]:
        """What runs in this block is one kernel, and its results are added by :meth:`keep`."""
        if self._within is not None:  # a part of another one
            yield
            return
        place, within = self.places.now(), traffic.WithinKernel()
        self.kernels[self.moment, place, name] += 1
        self._within = within
        try:
            yield
        finally:
            self._within = None
        self.traffic[self.moment, place] += within.num_bytes

    def keep(self, results: Any) -> None:
        """Add tensors to what is alive."""
        if self._within is None:
            place = self.places.now()
            for result in tree_leaves(results):
                if isinstance(result, Tensor) and known.is_on_device(result):
                    self.traffic[self.moment, place] += traffic.size_of(result)
                    self.memory.add(result, place)

    def note_sent(self, kind: str, group: Any, num_bytes: int) -> None:
        """Note a communication that is not PyTorch's."""
        sent = Collective(kind, group.group_desc, group.size(), self.places.now(), False, num_bytes)
        self.sent[self.moment, sent] += 1

    def wait(self, call: str) -> None:
        """Note that the host waits for the device."""
        self.waits[self.moment, self.places.now(), call] += 1

    def __torch_dispatch__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        """Run an operation of PyTorch, and note what it does."""
        kwargs = kwargs or {}
        if function is torch.ops.prim.device.default:
            return function(*args, **kwargs)
        inputs = _tensors((args, kwargs))
        reads_device = any(map(known.is_on_device, inputs))
        if function is _aten._local_scalar_dense.default:
            return self._read(args[0], function)
        place = self.places.now()
        if function.namespace == "c10d":
            return self._communicate(function, args, kwargs, place)
        if reads_device:
            args = self._with_sizes(function, args, place)
        result = self._run(function, args, kwargs, inputs, place)
        known.follow(function, args, kwargs, result)
        if function is _aten.sum.dim_IntList and args[0].dtype == torch.bool:
            known.know(result, known.split(self._num_true(args[0]), result.numel()))
        results = _tensors(result)
        if not reads_device and not any(map(known.is_on_device, results)):
            for tensor in results:
                made = f"{function._opname} {list(tensor.shape)}"
                self.off_device[self.moment, place, made] += 1
            return result
        if function in _COPIES:
            self._note_copy(function, args, kwargs, results[0], place)
        self._note_kernel(function, args, kwargs, result, place)
        if self._within is not None:
            self._within.add(inputs, results)
        else:
            for tensor in results:
                if known.is_on_device(tensor):
                    self.memory.add(tensor, place)
        return result

    def _run(
        self, function: Any, args: Any, kwargs: Any, inputs: list[Tensor], place: Place
    ) -> Any:
        if function is _aten.masked_select.default:
            return args[0].new_empty(self._num_true(args[1]))
        if function is _aten.nonzero.default:
            sizes = self._num_true(args[0]), args[0].dim()
            return args[0].new_empty(sizes, dtype=torch.int64)
        if function is _aten.repeat_interleave.Tensor and len(args[0]) in self.num_true:
            return args[0].new_empty(self.num_true[len(args[0])])
        try:
            return function(*args, **kwargs)
        except Exception as error:
            shown = ", ".join(map(_shown, inputs))
            raise ValueError(
                f"the step fails at {place.line}: {function._opname} of {shown}: {error}"
            ) from error

    def _read(self, tensor: Tensor, function: Any) -> Any:
        if known.is_on_device(tensor):
            self.wait("item")
        elif known.value_of(tensor) is None:
            return _number_on_host(tensor, function)
        return known.number_in(tensor)

    def _communicate(self, function: Any, args: Any, kwargs: Any, place: Place) -> Any:
        collective, result = self.collectives.start(function, args, kwargs, place)
        self.sent[self.moment, collective] += 1
        return result

    def _with_sizes(self, function: Any, args: Any, place: Place) -> Any:
        """Note the wait of an operation whose result is sized by values, and size it."""
        if function in _SIZED_BY_VALUES:
            self.waits[self.moment, place, function._opname] += 1
        if function is _aten.index.Tensor:
            masks = [index for index in args[1] if index is not None and index.dtype == torch.bool]
            if masks:
                self.waits[self.moment, place, "index by a mask"] += 1
                args = (args[0], self._rows_of_masks(args[1]))
        return args

    def _rows_of_masks(self, indices: list[Tensor | None]) -> list[Tensor | None]:
        sized: list[Tensor | None] = []
        for index in indices:
            if index is None or index.dtype != torch.bool:
                sized.append(index)
            else:
                rows = index.new_empty(self._num_true(index), dtype=torch.int64)
                sized += [rows] * index.dim()
        return sized

    def _num_true(self, mask: Tensor) -> int:
        counted = (self.num_true[size] for size in mask.shape if size in self.num_true)
        return next(counted, round(mask.numel() * self.share_of_experts))

    def _note_copy(
        self, function: Any, args: Any, kwargs: Any, result: Tensor, place: Place
    ) -> None:
        copies_into = function is _aten.copy_.default
        source = known.is_on_device(args[1] if copies_into else args[0])
        target = known.is_on_device(result)
        later = kwargs.get("non_blocking", False) or (copies_into and len(args) > 2 and args[2])
        if source == target or later:
            return
        if source:
            self.waits[self.moment, place, "copy to the host"] += 1
        else:
            self.copies[self.moment, place] += 1

    def _note_kernel(
        self, function: Any, args: Any, kwargs: Any, result: Any, place: Place
    ) -> None:
        if function not in self._launching:
            self._launching[function] = not (
                function.is_view or function._opname.startswith(_NO_KERNEL)
            )
        if self._launching[function] and self._within is None:
            self.kernels[self.moment, place, function._opname] += 1
            self.traffic[self.moment, place] += traffic.bytes_of(function, args, kwargs, result)
        formula = flops.formula_of(function)
        if formula is not None:
            self.flops[self.moment, place] += formula(*args, **kwargs, out_val=result)


def _shown(tensor: Tensor) -> str:
    where = "the device" if known.is_on_device(tensor) else "the CPU"
    return f"{list(tensor.shape)} on {where}"


def _tensors(values: Any) -> list[Tensor]:
    return [value for value in tree_leaves(values) if isinstance(value, Tensor)]


def _number_on_host(tensor: Tensor, function: Callable[[Tensor], Any]) -> Any:
    """A number that is on the CPU, such as the step of an optimizer."""
    try:
        return function(tensor)
    except torch._subclasses.fake_tensor.DataDependentOutputException:
        return 1
