"""Runs Megatron with Transformer Engine: the original on GPUs, the doubles beside this file here.

The doubles are what a container with Transformer Engine and Apex has, and unlike the originals they
run on a CPU. Their folder has to be on the path before Megatron is imported, so runs with them need
processes of their own: those of :func:`run_with_transformer_engine`.
"""

from __future__ import annotations

import importlib.util
from pathlib import Path

from tests.distributed.harness import Case, CaseResult, run_session

REPOSITORY = Path(__file__).resolve().parents[2]
DOUBLES = {"transformer_engine", "fused_weight_gradient_mlp_cuda"}
WITH_DOUBLES = {
    "PYTHONPATH": f"{REPOSITORY}:{REPOSITORY / 'tests/doubles'}",
    "DYNMOE_TEST_DOUBLES": "1",  # for tests/distributed/worker.py, which calls prepare()
}
WITH_THE_ORIGINAL = {
    "PYTORCH_NVML_BASED_CUDA_CHECK": "1",  # a process that has looked for a GPU may fork
    "NVIDIA_TF32_OVERRIDE": "0",  # it multiplies float32 in TF32 otherwise
}
# What the CPU layer turns off because it would need one of the packages.
_NEEDS_THEM = (
    *("transformer_impl", "moe_grouped_gemm", "moe_permute_fusion", "moe_router_fusion"),
    *("apply_rope_fusion", "cross_entropy_loss_fusion", "gradient_accumulation_fusion"),
)


def has_the_original() -> bool:
    """Whether Transformer Engine itself is installed, and there is a GPU for it."""
    import torch

    from megatron_dynmoe.backends import cpu

    is_installed = importlib.util.find_spec("transformer_engine") is not None
    return is_installed and not cpu.is_installed() and torch.cuda.is_available()


def run_with_transformer_engine(cases: list[Case], directory: Path) -> dict[str, CaseResult]:
    """Results by the cases' names; on GPUs without the cases that need more of them."""
    environment = WITH_THE_ORIGINAL if has_the_original() else WITH_DOUBLES
    return run_session(possible(cases), directory, environment)


def possible(cases: list[Case]) -> list[Case]:
    """Those for which there are enough GPUs; all on the CPU."""
    import torch

    if not has_the_original():
        return cases
    return [case for case in cases if case.num_ranks <= torch.cuda.device_count()]


def main() -> None:
    """Say why ``make test-te`` cannot ask the original, or nothing."""
    if not has_the_original():
        raise SystemExit(
            "Transformer Engine is not installed here, or finds no CUDA device: use a container "
            "that has it (NGC's PyTorch), or install the extra 'te' on a machine with a GPU. "
            "Its double needs neither: make test runs the same tests with it."
        )


def prepare() -> None:
    """What ``megatron_dynmoe.run.prepare`` does, and let the doubles in."""
    import torch

    from megatron_dynmoe import run
    from megatron_dynmoe.backends import cpu

    cpu.PACKAGES_FOR_CUDA = tuple(set(cpu.PACKAGES_FOR_CUDA) - DOUBLES)
    for name in _NEEDS_THEM:
        del cpu.FORCED_SETTINGS[name]
    run.prepare()
    torch.cuda.get_device_capability = lambda *args: (9, 0)  # Megatron's grouped GEMM asks for 8


if __name__ == "__main__":
    main()
