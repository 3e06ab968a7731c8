"""The session of torchrun processes that all tests here share."""

import pytest

from tests.distributed.harness import Results


@pytest.fixture(scope="session")
def results(tmp_path_factory: pytest.TempPathFactory) -> Results:
    """Results of cases; see :mod:`tests.distributed.harness`."""
    return Results(tmp_path_factory.mktemp("distributed"))
