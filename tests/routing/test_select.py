"""select and weigh, against Algorithm 1 written out in exact arithmetic."""

from fractions import Fraction

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from megatron_dynmoe.routing.select import select, weigh
from tests.oracles import routing as oracle

NUM_EXPERTS = (1, 2, 3, 8, 16, 64, 128, 512)
SHARPNESS = (0.01, 1.0, 5.0, 40.0)  # of the logits: from nearly uniform to nearly one-hot


def random_probs(num_experts: int, sharpness: float, dtype: torch.dtype) -> torch.Tensor:
    generator = torch.Generator().manual_seed(num_experts)
    rows = 8 + 512 // num_experts
    logits = torch.randn(rows, num_experts, generator=generator, dtype=torch.float64)
    return (logits * sharpness).to(dtype).softmax(-1)


def expected(probs: torch.Tensor, threshold: float, cap: int | None = None) -> torch.Tensor:
    """Algorithm 1 on ``probs`` without rounding."""
    limit = Fraction(torch.tensor(threshold, dtype=probs.dtype).item())
    rows = [[Fraction(prob) for prob in row] for row in probs.tolist()]
    choices = [oracle.algorithm_1(row, limit, cap) for row in rows]
    return oracle.map_of(choices, probs.shape[1])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("sharpness", SHARPNESS)
@pytest.mark.parametrize("num_experts", NUM_EXPERTS)
def test_random_rows_follow_algorithm_1(num_experts, sharpness, dtype):
    probs = random_probs(num_experts, sharpness, dtype)
    for threshold, cap in [(0.05, None), (0.4, None), (0.999, None), (0.77, 3)]:
        got, want = select(probs, threshold, cap), expected(probs, threshold, cap)
        assert torch.equal(got, want), f"threshold {threshold}, cap {cap}"


@pytest.mark.parametrize("num_experts", NUM_EXPERTS)
def test_float32_cumsum_agrees_away_from_the_threshold(num_experts):
    """What a simple implementation computes, wherever rounding cannot decide."""
    decided = total = 0
    for sharpness in SHARPNESS:
        probs = random_probs(num_experts, sharpness, torch.float32)
        sorted_probs, order = probs.sort(dim=-1, descending=True, stable=True)
        for threshold in (0.1, 0.4, 0.9):
            keep = sorted_probs.cumsum(-1) - sorted_probs <= threshold
            plain = torch.zeros_like(keep).scatter_(-1, order, keep)
            distance = (sorted_probs.double().cumsum(-1) - threshold).abs().amin(dim=-1)
            clear = distance > 1e-6
            assert torch.equal(select(probs, threshold)[clear], plain[clear])
            decided, total = decided + int(clear.sum()), total + len(clear)
    assert decided > 0.99 * total


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_sum_that_only_reaches_the_threshold_does_not_stop(dtype):
    row = [0.125, 0.5, 0.0625, 0.25, 0.0625]
    probs = torch.tensor([row, row], dtype=dtype)
    for threshold, experts in [
        (0.499, {1}),
        (0.5, {1, 3}),
        (0.75, {0, 1, 3}),
        (0.875, {0, 1, 2, 3}),  # the tie of experts 2 and 4 goes to the lower index
        (0.9375, {0, 1, 2, 3, 4}),
    ]:
        assert oracle.choices_of(select(probs, threshold)) == [experts, experts], threshold


@pytest.mark.parametrize("num_experts", NUM_EXPERTS)
def test_every_cumulative_sum_as_threshold(num_experts):
    """Exactly on the k-th sum, one expert more; a step of float64 below it, k experts."""
    probs = random_probs(num_experts, 1.0, torch.float64)[:1]
    units = (probs * 2**40).round()  # sums of these are exact in float64
    units[0, 0] += 2**40 - units.sum()
    probs = units / 2**40
    sums = probs.sort(descending=True).values.cumsum(-1)[0]
    for k, threshold in enumerate(sums[:-1], start=1):
        below = torch.nextafter(threshold, torch.tensor(0.0, dtype=torch.float64))
        assert select(probs, threshold).sum() == k + 1
        assert select(probs, below).sum() == k


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("num_experts", NUM_EXPERTS)
def test_uniform_rows(num_experts, dtype):
    probs = torch.full((1, num_experts), 1 / num_experts, dtype=dtype)
    for threshold in (0.0, 0.3, 0.5, 1 - 1 / num_experts):
        got = select(probs, threshold)
        assert torch.equal(got, expected(probs, threshold)), threshold
        count = int(got.sum())
        assert got[0, :count].all(), "ties go to the lowest indices"


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("num_experts", NUM_EXPERTS)
def test_one_hot_rows_select_one_expert_until_the_threshold_is_one(num_experts, dtype):
    probs = torch.eye(num_experts, dtype=dtype)
    for threshold in (0.0, 0.5, 0.9999):
        assert torch.equal(select(probs, threshold), probs.bool())
    assert select(probs, 1.0).all()


@pytest.mark.parametrize("sharpness", SHARPNESS)
@pytest.mark.parametrize("num_experts", NUM_EXPERTS)
def test_threshold_of_zero_selects_one_and_of_one_or_more_all(num_experts, sharpness):
    probs = random_probs(num_experts, sharpness, torch.float32)
    assert (select(probs, 0.0).sum(-1) == 1).all()
    assert (select(probs, 0.0).int().argmax(-1) == probs.argmax(-1)).all()
    for threshold in (1.0, 1.5, 1e30, float("inf")):
        assert select(probs, threshold).all()
        assert (select(probs, threshold, 2).sum(-1) == min(2, num_experts)).all()


