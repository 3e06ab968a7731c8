"""What trainings of a rule over layouts have in common: flags, layouts, and what has to hold."""

from __future__ import annotations

from collections.abc import Iterable

import pytest
import torch

from tests.distributed.agreement import tensors
from tests.distributed.harness import TINY, CaseResult

HALF, STEPS = 3, 6
TOKENS = 8 * 32  # of a global batch of TINY
TRAIN = (
    f"{TINY} --num-layers 2 --make-vocab-size-divisible-by 16 --moe-token-dispatcher-type alltoall "
    f"--train-iters {STEPS} --save-interval {HALF} --ckpt-format torch_dist "
    "--moe-dynamic-target-experts-per-token 2"
)
_EP2 = "--expert-model-parallel-size 2"
_PP2 = "--pipeline-model-parallel-size 2"
_TP2 = "--tensor-model-parallel-size 2 --sequence-parallel"
LAYOUTS = {
    "one": (1, ""),
    "dp2": (2, ""),
    "ep2": (2, _EP2),
    "pp2": (2, _PP2),
    "tp2": (2, _TP2),
    "cp2": (2, "--context-parallel-size 2 --cp-comm-type a2a"),
    "pp2_ep2": (4, f"{_PP2} {_EP2}"),
    "tp2_ep2": (4, f"{_TP2} {_EP2}"),
}


def router_state(result: CaseResult, names: Iterable[str]) -> dict[str, torch.Tensor]:
    """The routers' state in the last checkpoint, of all layers."""
    saved = tensors(result.directory / result.case.name / f"iter_{STEPS:07d}")
    names = (*names, "integral", "measured")
    return {name: saved[f"decoder.layers.mlp.router.{name}"] for name in names}


def assert_near_state(
    one: CaseResult, other: CaseResult, names: Iterable[str], atol: float, other_choices: int = 0
) -> None:
    """The routers of both end with the same state, up to ``atol``.

    Args:
        other_choices: how many assignments of a layer may differ in the measured count.
    """
    expected, found = router_state(one, names), router_state(other, names)
    for name, value in expected.items():
        allowed = other_choices / TOKENS if name == "measured" else 0
        torch.testing.assert_close(found[name], value, rtol=0, atol=atol + allowed)


def assert_resumes_bitwise(whole: CaseResult, resumed: CaseResult, names: Iterable[str]) -> None:
    """The second half has the same losses and ends with the same state, to the bit."""
    assert resumed.losses == whole.losses[HALF:]
    expected, found = router_state(whole, names), router_state(resumed, names)
    assert all(torch.equal(found[key], value) for key, value in expected.items())


def assert_goes_on(
    whole: CaseResult, resumed: CaseResult, names: Iterable[str], atol: float
) -> None:
    """The second half, in another layout, has the same losses and state up to float sums."""
    assert resumed.losses == pytest.approx(whole.losses[HALF:], rel=1e-5)
    assert_near_state(whole, resumed, names, atol)
