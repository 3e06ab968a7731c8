import pytest

from tests.moe import one_rank


@pytest.fixture(autouse=True)
def megatron():
    """Every test here runs real Megatron on one rank."""
    one_rank.world_of_one()
    yield
    one_rank.forget_global_state()
