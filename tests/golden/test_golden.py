"""The golden runs against their files; see :mod:`tests.golden.runs`."""

import copy
import warnings
from typing import Any

import pytest

from tests.golden import runs

pytestmark = [pytest.mark.distributed, pytest.mark.megatron]
Records = dict[str, dict[str, Any]]


@pytest.fixture(scope="module")
def trained(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Records:
    """The runs whose tests are selected."""
    names = [
        item.callspec.params["name"]
        for item in request.session.items
        if isinstance(item, pytest.Function) and item.function is test_a_run_equals_its_golden_file
    ]
    return runs.train(tmp_path_factory.mktemp("golden"), names)


@pytest.mark.parametrize(
    "name",
    [  # the readable lines are near the kernels', by their files, and have tests of their own
        pytest.param(name, marks=[pytest.mark.long] if name == "dtop_p_readable" else [])
        for name in runs.FLAGS
    ],
)
def test_a_run_equals_its_golden_file(trained: Records, name: str) -> None:
    found = trained[name]
    golden = runs.read(name, found["made_with"]["processor"])
    others = runs.differing_platform(golden, found)
    if others:
        platform = ", ".join(f"{key} {now} (file: {then})" for key, (then, now) in others.items())
        warnings.warn(
            f"{name} is compared with the relative tolerances {runs.tolerances_of(golden)}, not to "
            f"the bit, because of {platform}",
            stacklevel=1,
        )
    difference = runs.first_difference(golden, found, exact=not others)
    assert difference is None, (
        f"{name}: {difference}. If results are meant to change: python -m tests.golden {name}. "
        f"The file was made with {golden['made_with']}, here is {found['made_with']}."
    )


def changed(golden: dict[str, Any], step: int, **values: Any) -> dict[str, Any]:
    other = copy.deepcopy(golden)
    other["steps"][step - 1].update(values)
    return other


def test_the_first_difference_is_told() -> None:
    golden = runs.read("dtop_p")
    loss, threshold = (golden["steps"][36][field] for field in ("loss", "threshold"))
    assert runs.first_difference(golden, golden, exact=True) is None
    assert runs.first_difference(golden, changed(golden, 37, loss=loss + 2e-7), exact=True) == (
        f"step 37, loss: {loss + 2e-7} here, {loss} in the file (1 of 100 steps differ)"
    )
    off = changed(changed(golden, 90, loss=1.0), 37, threshold=threshold + 1e-6)
    message = runs.first_difference(golden, off, exact=True)
    assert message is not None
    assert message.startswith("step 37, threshold") and "2 of 100" in message
    short = golden | {"steps": golden["steps"][:-1]}
    assert runs.first_difference(golden, short, exact=True) == "99 steps, 100 in the file"
    assert "flags" in str(runs.first_difference(golden, golden | {"flags": ""}, exact=True))


def test_elsewhere_all_steps_are_compared_with_a_tolerance() -> None:
    golden = runs.read("dtop_p_layer")
    loss, thresholds = (golden["steps"][4][field] for field in ("loss", "threshold"))
    near = changed(golden, 5, loss=loss * (1 + 1e-5), threshold=[t * 1.001 for t in thresholds])
    assert runs.first_difference(golden, near, exact=False) is None
    late = changed(golden, 100, loss=golden["steps"][99]["loss"] * 1.002)
    assert str(runs.first_difference(golden, late, exact=False)).startswith("step 100, loss")
    for far in (changed(golden, 5, loss=loss * 1.01), changed(golden, 5, threshold=thresholds[:1])):
        assert str(runs.first_difference(golden, far, exact=False)).startswith("step 5")


def test_files_are_of_runs_that_there_are_and_lie_in_the_folder_of_their_processor() -> None:
    found = {(path.parent.name, path.stem) for path in runs.FOLDER.glob("*/*.json")}
    assert (runs.REFERENCE, "dtop_p") in found
    assert {name for _, name in found} == set(runs.FLAGS)  # each has a file of some kind
    for kind, name in found:
        assert runs.read(name, kind)["made_with"]["processor"] == kind


def test_the_readable_lines_train_as_the_kernels_do() -> None:
    fast, readable = (
        runs.read(name, "AuthenticAMD-avx512") for name in ("dtop_p", "dtop_p_readable")
    )
    assert fast["flags"] == readable["flags"]
    assert fast["steps"] != readable["steps"]  # other lines, so other last bits
    assert runs.first_difference(fast, readable, exact=False) is None


def test_makers_agree_over_all_steps_but_for_rounding() -> None:
    """What the tolerances promise of a machine that has no files of its own."""
    for folder in runs.FOLDER.glob("*-*"):
        for name in runs.FLAGS:
            pair = runs.read(name), runs.read(name, folder.name)
            assert runs.first_difference(*pair, exact=False) is None
