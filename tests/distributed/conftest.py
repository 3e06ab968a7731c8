"""The session of torchrun processes that all tests here share."""

import pytest

from tests.distributed.harness import Results


@pytest.fixture(scope="session")
def results(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Results:
    """Results of cases; see :mod:`tests.distributed.harness`."""
    tests = [item for item in request.session.items if isinstance(item, pytest.Function)]
    modules = {test.module.__name__ for test in tests}
    return Results(tmp_path_factory.mktemp("distributed"), modules)
