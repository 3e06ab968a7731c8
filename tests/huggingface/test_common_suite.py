"""Transformers' common tests need its repository: what is said if it is not there."""

import subprocess
from importlib.metadata import version


def test_without_the_tests_it_is_said_where_they_are():
    run = subprocess.run(
        ["make", "-o", "setup", "test-transformers", "TESTS=nowhere"],
        capture_output=True,
        text=True,
    )
    assert run.returncode == 2
    assert f"--branch v{version('transformers')} https://github.com/" in run.stderr
    assert "make test-transformers TESTS=../transformers/tests" in run.stderr
