"""Upstream's flex dispatcher with any routing map, on doubles of DeepEP and HybridEP.

The doubles (tests/doubles/deep_ep) have the originals' limits. The originals need GPUs that see
each other, and have not been run.
"""

from __future__ import annotations

from collections import deque
from itertools import product
from pathlib import Path

import pytest

from tests.distributed.harness import DTOP_P, TINY, Case, CaseResult, run_session
from tests.distributed.selection import cases_of, matrix
from tests.distributed.test_dispatch import differences

pytestmark = [pytest.mark.distributed, pytest.mark.megatron]

REPOSITORY = Path(__file__).resolve().parents[2]
BACKENDS = ("deepep", "hybridep")
CASES: deque[Case] = deque()  # all: cases_of() looks into lists


def case(name: str, num_ranks: int, flags: str, **fields) -> Case:
    CASES.append(Case(f"flex_{name}", num_ranks, flags, **fields))
    return CASES[-1]


def dispatch(backend: str, shared: str, whose: str, num_ranks: int) -> Case:
    name, flags = f"{backend}_{shared}_{whose}_ep{num_ranks}", f"{backend} {shared} {whose}"
    return case(name, num_ranks, flags, entry="tests.distributed.dispatch_cases:main")


EXACT = [
    dispatch(backend, shared, "ours", num_ranks)
    for backend, (shared, num_ranks) in product(BACKENDS, (("routed", 2), ("shared", 4)))
]
STOCK = dispatch("deepep", "routed", "stock", 2)

EP2 = "--expert-model-parallel-size 2"
TP2 = "--tensor-model-parallel-size 2 --sequence-parallel"
CAP = "--moe-dynamic-max-experts-per-token 3"
ALLTOALL = "--moe-token-dispatcher-type alltoall"
# The doubles take bf16 only, like the originals; what is compared is rounded to it.
TRAIN = f"{TINY} {DTOP_P} --bf16 --make-vocab-size-divisible-by 16"


def flex(backend: str) -> str:
    return f"--moe-token-dispatcher-type flex --moe-flex-dispatcher-backend {backend}"


TRAINED = {
    layout: [
        case(f"{layout}_{name}", num_ranks, f"{TRAIN} {flags} {kind}")
        for name, kind in (
            ("alltoall", ALLTOALL),
            *((backend, flex(backend)) for backend in BACKENDS),
        )
    ]
    for layout, num_ranks, flags in (
        ("ep2", 2, EP2),
        ("ep2_cap", 2, f"{EP2} {CAP}"),
        ("ep2_tp2_cap", 4, f"{EP2} {TP2} {CAP}"),
    )
}
REFUSED = {
    flex("ncclep"): "sized by a fixed number of experts per token: use deepep or hybridep",
    flex("deepep"): "which needs more than one expert-parallel rank: use alltoall.",
    f"{flex('deepep')} {EP2} --num-experts 64": "is not given, so a token may use 64, and DeepEP "
    "takes at most 32 ids per token: give at most 32",
    f"{flex('deepep')} {TP2} --num-experts 64 --moe-dynamic-max-experts-per-token 20 "
    "--make-vocab-size-divisible-by 16": "token is 20, so a token may use 20 on each of 2 "
    "tensor-parallel ranks, and DeepEP takes at most 32 ids per token: give at most 16",
}
REFUSED |= {
    f"{flex(backend)} {EP2}": "whose kernels take bf16, and the model is float32: give --bf16"
    for backend in BACKENDS
}
REFUSED[f"{flex('deepep')} {EP2} --bf16 --num-attention-heads 2 --hidden-size 36"] = (
    "--hidden-size is 36, and DeepEP sends rows of bf16 in whole pieces of 16 bytes: use a multiple"
)
REFUSALS = {
    flags: case(f"refused_{number}", 1 + ("parallel-size 2" in flags), f"{TINY} {DTOP_P} {flags}")
    for number, flags in enumerate(REFUSED)
}


@pytest.fixture(scope="module")
def runs(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, CaseResult]:
    path = f"{REPOSITORY}:{REPOSITORY / 'tests/doubles'}"
    names = cases_of(request.session.items)
    cases = [case for case in CASES if case.name in names]
    return run_session(cases, tmp_path_factory.mktemp("flex"), {"PYTHONPATH": path})


@pytest.mark.parametrize("exact", EXACT, ids=lambda case: case.name)
def test_flex_is_exact_for_every_map(runs: dict[str, CaseResult], exact: Case) -> None:
    result = runs[exact.name].check()
    for rank in range(exact.num_ranks):
        found = differences(result, rank)
        assert len(found) == 23
        assert not {name: by_kind for name, by_kind in found.items() if any(by_kind.values())}


def test_stock_is_wrong_without_an_error(runs: dict[str, CaseResult]) -> None:
    """When this fails, upstream has learned it, and _VariableKDeepEP can go."""
    found = differences(runs[STOCK.name].check(), 0)
    assert 0 < found["every token to every expert"]["output"] < float("inf")


@pytest.mark.parametrize("layout", matrix(TRAINED, ["ep2_cap"]))
def test_a_training_is_that_of_all_to_all(runs: dict[str, CaseResult], layout: str) -> None:
    alltoall, *others = (runs[case.name].check() for case in TRAINED[layout])
    for other in others:
        assert other.losses == pytest.approx(alltoall.losses, rel=2e-3)
        # In a later layer a token may change its mind, because the back ends round to bf16 after
        # other sums. So counts and gradients of single experts are left to the exact maps above.
        assert other.assignments[0][0] == alltoall.assignments[0][0]
        assert other.experts_per_token == pytest.approx(alltoall.experts_per_token, rel=1e-2)


@pytest.mark.parametrize("flags", REFUSED)
def test_what_cannot_run_is_refused_at_start_up(runs: dict[str, CaseResult], flags: str) -> None:
    error = runs[REFUSALS[flags].name].error
    assert error is not None
    message = error.strip().splitlines()[-1]
    assert message.startswith("UsageError: ") and REFUSED[flags] in message
