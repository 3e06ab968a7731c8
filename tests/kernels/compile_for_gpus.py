"""Compile every kernel to machine code of Ampere, Hopper and Blackwell, which needs no GPU.

    python -m tests.kernels.compile_for_gpus          # every variant, 5 minutes
    python -m tests.kernels.compile_for_gpus quick    # one of each, as make test does

What Triton's interpreter runs need not compile: it knows no types, shapes or shared memory. Nor may
a kernel have more values than registers, which it would keep in slow memory ("spill").
"""

import contextlib
import io
import os
import re
import sys
import tempfile
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

os.environ["TRITON_INTERPRET"] = "0"

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from megatron_dynmoe.kernels import fused_experts, grouped_gemm, permute, rope, routing_triton
from megatron_dynmoe.kernels.tiles import Way

# Compute capability to the shared memory of a block, in bytes.
TARGETS = {80: 163 * 1024, 90: 227 * 1024, 100: 227 * 1024}


class Case(NamedTuple):
    """A kernel, its pointers' types, its constants, and from which GPUs on it is used."""

    kernel: Any
    types: dict[str, str]
    constants: dict[str, Any]
    warps: int
    stages: int = 3
    since: int = min(TARGETS)
    unaligned: str = ""  # a pointer that need not be
    may_spill: int = 0  # bytes, as docs/backends.md says


