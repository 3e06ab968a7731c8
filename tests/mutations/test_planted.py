"""The list of mistakes keeps up with the source; ``make mutations`` plants them."""

import re
from pathlib import Path

import pytest

from tests.mutations.__main__ import left_out
from tests.mutations.mutation import Mutation
from tests.mutations.planted import MUTATIONS

REPOSITORY = Path(__file__).resolve().parents[2]


@pytest.mark.parametrize("mutation", MUTATIONS, ids=lambda mutation: mutation.name)
def test_a_mistake_fits_the_source_and_its_tests_exist(mutation: Mutation) -> None:
    path = REPOSITORY / "megatron_dynmoe" / mutation.file
    source = path.read_text()
    assert mutation.fits(source), f"not exactly once in {mutation.file}: {mutation.right!r}"
    planted = mutation.plant(source)
    if path.suffix == ".py":
        compile(planted, path, "exec")
    for test in mutation.tests:
        file, name = re.fullmatch(r"(.+\.py)::(\w+)(?:\[.*\])?", test).groups()
        assert f"def {name}(" in (REPOSITORY / file).read_text(), test


def test_every_file_is_in_the_copy() -> None:
    files = [f"megatron_dynmoe/{mutation.file}" for mutation in MUTATIONS]
    files += [test.partition("::")[0] for mutation in MUTATIONS for test in mutation.tests]
    for file in map(REPOSITORY.joinpath, files):
        for path in (file, *file.parents):
            if path != REPOSITORY and REPOSITORY in path.parents:
                assert path.name not in left_out(str(path.parent), [path.name]), path
    assert left_out(str(REPOSITORY), ["runs"]) == {"runs"}


def test_names_are_unique() -> None:
    names = [mutation.name for mutation in MUTATIONS]
    assert len(set(names)) == len(names)