@pytest.mark.parametrize("threshold", [-1e-9, -1.0, -1e30, float("-inf"), float("nan")])
def test_thresholds_that_no_controller_writes_still_select_one(threshold):
    assert (select(random_probs(16, 1.0, torch.float32), threshold).sum(-1) == 1).all()


def test_rows_of_nan_get_one_expert_and_leave_the_others_alone():
    probs = random_probs(16, 1.0, torch.float32)
    clean = select(probs, 0.6)
    probs[3] = torch.tensor([float("inf")] + [0.0] * 15).softmax(-1)
    assert probs[3].isnan().all()
    for threshold in (0.0, 0.6, 1.0):
        assert oracle.choices_of(select(probs, threshold)[3:4]) == [{0}]
    others = torch.arange(len(probs)) != 3
    assert torch.equal(select(probs, 0.6)[others], clean[others])
    assert weigh(probs, select(probs, 0.6), renormalize=True)[3].isnan().any()


def test_threshold_as_a_tensor_is_the_number_and_nothing_is_differentiated():
    probs = random_probs(8, 1.0, torch.float32).requires_grad_()
    threshold = torch.tensor([0.4], requires_grad=True)
    got = select(probs, threshold)
    assert torch.equal(got, select(probs, 0.4))
    assert got.dtype == torch.bool
    assert not got.requires_grad


def test_no_tokens_give_no_rows():
    assert select(torch.empty(0, 4), 0.5).shape == (0, 4)


@st.composite
def rows(draw, distinct: bool = False):
    """One row of float32 probabilities; ties are frequent unless ``distinct``."""
    elements = st.integers(1, 10_000 if distinct else 20)
    masses = draw(st.lists(elements, min_size=1, max_size=24, unique=distinct))
    return torch.tensor([masses], dtype=torch.float32) / sum(masses)


thresholds = st.floats(0, 1.125, width=32)
caps = st.one_of(st.none(), st.integers(1, 30))


@given(rows(), thresholds, caps)
def test_equals_algorithm_1(probs, threshold, cap):
    assert torch.equal(select(probs, threshold, cap), expected(probs, threshold, cap))


@pytest.mark.parametrize("cap", [None, 5, 40])
@pytest.mark.parametrize("sharpness", SHARPNESS)
@pytest.mark.parametrize("num_experts", (16, 64, 128, 512))
def test_whole_tensors_equal_a_stable_sort_with_ties_and_boundaries(num_experts, sharpness, cap):
    """Rows that need many sums and rows that need few; values that repeat; sums met exactly."""
    probs = random_probs(num_experts, sharpness, torch.float32)
    probs = torch.cat(
        [probs, (probs * 64).round() / 64, torch.full_like(probs[:2], 1 / num_experts)]
    )
    sums = probs.sort(dim=-1, descending=True).values.cumsum(-1)
    for threshold in (0.0, 0.3, 0.75, 0.9999, 1.0, *sums[1, :4].tolist(), *sums[-3, :4].tolist()):
        got = select(probs, threshold, cap)
        assert torch.equal(got, oracle.select_by_sort(probs, threshold, cap)), threshold


@given(rows(), thresholds, thresholds, caps)
def test_a_larger_threshold_never_drops_an_expert(probs, one, other, cap):
    fewer, more = (select(probs, threshold, cap) for threshold in sorted((one, other)))
    assert (fewer <= more).all()


@given(rows(), thresholds, caps)
def test_selected_experts_are_the_most_probable_with_ties_by_index(probs, threshold, cap):
    chosen = select(probs, threshold, cap)[0].tolist()
    order = sorted(range(len(chosen)), key=lambda e: (-probs[0, e].item(), e))
    ranked = [chosen[expert] for expert in order]
    assert ranked == sorted(ranked, reverse=True)


@given(rows(), thresholds, st.integers(1, 30))
def test_the_cap_cuts_and_changes_nothing_else(probs, threshold, cap):
    uncapped, capped = select(probs, threshold), select(probs, threshold, cap)
    assert (capped <= uncapped).all()
    assert capped.sum() == min(int(uncapped.sum()), cap)
    assert capped.sum() >= 1


@given(rows(distinct=True), thresholds, caps, st.randoms())
def test_permuting_experts_permutes_the_map(probs, threshold, cap, random):
    order = list(range(probs.shape[1]))
    random.shuffle(order)
    permuted = select(probs[:, order], threshold, cap)
    assert torch.equal(permuted, select(probs, threshold, cap)[:, order])


@pytest.mark.parametrize("renormalize", [False, True])
def test_weights_follow_the_loops(renormalize):
    probs = random_probs(8, 2.0, torch.float64)
    routing_map = select(probs, 0.6)
    got = weigh(probs, routing_map, renormalize)
    choices = oracle.choices_of(routing_map)
    want = [
        oracle.weights(row, choice, renormalize)
        for row, choice in zip(probs.tolist(), choices, strict=True)
    ]
    torch.testing.assert_close(got, torch.tensor(want, dtype=torch.float64))
    assert (got[~routing_map] == 0).all()
    if renormalize:
        torch.testing.assert_close(got.sum(-1), torch.ones(len(got), dtype=torch.float64))


@pytest.mark.parametrize("cap", [0, -1])
def test_a_cap_below_one_is_refused(cap):
    with pytest.raises(ValueError, match=f"max_experts is {cap}: a token uses at least 1"):
        select(torch.tensor([[0.7, 0.3]]), 0.5, cap)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_probabilities_of_half_precision_are_refused(dtype):
    with pytest.raises(ValueError, match="use float32 or float64"):
        select(torch.tensor([[0.7, 0.3]], dtype=dtype), 0.5)