def cases() -> Iterator[Case]:
    for dtype, precision in (("bf16", "ieee"), ("fp32", "ieee"), ("fp32", "tf32")):
        yield from tiled_cases(dtype, {"PRECISION": precision, "WIDEN": False})
    for dtype in ("bf16", "fp32"):
        types = {"rows_ptr": dtype, "sums_ptr": dtype, "row_of_slot_ptr": "i64", "ends_ptr": "i64"}
        yield Case(permute._sum_rows, types, {"BLOCK": permute.BLOCK}, 4)
    for width in (16, 512):
        block = permute._tokens_per_program(width)
        settings = {"BLOCK": block, "WIDTH": width}
        types = {"map_ptr": "i1", "counts_ptr": "i32", "experts_ptr": "i64"}
        yield Case(permute._count_chosen, types, settings, 4)
        rows = dict.fromkeys(["ends_ptr", "token_ptr", "weight_ptr", "row_of_slot_ptr"], "i64")
        yield Case(
            permute._number_rows, {"map_ptr": "i1", "counted_ptr": "i64"} | rows, settings, 4
        )
    for dtype in ("bf16", "fp32"):
        for back in (True, False):
            settings = {"INTERLEAVED": False, "BACK": back, "HEADS": 32, "PAIRS": 64}
            yield Case(rope._rotate, {"values_ptr": dtype, "rotated_ptr": dtype}, settings, 4)
    for width, top in ((2, 2), (16, 16), (64, 64), (128, 16), (512, 32)):
        # With all that a router may have, and with nothing of it.
        for full in (True, False):
            block = max(1, routing_triton.ELEMENTS_PER_PROGRAM // width)
            settings = {"NORMALIZE": full, "RENORMALIZE": full, "PADDED": full}
            settings |= {"BLOCK": block, "WIDTH": width}
            if not full:
                settings |= {"theta_ptr": None, "valid_ptr": None}
            types = {"logits_ptr": "fp32", "map_ptr": "i1", "valid_ptr": "i1"}
            types |= {"experts_ptr": "i64", "assignments_ptr": "i32", "not_finite_ptr": "i32"}
            top_settings, warps = settings | {"TOP": top}, routing_triton.WARPS_FORWARD
            yield Case(routing_triton._forward, types, top_settings, warps)
            yield Case(routing_triton._backward, types, settings, routing_triton.WARPS_BACKWARD)
        parts = {"assignments_ptr": "i32", "not_finite_ptr": "i32"}
        parts |= {"assignments_out": "i64", "not_finite_out": "i64"}
        yield Case(routing_triton._add_up_parts, parts, {"PARTS": block, "WIDTH": width}, 4)


def tiled_cases(dtype: str, settings: dict[str, Any]) -> Iterator[Case]:
    """The GEMMs, in each way in which they are launched."""
    counts = {"ends_ptr": "i32", "token_ptr": "i64"}
    index = {"left_index_ptr": "i64", "right_index_ptr": "i64"}
    wide = settings | {"WIDTH": 16}
    by_rows = settings | {"left_column_step": 1, "right_column_step": 1}
    values = dict.fromkeys(["rows_ptr", "weight_ptr", "output_ptr"], dtype)
    rows_types = values | counts
    forward, backward = (
        {"row_column_step": 1, step: 1} for step in ("weight_inner_step", "weight_column_step")
    )
    for steps in (forward, backward, forward | {"WIDTH": 64}):
        yield from ways_of(grouped_gemm._multiply_rows, grouped_gemm.WAYS, rows_types, wide | steps)
    values = dict.fromkeys(["left_ptr", "right_ptr", "output_ptr"], dtype)
    for gathered in ("left_index_ptr", "right_index_ptr"):
        given = {name: None for name in index if name != gathered}
        yield from ways_of(
            grouped_gemm._multiply_by_rows,
            grouped_gemm.GRADIENT_WAYS,
            values | counts | index,
            by_rows | {"ADDS": False} | given,
        )
    adding = values | counts | {"output_ptr": "fp32"}
    in_place = by_rows | {"ADDS": True} | dict.fromkeys(index)
    ways = grouped_gemm.GRADIENT_WAYS
    yield from ways_of(grouped_gemm._multiply_by_rows, ways, adding, in_place)
    # Without the distributed optimizer, a gradient may begin anywhere in Megatron's buffer.
    for case in ways_of(grouped_gemm._multiply_by_rows, ways[:1], adding, in_place):
        yield case._replace(unaligned="output_ptr")
    names = ("tokens", "d_output", "weight", "gate_up", "activated", "d_gate_up")
    values = {f"{name}_ptr": dtype for name in names}
    many = settings | {"WIDTH": 128}
    yield from ways_of(grouped_gemm._multiply_rows, grouped_gemm.WAYS, rows_types, many | forward)
    for kernel, ways in (
        (fused_experts._gate_and_up, fused_experts.WAYS),
        (fused_experts._gate_and_up_backward, fused_experts.BACKWARD_WAYS),
    ):
        for constants in (wide, wide | {"token_ptr": None}, many):
            for case in ways_of(kernel, ways, values | counts, constants):
                # The one exception, on Blackwell.
                is_known = kernel is fused_experts._gate_and_up_backward and constants is many
                is_known &= dtype == "fp32" and settings["PRECISION"] == "ieee"
                yield case._replace(may_spill=8) if is_known else case
    # Of a rank that has one expert; Triton makes a constant of a 1.
    alone = settings | {"WIDTH": 1, "num_experts": 1}
    for kernel in (fused_experts._gate_and_up, fused_experts._gate_and_up_backward):
        yield from ways_of(kernel, fused_experts.WAYS[:1], values | counts, alone)


def ways_of(
    kernel: Any, ways: Sequence[Way], types: dict[str, str], settings: dict[str, Any]
) -> Iterator[Case]:
    """A kernel's ways in bf16; in float32 the first one, because no other is launched."""
    for way in ways if "bf16" in types.values() else ways[:1]:
        constants = settings | way.config.kwargs
        yield Case(kernel.fn, types, constants, way.warps, way.stages, way.since)


def compile_case(case: Case, capability: int):
    """The compiled kernel, and what the assembler (``ptxas -v``) says of it.

    Addresses, sizes and steps (but those of 1) are multiples of 16, as in a layer. Triton knows so
    when it launches a kernel, and copies straight into shared memory then.
    """

    def type_of(name: str) -> str:
        if name in case.constants:
            return "constexpr"
        if name.endswith(("_ptr", "_out")):
            return "*" + case.types.get(name, "fp32")
        return "fp32" if name == "epsilon" else "i32"

    signature = {name: type_of(name) for name in case.kernel.arg_names}
    aligned = {
        (place,): [["tt.divisibility", 16]]
        for place, (name, kind) in enumerate(signature.items())
        if kind.startswith("*") or (kind == "i32" and name != "num_experts")
        if name != case.unaligned
    }
    source = ASTSource(
        fn=case.kernel, signature=signature, constexprs=case.constants, attrs=aligned
    )
    target = GPUTarget("cuda", capability, 32)
    options = {"num_warps": case.warps, "num_stages": case.stages}
    with contextlib.redirect_stdout(io.StringIO()) as said:
        compiled = triton.compile(source, target=target, options=options)
    return compiled, said.getvalue()


def main() -> int:
    seen: set[str] = set()
    mistakes = 0
    triton.knobs.nvidia.dump_ptxas_log = True
    for case in cases():
        name = case.kernel.__name__
        if "quick" in sys.argv and (name in seen or case.constants.get("WIDTH") == 2):
            continue
        seen.add(name)
        for capability, limit in TARGETS.items():
            if capability < case.since:
                continue
            compiled, said = compile_case(case, capability)
            used, registers = compiled.metadata.shared, re.search(r"Used (\d+) registers", said)[1]
            spilled = sum(map(int, re.findall(r"(\d+) bytes spill", said)))
            print(
                f"{name} {case.constants} {case.warps} warps sm_{capability}: {used} bytes of "
                f"shared memory, {registers} registers, {spilled} bytes spilled"
            )
            mistake = ""
            if used > limit:
                mistake = f"more than the {limit} bytes that a block can have"
            elif spilled > case.may_spill:
                mistake = "more values than registers: use smaller tiles or more warps"
            if mistake:
                mistakes += 1
                print(f"{name} {case.constants} sm_{capability}: {mistake}", file=sys.stderr)
    return mistakes


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder:  # what is compiled already says nothing
        os.environ["TRITON_CACHE_DIR"] = folder
        sys.exit(f"{mistakes} mistakes" if (mistakes := main()) else 0)
