"""Data that would run out in the middle of a run."""

import pytest

pytestmark = pytest.mark.megatron


def check(*args):
    from megatron_dynmoe.training.datasets.provider import check_lengths

    check_lengths(*args)


def test_enough_is_enough():
    check([range(10), range(2), None], [10, 2, 7])  # None: on another rank
    check([range(10), [range(2), range(3)], range(0)], [10, None, 0])


@pytest.mark.parametrize(
    "datasets, message",
    [
        ([range(9), range(2), range(1)], "training data hold 9 sequences, and this run needs 10"),
        ([range(10), range(1), range(1)], "validation data hold 1 sequences.* needs 2"),
        (
            [range(10), [range(2), range(1)], range(1)],
            "validation data hold 1 .*give each a weight",
        ),
        ([range(10), range(2), range(0)], "test data hold 0"),
    ],
)
def test_too_little_is_refused(datasets, message):
    with pytest.raises(ValueError, match=message):
        check(datasets, [10, 2, 1])
