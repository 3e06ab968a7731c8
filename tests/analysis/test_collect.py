"""Counts of a real forward pass, against one window at a time and plain loops."""

import copy
import os
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import scipy.stats
import torch

from megatron_dynmoe.analysis.counting import collect as collecting
from megatron_dynmoe.analysis.counting.collect import collect, shape_of
from megatron_dynmoe.analysis.counting.counts import (
    LOSS_UNIT,
    RoutingCounts,
    Shape,
    add_up,
    bag_of,
    expert_bins,
    loss_bins,
    loss_of_bin,
)
from megatron_dynmoe.analysis.counting.influences import PAIRS
from megatron_dynmoe.analysis.counting.measure import SweepWindows, sweep
from megatron_dynmoe.analysis.counting.tokens import letters_of
from megatron_dynmoe.analysis.counting.windows import TextFile, Window, read_windows
from megatron_dynmoe.analysis.results.statistics import spearman
from megatron_dynmoe.routing.select import choose

LENGTH = 32


@pytest.fixture(scope="module")
def windows(loaded: tuple[Any, Any], texts: dict[str, Path]) -> list[Window]:
    files = [TextFile(path, name) for name, path in texts.items()]
    return list(read_windows(files, loaded[1], LENGTH, limit=600))


def counted(model: Any, tokenizer: Any, windows: list[Window]) -> dict[str, RoutingCounts]:
    letters = letters_of(tokenizer, model.config.vocab_size)
    return collect(model, windows, shape_of(model.config, LENGTH), letters).groups


def as_json(groups: dict[str, RoutingCounts]) -> dict[str, Any]:
    return {name: counts.to_json() for name, counts in groups.items()}


def test_counts_are_those_of_one_window_at_a_time(
    loaded: tuple[Any, Any], windows: list[Window]
) -> None:
    model, tokenizer = loaded
    total = add_up(counted(model, tokenizer, windows))
    experts: Counter[int] = Counter()
    by_token: Counter[int] = Counter()
    position_LS = np.zeros((2, LENGTH), dtype=int)
    loss = 0.0
    for window in windows:
        tokens = torch.tensor([window.tokens])
        with torch.no_grad():
            output = model(tokens)
        counts_LT = output.experts_per_token[:, 0]
        experts.update(counts_LT.flatten().tolist())
        for token, number in zip(window.tokens, counts_LT.sum(0).tolist(), strict=True):
            by_token[token] += number
        position_LS[:, : len(window.tokens)] += counts_LT.numpy()
        loss += torch.nn.functional.cross_entropy(
            output.logits[0, :-1], tokens[0, 1:], reduction="sum"
        ).item()
    assert total.tokens == sum(len(window.tokens) for window in windows)
    assert {k: n for k, n in enumerate(total.experts_LK.sum(0)) if n} == dict(experts)
    assert {v: n for v, n in enumerate(total.vocab_experts_V) if n} == dict(by_token)
    assert np.array_equal(total.position_LS, position_LS)
    assert total.loss * LOSS_UNIT == pytest.approx(loss, rel=1e-5)
    assert total.vocab_loss_V.sum() == total.loss


def test_losses_are_paired_with_their_tokens(
    loaded: tuple[Any, Any], windows: list[Window]
) -> None:
    model, tokenizer = loaded
    pairs: dict[str, list[tuple[int, float]]] = {"own": [], "next": []}
    for window in windows:
        tokens = torch.tensor([window.tokens])
        with torch.no_grad():
            output = model(tokens)
        experts = output.experts_per_token[:, 0].sum(0).tolist()
        losses = torch.nn.functional.cross_entropy(
            output.logits[0, :-1], tokens[0, 1:], reduction="none"
        ).tolist()
        pairs["own"] += zip(experts[1:], losses, strict=True)
        pairs["next"] += zip(experts[:-1], losses, strict=True)
    total = add_up(counted(model, tokenizer, windows))
    for kind, table_BKN in (("own", total.own_loss_BKN), ("next", total.next_loss_BKN)):
        assert table_BKN.sum() == total.predicted
        experts, losses = (np.array(values) for values in zip(*pairs[kind], strict=True))
        expected = np.zeros(table_BKN.shape[1:], dtype=int)
        np.add.at(expected, (experts, loss_bins(losses / LOSS_UNIT)), 1)
        found_KN = table_BKN.sum(axis=0)
        assert abs(found_KN - expected).sum() <= 4  # rounding at the edge of a bin
        found = spearman(found_KN)
        assert found == pytest.approx(scipy.stats.spearmanr(experts, losses).statistic, abs=5e-3)
    assert (total.own_loss_BKN.sum(axis=(1, 2)) > 0).sum() > 5  # windows are dealt to bags


