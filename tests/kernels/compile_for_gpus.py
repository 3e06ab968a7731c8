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

os.environ["TRITON_INTERPRET"] = "0"

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from megatron_dynmoe.kernels import grouped_gemm, permute, rope, routing_triton

# Compute capability to the shared memory of a block, in bytes.
TARGETS = {80: 163 * 1024, 90: 227 * 1024, 100: 227 * 1024}
TILES = {"TILE_ROWS": 128, "TILE_COLUMNS": 128, "TILE_INNER": 32}


def cases():
    """A kernel, its pointers' types, its constants, and its number of warps."""
    for dtype, precision in (("bf16", "ieee"), ("fp32", "ieee"), ("fp32", "tf32")):
        settings = TILES | {"PRECISION": precision, "WIDEN": False}
        values = dict.fromkeys(["rows_ptr", "weight_ptr", "output_ptr"], dtype)
        counts = {"ends_ptr": "i32", "tile_ends_ptr": "i32"}
        yield grouped_gemm._multiply_rows, values | counts, settings | {"WIDTH": 16}, 8
        values = dict.fromkeys(["left_ptr", "right_ptr", "output_ptr"], dtype)
        yield grouped_gemm._multiply_by_rows, values | counts, settings, 8
    for dtype in ("bf16", "fp32"):
        types = {"rows_ptr": dtype, "sums_ptr": dtype, "row_of_slot_ptr": "i64", "ends_ptr": "i64"}
        yield permute._sum_rows, types, {"BLOCK": permute.BLOCK}, 4
    for width in (16, 512):
        block = permute._tokens_per_program(width)
        settings = {"BLOCK": block, "WIDTH": width}
        types = {"map_ptr": "i1", "counts_ptr": "i32", "experts_ptr": "i64"}
        yield permute._count_chosen, types, settings, 4
        rows = dict.fromkeys(["ends_ptr", "token_ptr", "weight_ptr", "row_of_slot_ptr"], "i64")
        yield permute._number_rows, {"map_ptr": "i1", "counted_ptr": "i64"} | rows, settings, 4
    for dtype in ("bf16", "fp32"):
        for back in (True, False):
            settings = {"INTERLEAVED": False, "BACK": back, "HEADS": 32, "PAIRS": 64}
            yield rope._rotate, {"values_ptr": dtype, "rotated_ptr": dtype}, settings, 4
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
            yield (
                routing_triton._forward,
                types,
                settings | {"TOP": top},
                routing_triton.WARPS_TO_SORT,
            )
            yield routing_triton._backward, types, settings, 4
        parts = {"assignments_ptr": "i32", "not_finite_ptr": "i32"}
        parts |= {"assignments_out": "i64", "not_finite_out": "i64"}
        yield routing_triton._add_up_parts, parts, {"PARTS": block, "WIDTH": width}, 4


def compile_case(kernel, types: dict[str, str], constants: dict, warps: int, capability: int):
    """The compiled kernel, and what the assembler (``ptxas -v``) says of it."""

    def type_of(name: str) -> str:
        if name in constants:
            return "constexpr"
        if name.endswith(("_ptr", "_out")):
            return "*" + types.get(name, "fp32")
        return "fp32" if name == "epsilon" else "i32"

    signature = {name: type_of(name) for name in kernel.arg_names}
    source = ASTSource(fn=kernel, signature=signature, constexprs=constants)
    target = GPUTarget("cuda", capability, 32)
    with contextlib.redirect_stdout(io.StringIO()) as said:
        compiled = triton.compile(source, target=target, options={"num_warps": warps})
    return compiled, said.getvalue()


def main() -> None:
    seen: set[str] = set()
    triton.knobs.nvidia.dump_ptxas_log = True
    for kernel, types, constants, warps in cases():
        if "quick" in sys.argv and (kernel.__name__ in seen or constants.get("WIDTH") == 2):
            continue
        seen.add(kernel.__name__)
        for capability, limit in TARGETS.items():
            compiled, said = compile_case(kernel, types, constants, warps, capability)
            used, registers = compiled.metadata.shared, re.search(r"Used (\d+) registers", said)[1]
            spilled = sum(map(int, re.findall(r"(\d+) bytes spill", said)))
            print(
                f"{kernel.__name__} {constants} sm_{capability}: {used} bytes of shared memory, "
                f"{registers} registers, {spilled} bytes spilled"
            )
            if used > limit:
                raise SystemExit(f"more than the {limit} bytes that a block can have")
            if spilled:
                raise SystemExit("more values than registers: use smaller tiles or more warps")


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder:  # what is compiled already says nothing
        os.environ["TRITON_CACHE_DIR"] = folder
        main()
