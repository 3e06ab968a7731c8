"""Training over layouts."""

import pytest

from tests.distributed.harness import DTOP_P, TINY, Case, Results, add

pytestmark = [pytest.mark.distributed, pytest.mark.megatron]
ONE = add(Case("one", flags=f"{TINY} {DTOP_P}"))
DP2 = add(Case("dp2", 2, flags=f"{TINY} {DTOP_P}"))
EP2 = add(Case("ep2", 2, flags=f"{TINY} {DTOP_P} --expert-model-parallel-size 2"))
EP4 = add(
    Case("ep4", 4, flags=f"{TINY} {DTOP_P} --expert-model-parallel-size 4 --micro-batch-size 1")
)


@pytest.mark.parametrize("case", [ONE, DP2, EP2, EP4], ids=lambda c: c.name)
def test_trains(results: Results, case: Case):
    r = results[case]
    print(r.losses, r.experts_per_token, r.thresholds)
    assert r.losses[-1] < r.losses[0]
