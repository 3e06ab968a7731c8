"""The session of processes that all tests here share."""

import pytest

from tests.distributed.harness import Results
from tests.distributed.selection import cases_of


@pytest.fixture(scope="session")
def results(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Results:
    """Results of cases; see :mod:`tests.distributed.harness`."""
    tests = [test for test in request.session.items if "results" in test.fixturenames]
    return Results(tmp_path_factory.mktemp("distributed"), cases_of(tests))
