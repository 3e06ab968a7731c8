"""Do the kernels compute what plain PyTorch does? One layer at each workload's sizes, both passes.

    python -m benchmarks.gpu_first.agree --output DIR [--workloads a b c] [--sequence N]

The same layer, with the same weights and input, runs four times: in bf16 with kernels, with fused
experts besides, in bf16 in plain PyTorch, and in plain PyTorch in float32, the reference. An error
is |x - reference| / |reference|, of the output and of every gradient. Kernels agree if their error
is at most 1.5 times plain PyTorch's, which is rounding, and if both choose the same experts for all
but one token in a thousand (two sums that differ in their last bits may fall on both sides of the
threshold). A row of each is in DIR/agree.csv as soon as it is known; the exit code is 1 if one does
not agree. On a CPU the kernels are the CPU's own, and the sizes smaller.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor

from benchmarks import measure
from benchmarks.layer_providers import WORKLOADS, Provider, Workload, make_provider
from benchmarks.places import in_one_line
from megatron_dynmoe.settings.messages.command_line import CommandParser

PACKAGES = ("torch", "megatron-core")
ERROR_RATIO, ROUNDING = 1.5, 0.5  # of plain PyTorch's error; of bf16's machine epsilon
OF_A_SUM = 0.5  # of a single number, a sum over tokens that nearly cancel, and so mostly rounding
OTHER_EXPERTS = 1e-3  # of all tokens


def main() -> None:
    parser = CommandParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--workloads", nargs="+", default=list(WORKLOADS), choices=WORKLOADS)
    add("--sequence", type=int, help="tokens of a sequence, for a quick look")
    add("--output", type=Path, required=True, help="folder")
    args = parser.parse_args()
    rows = measure.Rows(args.output / "agree.csv", *PACKAGES)
    for name in args.workloads:
        workload = WORKLOADS[name] if measure.on_gpu() else WORKLOADS[name].scaled_down()
        if args.sequence:
            workload = workload._replace(sequence=args.sequence)
        label = f"layer {name}, {workload.tokens} tokens"
        try:
            for row in compare(workload):
                rows.put({"workload": label, **row})
        except Exception as error:  # a workload whose kernels do not compile is one of three
            rows.put({"workload": label, "quantity": "all", "failed": in_one_line(error)})
        torch.cuda.empty_cache()
    differing = [row for row in rows.new if row.get("agrees") != "yes"]
    for row in rows.new:
        print(" | ".join(f"{key} {value}" for key, value in list(row.items())[4:]))
    if differing:
        first = differing[0]
        why = first.get("failed") or f"{first['quantity']}, {first['error_kernels']}"
        sys.exit(f"{len(differing)} of {len(rows.new)} differ, first {first['workload']}: {why}")


def compare(workload: Workload) -> Iterator[dict[str, str]]:
    """For each setting, a row for the choice of experts and for each result of both passes."""
    provider = make_provider(workload, None, torch.bfloat16, "dtop_p", "torch_native", "1")
    plain = run(provider, "0")
    reference = run(in_float32(provider, workload), "0")
    for kernels in ("1", "fused"):
        found = run(provider, kernels)
        for row in differences(found, plain, reference):
            yield {"kernels": kernels, **row}


def differences(
    with_kernels: dict[str, Tensor], plain: dict[str, Tensor], reference: dict[str, Tensor]
) -> Iterator[dict[str, str]]:
    """A row for the choice of experts, and for each result of both passes."""
    other = (with_kernels["experts"] != plain["experts"]).any(-1).double().mean().item()
    yield {
        "quantity": "experts",
        "other_experts": f"{other:.2g}",
        "agrees": "yes" if other <= OTHER_EXPERTS else "no",
    }
    for name, want in reference.items():
        if name != "experts":
            errors = [distance(found[name], want) for found in (with_kernels, plain)]
            allowed = max(ERROR_RATIO * errors[1], ROUNDING * torch.finfo(torch.bfloat16).eps)
            allowed = OF_A_SUM if want.numel() == 1 else allowed
            yield {
                "quantity": name,
                "error_kernels": f"{errors[0]:.3g}",
                "error_plain": f"{errors[1]:.3g}",
                "error_ratio": f"{errors[0] / errors[1]:.3f}" if errors[1] else "",
                "agrees": "yes" if errors[0] <= allowed else "no",  # so is NaN
            }


def run(provider: Provider, kernels: str) -> dict[str, Tensor]:
    """Chosen experts [T, E] bool, output and gradients of one pass each way.

    Args:
        kernels: DYNMOE_KERNELS.
    """
    os.environ["DYNMOE_KERNELS"] = kernels
    provider.clear()
    layer, hidden_SBD = provider.layer, provider.hidden_SBD
    with torch.no_grad():
        _, map_TE = layer.router.routing(layer.router.gating(hidden_SBD))
    output_SBD = layer(hidden_SBD)[0]
    output_SBD.backward(provider.gradient_SBD)
    found = {"experts": map_TE, "output": output_SBD.detach(), "input's gradient": hidden_SBD.grad}
    for name, parameter in layer.named_parameters():
        if parameter.grad is not None:
            found[f"gradient of {name}"] = parameter.grad
    provider.clear()
    return found


def in_float32(provider: Provider, workload: Workload) -> Provider:
    """The same layer and input, of the same values."""
    wide = make_provider(workload, None, torch.float32, "dtop_p", "torch_native", "")
    wide.layer.load_state_dict(provider.layer.state_dict())
    with torch.no_grad():
        wide.hidden_SBD.copy_(provider.hidden_SBD)
        wide.gradient_SBD.copy_(provider.gradient_SBD)
    return wide


def distance(found: Tensor, want: Tensor) -> float:
    """|found - want| / |want|, in float64."""
    want = want.double()
    return ((found.double() - want).norm() / want.norm()).item()


if __name__ == "__main__":
    main()
