"""When to log, evaluate and save."""

from argparse import Namespace

import pytest

from megatron_dynmoe.training.checks.intervals import check_intervals

GOOD = {
    "skip_train": False,
    "log_interval": 1,
    "tensorboard_log_interval": 1,
    "eval_interval": 10,
    "save": "somewhere",
    "save_interval": 5,
    "save_retain_interval": 10,
    "full_validation": False,
    "multiple_validation_sets": False,
}


@pytest.mark.parametrize("name", ["log_interval", "tensorboard_log_interval", "eval_interval"])
@pytest.mark.parametrize(("value", "found"), [(None, "not given"), (0, "0"), (-1, "-1")])
def test_an_interval_by_which_megatron_divides(name: str, value: int | None, found: str) -> None:
    check_intervals(Namespace(**GOOD))
    flag = "--" + name.replace("_", "-")
    with pytest.raises(ValueError, match=f"^{flag} is {found}: use 1 or more steps, "):
        check_intervals(Namespace(**GOOD | {name: value}))


@pytest.mark.parametrize(
    ("interval", "retain", "message"),
    [
        (None, None, r"^--save-interval is not given: use 1 or more .*--run-dir"),
        (0, None, "^--save-interval is 0: use 1 or more"),
        (5, 7, r"^--save-retain-interval is 7: use a multiple of --save-interval \(5\)"),
        (5, 0, "^--save-retain-interval is 0: use a multiple"),
    ],
)
def test_where_checkpoints_are_saved_it_is_said_how_often(
    interval: int | None, retain: int | None, message: str
) -> None:
    values = {"save_interval": interval, "save_retain_interval": retain}
    with pytest.raises(ValueError, match=message):
        check_intervals(Namespace(**GOOD | values))
    check_intervals(Namespace(**GOOD | values | {"save": None}))


@pytest.mark.parametrize(("value", "becomes"), [(None, 1), (0, 1), (7, 7)])
def test_an_evaluation_alone_needs_none(value: int | None, becomes: int) -> None:
    args = Namespace(**GOOD | {"skip_train": True, "eval_interval": value})
    check_intervals(args)
    assert args.eval_interval == becomes


def test_full_validation_of_one_set_fails_in_megatron() -> None:
    """At the first evaluation, which may be hours later."""
    full = GOOD | {"full_validation": True}
    with pytest.raises(ValueError, match=r"^--full-validation is given .*--multiple-validation"):
        check_intervals(Namespace(**full))
    several = GOOD | {"multiple_validation_sets": True}
    with pytest.raises(ValueError, match=r"^--multiple-validation-sets is given without --full"):
        check_intervals(Namespace(**several))
    check_intervals(Namespace(**full | several | {"full_validation": True}))
    check_intervals(Namespace(**full | {"multiple_validation_sets": True}))