def test_tokens_are_in_the_bag_of_their_document(
    loaded: tuple[Any, Any], windows: list[Window]
) -> None:
    for group, counts in counted(*loaded, windows).items():
        own = [window for window in windows if window.group == group]
        expected: dict[str, Counter[int]] = {"own": Counter(), "next": Counter()}
        for window in own:
            bags = [bag_of(group, document) for document in window.documents]
            expected["own"].update(bags[1:])  # the first has no loss
            expected["next"].update(bags[:-1])  # the last predicts nothing
        for name, table_BKN in (("own", counts.own_loss_BKN), ("next", counts.next_loss_BKN)):
            tokens_B = table_BKN.sum(axis=(1, 2))
            assert {bag: n for bag, n in enumerate(tokens_B) if n} == dict(expected[name])
        assert counts.documents == len({i for window in own for i in window.documents})


def test_which_experts_are_those_of_the_router(
    loaded: tuple[Any, Any], windows: list[Window]
) -> None:
    model, tokenizer = loaded
    maps = []
    router = model.model.layers[2].mlp.router
    hook = router.register_forward_hook(lambda _m, _i, routing: maps.append(routing.map_TE))
    with torch.no_grad():
        for window in windows:
            model(torch.tensor([window.tokens]))
    hook.remove()
    map_TE = torch.cat(maps).long()
    total = add_up(counted(model, tokenizer, windows))
    assert np.array_equal(total.load_LE[1], map_TE.sum(0).numpy())
    assert np.array_equal(total.together_LEE[1], (map_TE.T @ map_TE).numpy())


@pytest.mark.parametrize("tokens_at_once", [1, 100, 100_000])
def test_the_size_of_a_block_changes_no_count(
    loaded: tuple[Any, Any],
    windows: list[Window],
    monkeypatch: pytest.MonkeyPatch,
    tokens_at_once: int,
) -> None:
    expected = add_up(counted(*loaded, windows))
    monkeypatch.setattr(collecting, "BLOCK_TOKENS", tokens_at_once)
    found = add_up(counted(*loaded, windows))
    for name in ("experts_LK", "total_K", "together_LEE", "vocab_experts_V", "vocab_word_V"):
        assert np.array_equal(getattr(found, name), getattr(expected, name)), name
    # Products of another number of rows round differently.
    assert found.loss == pytest.approx(expected.loss, rel=1e-6)


