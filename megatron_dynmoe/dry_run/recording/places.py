"""Where something happens: the line of Megatron's code or ours, and the part of the layer."""

from __future__ import annotations

import sys
from collections.abc import Iterable
from importlib.util import find_spec
from pathlib import Path
from types import CodeType, FrameType
from typing import Any, NamedTuple

import torch

from megatron_dynmoe.dry_run.devices.device import run_backward_here

# Modules of a layer, and what they are called. The dispatcher is no module, so that its operations
# are those of the MoE layer itself; and so are residuals those of the transformer layer.
PARTS = {
    "": "residuals",
    "input_layernorm": "norms",
    "pre_mlp_layernorm": "norms",
    "self_attention": "attention",
    "mlp": "MLP",
    "mlp.router": "router",
    "mlp.experts": "experts",
    "mlp.shared_experts": "shared experts",
}
DISPATCH = "dispatch, combine"
_HERE = str(Path(__file__).parents[1])  # the whole of dry_run
_ENGINE = run_backward_here.__code__


class Place(NamedTuple):
    """A line of code.

    Attributes:
        line: ``file:line``, from the name of the package on.
        caller: the next one outward that is in another file; empty if there is none.
        layer: number of the transformer layer, 0 outside of layers.
        part: a part of the layer, one of :data:`PARTS`.
        derived: whether a derivative runs.
        function: of the line, with its class, as Python qualifies it.
    """

    line: str
    caller: str = ""
    layer: int = 0
    part: str = ""
    derived: bool = False
    function: str = ""

    @property
    def file(self) -> str:
        """The file, without the line."""
        return self.line.rpartition(":")[0] or self.line


class Places:
    """Finds the place of what runs now."""

    def __init__(self) -> None:
        self._running: list[tuple[int, str]] = [(0, "")]  # layers and parts, outermost first
        self._of_nodes: dict[int, Place] = {}
        self._of_parameters: dict[int, tuple[int, str]] = {}
        self._names: dict[CodeType, str | None] = {}
        packages = [find_spec(name) for name in ("megatron", "megatron_dynmoe")]
        self._roots = [
            folder
            for package in packages
            for folder in (package and package.submodule_search_locations) or ()
        ]

    def watch(self, layers: Iterable[torch.nn.Module]) -> None:
        """Follow the forward passes of transformer layers, part by part."""
        for layer in layers:
            number: Any = layer.layer_number
            for name, part in PARTS.items():
                module = _submodule(layer, name)
                if module is None:
                    continue
                if name == "mlp" and hasattr(module, "router"):
                    part = DISPATCH
                self._watch(module, number, part)
                for parameter in module.parameters():
                    self._of_parameters[id(parameter)] = (number, part)

    def _watch(self, module: torch.nn.Module, layer: int, part: str) -> None:
        module.register_forward_pre_hook(
            lambda *_: self._running.append((layer, part)), prepend=True
        )
        module.register_forward_hook(lambda *_: self._running.pop() and None)

    def now(self) -> Place:
        """Find the innermost line of Megatron or ours that leads to what runs now.

        The engine runs derivatives of PyTorch's own operations without any line of Python. Their
        place is that of the operation in the forward pass.
        """
        line, caller, function = self._lines(sys._getframe(1))
        layer, part = self._running[-1]
        node: Any = torch._C._current_autograd_node()
        if node is None:
            place = Place(line or "torch", caller, layer, part, function=function)
            # If the operation has a node, that is the one that was made last.
            self._of_nodes.setdefault(torch._C._autograd._get_sequence_nr() - 1, place)
            return place
        if hasattr(node, "variable"):  # it accumulates the gradient of a parameter
            layer, part = self._of_parameters.get(id(node.variable), (0, ""))
            return Place(line or "torch", caller, layer, part, True, function)
        forward = self._of_nodes.get(node._sequence_nr(), Place("torch"))
        if line is None:
            return forward._replace(derived=True)
        if not layer:
            layer, part = forward.layer, forward.part
        return Place(line, caller or forward.caller, layer, part, True, function)

    def of_error(self, error: BaseException) -> str:
        """Find the innermost line of Megatron or ours that leads to an error."""
        line = "torch"
        trace = error.__traceback__
        while trace is not None:
            name = self._name(trace.tb_frame.f_code)
            line = line if name is None else f"{name}:{trace.tb_lineno}"
            trace = trace.tb_next
        return line

    def forget_nodes(self) -> None:
        """Forget the operations of a step that has ended."""
        self._of_nodes.clear()

    def _lines(self, frame: FrameType | None) -> tuple[str | None, str, str]:
        """The innermost line of the packages, the next one in another file, and whose it is."""
        inner = inner_name = None
        function = ""
        while frame is not None:
            code = frame.f_code
            if code is _ENGINE:
                break
            name = self._names[code] if code in self._names else self._name(code)
            if name is not None and name != inner_name:
                line = f"{name}:{frame.f_lineno}"
                if inner is not None:
                    return inner, line, function
                inner, inner_name, function = line, name, code.co_qualname
            frame = frame.f_back
        return inner, "", function

    def _name(self, code: CodeType) -> str | None:
        file, name = code.co_filename, None
        if not file.startswith(_HERE):
            for root in self._roots:
                if file.startswith(f"{root}/"):
                    name = str(Path(file).relative_to(Path(root).parent))
        self._names[code] = name
        return name


def _submodule(layer: torch.nn.Module, name: str) -> torch.nn.Module | None:
    try:
        return layer.get_submodule(name)
    except AttributeError:
        return None
