"""What every test of this folder needs: Megatron's state of one process."""

import pytest

from tests.moe import one_rank


@pytest.fixture(autouse=True)
def megatron():
    one_rank.world_of_one()
    yield
    one_rank.forget_global_state()
