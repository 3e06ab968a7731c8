"""What the host reads from tensors without values."""

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from megatron_dynmoe.dry_run.devices import known


class Following(TorchDispatchMode):
    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        known.follow(func, args, kwargs or {}, result)
        return result


@pytest.fixture(autouse=True)
def fake():
    with FakeTensorMode(allow_non_fake_inputs=True), Following():
        yield


def values(tensor):
    value = known.value_of(tensor)
    return None if value is None else value.tolist()


def test_numbers_of_python_are_known_through_views_and_copies():
    numbers = torch.tensor([[1, 2, 3], [4, 5, 6]])
    assert values(numbers.T.ravel()) == [1, 4, 2, 5, 3, 6]
    assert values(numbers[1, 2:].to(torch.float64).unsqueeze(0)) == [[6.0]]
    assert values(torch.arange(6).reshape(2, 3).T.ravel()) == [0, 3, 1, 4, 2, 5]


def test_the_host_computes_with_what_it_knows():
    counts = torch.tensor([2, 0, 1])
    assert values((counts == 0).any()) is True and values(counts.sum()) == 3
    assert values(counts + torch.empty(3)) is None


def test_what_is_changed_in_place_is_forgotten():
    steps = torch.tensor([1.0, 2.0])
    steps.add_(1)
    assert values(steps) is None
    assert values(steps.fill_(7)) == [7.0, 7.0]


def test_what_is_not_known_takes_the_way_that_costs_most():
    assert known.number_in(torch.empty((), dtype=torch.bool)) is False  # nothing is NaN
    assert known.number_in(torch.empty((), dtype=torch.int64)) == 0  # no token is bad
    assert known.number_in(torch.empty(())) > 1000  # a norm that is clipped


def test_large_tensors_are_not_kept():
    assert values(torch.arange(known.LARGEST)) is not None
    assert values(torch.arange(known.LARGEST + 1)) is None


@pytest.mark.parametrize(("total", "parts"), [(7, 3), (6, 3), (2, 5), (0, 1)])
def test_split(total, parts):
    shares = known.split(total, parts)
    assert len(shares) == parts and shares.sum() == total and max(shares) - min(shares) <= 1