def test_every_bit_is_the_same_again_and_with_other_cores(
    loaded: tuple[Any, Any], windows: list[Window], monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = as_json(counted(*loaded, windows))
    monkeypatch.setattr(collecting, "BLOCK_TOKENS", 4096)
    for cores in ({0}, {0, 1, 2}):
        monkeypatch.setattr(os, "sched_getaffinity", lambda _, cores=cores: cores)
        assert as_json(counted(*loaded, windows)) == expected


def test_a_group_does_not_depend_on_the_others(
    loaded: tuple[Any, Any], windows: list[Window], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(collecting, "BLOCK_TOKENS", 7 * LENGTH)  # no group is a whole number of
    together = as_json(counted(*loaded, windows))
    mixed = sorted(windows, key=lambda window: window.number)
    assert as_json(counted(*loaded, mixed)) == together
    assert list(together) == ["prose", "figures"]
    for group, counts in together.items():
        alone = [window for window in windows if window.group == group]
        assert as_json(counted(*loaded, alone)) == {group: counts}


def test_counts_of_parts_add_up(loaded: tuple[Any, Any], windows: list[Window]) -> None:
    # Cut where a block ends, so that the same windows are read together.
    whole = add_up(counted(*loaded, windows))
    parts = RoutingCounts(whole.shape)
    cut = collecting.BLOCK_TOKENS // LENGTH
    for part in (windows[:cut], windows[cut:]):
        if part:
            parts += add_up(counted(*loaded, part))
    of_parts, of_whole = parts.to_json(), whole.to_json()
    for name in ("influence_DLCMQ", "influences_DPQQ"):  # each part counts frequencies anew
        del of_parts[name], of_whole[name]
    assert of_parts == of_whole


def test_influences_are_those_of_each_token(loaded: tuple[Any, Any], windows: list[Window]) -> None:
    """One token after another, without the tables of the counts."""
    model, tokenizer = loaded
    total = add_up(counted(model, tokenizer, windows))
    letters = letters_of(tokenizer, model.config.vocab_size)
    expected = np.zeros_like(total.influence_DLCMQ)
    between = np.zeros_like(total.influences_DPQQ)
    seen: dict[str, list[int]] = {}
    for window in windows:
        before = seen.setdefault(window.group, [])
        tokens = torch.tensor([window.tokens])
        with torch.no_grad():
            output = model(tokens)
        logs = output.logits[0].double().log_softmax(dim=-1)
        nats = [-(row.exp() * row).sum().item() for row in logs]
        for place in range(1, len(window.tokens) - 1):
            token, previous = window.tokens[place], window.tokens[place - 1]
            share = (before.count(token) + 0.5) / (len(before) + model.config.vocab_size / 2)
            lost = [-logs[at - 1, window.tokens[at]].item() for at in (place, place + 1)]
            starts = letters.after_space[token] or (
                letters.begin[token] and not letters.end[previous]
            )
            values = [
                *(int(12 * np.log2(1 + 32 * nat) / 4) for nat in (*lost, nats[place])),
                int((np.log2(share) + 24) / 24 * 32),
                place * 32 // LENGTH,
                int(starts),
            ]
            bag = bag_of(window.group, window.documents[place]) % 32
            for layer, experts in enumerate(output.experts_per_token[:, 0, place].tolist()):
                for influence, value in enumerate(values):
                    expected[bag, layer, influence, experts, value] += 1
            for pair, (one, other) in enumerate(PAIRS):
                between[bag, pair, values[one], values[other]] += 1
        before += window.tokens
    # A loss at the edge of two bins may fall on either side in float32.
    for found, wanted in ((total.influence_DLCMQ, expected), (total.influences_DPQQ, between)):
        assert found.sum() == wanted.sum() > 0
        assert np.abs(found - wanted).sum() <= 0.001 * wanted.sum()
    exact = [3, 4, 5]
    assert np.array_equal(total.influence_DLCMQ[:, :, exact], expected[:, :, exact])


def test_json_gives_the_counts_back(loaded: tuple[Any, Any], windows: list[Window]) -> None:
    counts = add_up(counted(*loaded, windows))
    content = counts.to_json()
    assert RoutingCounts.from_json(counts.shape, content).to_json() == content
    with pytest.raises(ValueError, match="incomplete"):
        RoutingCounts.from_json(counts.shape, {k: v for k, v in content.items() if k != "load_LE"})
    for changed, message in (
        ({"tokens": -5}, "tokens is -5: a count is a whole number"),
        ({"tokens": 1.5}, r"tokens is 1\.5"),
        ({"tokens": counts.tokens + 1}, "not what total_K adds up to"),
        (
            {"load_LE": content["load_LE"] | {"values": [-1] * 16}},
            "load_LE holds something that is not a count",
        ),
    ):
        with pytest.raises(ValueError, match=message):
            RoutingCounts.from_json(counts.shape, content | changed)
    with pytest.raises(ValueError, match="do not add up"):
        counts += RoutingCounts(counts.shape._replace(experts=9))


def test_a_router_of_nan_is_named(loaded: tuple[Any, Any], windows: list[Window]) -> None:
    broken = copy.deepcopy(loaded[0])
    with torch.no_grad():
        broken.model.layers[2].mlp.router.weight[3, 5] = float("nan")
    with pytest.raises(ValueError, match=r"router of layer 3 gives NaN.*'prose'"):
        counted(broken, loaded[1], windows)
    broken = copy.deepcopy(loaded[0])
    with torch.no_grad():
        broken.lm_head.weight[7] = float("inf")
    with pytest.raises(ValueError, match="output layer gives NaN"):
        counted(broken, loaded[1], windows)


def test_a_window_of_one_token_is_counted(loaded: tuple[Any, Any]) -> None:
    counts = counted(*loaded, [Window("a", 0, [5], [0])])["a"]
    assert (counts.tokens, counts.predicted, counts.total_K.sum()) == (1, 0, 1)


def test_a_map_that_the_model_did_not_use_is_refused(
    loaded: tuple[Any, Any], windows: list[Window], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(collecting, "choose", lambda probs_TE, *_: choose(probs_TE, 1.0))
    with pytest.raises(ValueError, match="not those that the model used"):
        counted(*loaded, windows)


def test_the_sweep_leaves_the_model_as_it_was(
    loaded: tuple[Any, Any], windows: list[Window]
) -> None:
    model, tokenizer = loaded
    before = copy.deepcopy(model.config.to_dict())
    letters = letters_of(tokenizer, model.config.vocab_size)
    swept = sweep(model, windows, shape_of(model.config, LENGTH), letters, [0.0, 0.5, 1.0])
    assert model.config.to_dict() == before
    few, some, all_of_them = (point["experts"] for point in swept["points"])
    assert (few, all_of_them) == (1.0, 8.0)
    assert 1 < some < 8
    own = add_up(counted(model, tokenizer, windows))
    assert swept["own"]["experts"] == own.load_LE.sum() / own.tokens / 2
    assert swept["own"]["threshold"] is None  # they differ by layer


@pytest.mark.parametrize(
    "routing",
    [
        {"threshold": 0.68},
        {"threshold": [0.9, 0.0, 0.95]},  # by layer; the second has no experts
        {"threshold": 0.03},
        {"threshold": 0.3},
        {"routing": "top_k", "num_experts_per_tok": 7, "weights": "raw"},
    ],
)
def test_the_default_sweep_surrounds_the_models_own_routing(
    loaded: tuple[Any, Any], windows: list[Window], routing: dict[str, Any]
) -> None:
    model, tokenizer = loaded
    config = model.config.to_dict()
    model.config.update({"routing": "top_p", "target_experts_per_token": None} | routing)
    try:
        letters = letters_of(tokenizer, model.config.vocab_size)
        swept = sweep(model, windows, shape_of(model.config, LENGTH), letters)
    finally:
        model.config.update(config)
    thresholds = [point["threshold"] for point in swept["points"]]
    assert thresholds == sorted(set(thresholds)) and thresholds[0] >= 0 and thresholds[-1] <= 1
    experts = [point["experts"] for point in swept["points"]]
    own = swept["own"]
    assert experts[0] < own["experts"] < experts[-1] or own["experts"] == experts[0] == 1
    if isinstance(own["threshold"], float):
        assert thresholds[0] < own["threshold"] < thresholds[-1]
    if routing == {"threshold": 0.3}:
        assert thresholds == [0.05, 0.1, 0.15, 0.2, 0.25, 0.3, 0.4, 0.5]


def test_the_sweep_takes_of_every_group() -> None:
    kept = SweepWindows(40)
    given = [Window(group, i, [1] * 10, [0] * 10) for group in "ab" for i in range(9)]
    assert list(kept.passing(given)) == given
    assert [(one.group, one.number) for one in kept.chosen()] == [
        *(("a", 0), ("b", 0), ("a", 1), ("b", 1))
    ]


def test_bins_keep_the_order() -> None:
    exact = expert_bins(Shape(6, 16, 1, 1))
    assert np.array_equal(exact, np.arange(97))
    many = expert_bins(Shape(48, 128, 1, 1))
    assert (np.diff(many[48:]) >= 0).all()
    assert many.max() < 256
    losses = np.array([0.0, 0.01, 0.1, 1.0, 3.0, 20.0]) / LOSS_UNIT
    bins = loss_bins(losses.round().astype(np.int64))
    assert (np.diff(bins) > 0).all()
    assert loss_of_bin(bins[3]) <= 1.0 < loss_of_bin(bins[3] + 1)
