"""What is reported, against plain numpy on tokens drawn one by one."""

import math
import re
from types import SimpleNamespace
from unittest import mock

import numpy as np
import pytest
import torch

from megatron_dynmoe.settings.config import DynMoEConfig
from tests.moe import one_rank

pytestmark = pytest.mark.megatron

E = 4
CAP = 3
TOP_P = DynMoEConfig(routing="top_p").resolve(E)
BY_LAYER = DynMoEConfig(
    routing="dtop_p", target_experts_per_token=2, scope="layer", max_experts_per_token=CAP
).resolve(E)


@pytest.fixture(autouse=True)
def megatron():
    one_rank.world_of_one()
    yield
    one_rank.forget_global_state()


def random_maps(seed: int = 0) -> dict[int, np.ndarray]:
    """Routing maps [T, E] of the layers 1, 3 and 4; layer 2 has no experts."""
    random = np.random.default_rng(seed)
    maps = {}
    for layer in (1, 3, 4):
        maps[layer] = random.random((50, E)) < 0.2 * layer
        maps[layer][:, 0] |= ~maps[layer].any(axis=1)
    return maps


def add_map(counters, routing_map: torch.Tensor, cap: int | None) -> None:
    counters.add_counts(routing_map.sum(dim=0), routing_map.sum(dim=1), cap, None, torch.tensor(0))


def statistics_of(maps: dict[int, np.ndarray], num_layers: int = 4):
    """The reduced statistics, made as routers make them."""
    from megatron_dynmoe.routing.counters import RoutingCounters, RoutingStatistics, pack

    routers = {}
    for layer, routing_map in maps.items():
        counters = RoutingCounters(E, torch.device("cpu"))
        for micro_batch in np.array_split(routing_map, 2):
            add_map(counters, torch.from_numpy(micro_batch), CAP)
            counters.add_losses(torch.tensor(1.5 * layer), torch.tensor(0.25 * layer), 1)
        routers[layer] = counters, torch.tensor([layer / 10, layer / 20, 0]).split(1)
    return RoutingStatistics(pack(routers, num_layers, E, torch.device("cpu")))


def by_layer(values: dict[int, float]) -> list[float]:
    return pytest.approx([values.get(layer, math.nan) for layer in (1, 2, 3, 4)], nan_ok=True)


def test_summary_equals_numpy():
    from megatron_dynmoe.runs.metrics import summarize

    maps = random_maps()
    summary = summarize(statistics_of(maps))
    experts = {layer: routing_map.sum(axis=1) for layer, routing_map in maps.items()}
    pooled = np.concatenate(list(experts.values()))
    load = {layer: routing_map.sum(axis=0) for layer, routing_map in maps.items()}
    assert summary.experts_per_token == pytest.approx(pooled.mean())
    assert summary.std_experts_per_token == pytest.approx(pooled.std())
    assert summary.share_at_cap == pytest.approx((pooled == CAP).mean())
    assert summary.experts_per_token_by_layer == by_layer({n: e.mean() for n, e in experts.items()})
    assert summary.threshold_by_layer == by_layer({1: 0.05, 3: 0.15, 4: 0.2})
    assert summary.theta_by_layer == by_layer({1: 1.1, 3: 1.3, 4: 1.4})
    assert summary.threshold == pytest.approx(0.4 / 3)
    assert summary.balance_loss == pytest.approx(1.5 * 8 / 3)
    assert summary.dynamic_loss == pytest.approx(0.25 * 8 / 3)
    assert summary.max_over_mean_load == pytest.approx(
        max(n.max() / n.mean() for n in load.values())
    )
    loads = [n.max() / n.mean() for n in load.values()]
    assert summary.median_load == pytest.approx(np.median(loads))
    assert summary.high_load == pytest.approx(np.percentile(loads, 95))
    assert summary.max_violation == pytest.approx(np.mean(loads) - 1)
    assert summary.tokens == 50


def test_the_busiest_rank_is_reported_if_rows_travel():
    from megatron_dynmoe.runs.metrics import scalars, share_of_step_waiting, summarize

    alone = summarize(statistics_of(random_maps()))
    assert not alone.has_ranks and alone.rank_imbalance == 1
    # Of two layers, as a sum over two ranks.
    statistics = statistics_of(random_maps())
    for name, values in (("dispatches", [2, 4]), ("rows", [80, 40]), ("busiest_rows", [100, 50])):
        getattr(statistics, name)[[0, 2]] = torch.tensor(values, dtype=torch.float64)
    summary = summarize(statistics)
    assert summary.rank_imbalance == pytest.approx(150 / 120)
    assert summary.busiest_rank_rows == pytest.approx(150 / 6)
    written = dict(scalars(summary, TOP_P, 1))
    assert written["dynmoe/busiest_rank_experts_per_token"] == pytest.approx(
        summary.experts_per_token * 1.25
    )
    assert written["dynmoe/busiest_rank_rows"] == 25

    def flops(args, samples, experts):  # the routed experts do half of the work
        return samples * (summary.experts_per_token + experts)

    with mock.patch("megatron_dynmoe.runs.metrics.floating_point_operations", flops):
        # Of 1 + 1.25 units of time, 0.25 are waiting.
        assert share_of_step_waiting(None, summary) == pytest.approx(0.25 / 2.25)


def test_steps_and_ranks_add_up_before_anything_is_divided():
    """As a global batch that ramps up needs it: 50 tokens, then 20."""
    from megatron_dynmoe.runs.metrics import summarize

    one, other = random_maps(0), {n: m[:20] for n, m in random_maps(1).items()}
    together = {layer: np.concatenate([one[layer], other[layer]]) for layer in one}
    got = summarize(statistics_of(one) + statistics_of(other))
    want = summarize(statistics_of(together))
    assert got.experts_per_token == pytest.approx(want.experts_per_token)
    assert got.std_experts_per_token == pytest.approx(want.std_experts_per_token)
    assert got.max_over_mean_load == pytest.approx(want.max_over_mean_load)
    assert got.threshold == pytest.approx(want.threshold)
    assert got.balance_loss == pytest.approx(want.balance_loss)
    assert got.tokens == 70


def test_counting_a_token_on_several_ranks_changes_no_mean():
    """Tensor-parallel ranks that hold the same tokens: numerator and denominator grow alike."""
    from megatron_dynmoe.runs.metrics import summarize

    once = summarize(statistics_of(random_maps()))
    twice = summarize(statistics_of(random_maps()) + statistics_of(random_maps()))
    for name, value in once._asdict().items():
        if name != "tokens":
            assert getattr(twice, name) == pytest.approx(value, nan_ok=True), name


@pytest.mark.parametrize("num_layers", [1, 2])
def test_one_layer_and_one_expert(num_layers):
    from megatron_dynmoe.routing.counters import RoutingCounters, RoutingStatistics, pack
    from megatron_dynmoe.runs.metrics import summarize

    counters = RoutingCounters(1, torch.device("cpu"))
    add_map(counters, torch.ones(5, 1, dtype=torch.bool), None)
    routers = {1: (counters, torch.zeros(3).split(1))}
    packed = pack(routers, num_layers, 1, torch.device("cpu"))
    summary = summarize(RoutingStatistics(packed))
    assert summary.experts_per_token == summary.max_over_mean_load == 1
    assert summary.std_experts_per_token == summary.share_at_cap == 0
    assert summary.tokens == 5


def test_nothing_counted_gives_nan_and_no_error():
    from megatron_dynmoe.runs.metrics import summarize

    summary = summarize(statistics_of({}))
    assert math.isnan(summary.experts_per_token)
    assert math.isnan(summary.max_over_mean_load)
    assert all(math.isnan(value) for value in summary.experts_per_token_by_layer)


def test_large_counts_stay_exact():
    """A global batch of billions of tokens, beyond what float32 counts."""
    from megatron_dynmoe.routing.counters import RoutingCounters, RoutingStatistics, pack
    from megatron_dynmoe.runs.metrics import summarize

    counters = RoutingCounters(E, torch.device("cpu"))
    counters.sums.tokens.fill_(2**40 + 1)
    counters.sums.assignments.copy_(torch.tensor([2**40 + 1, 1, 0, 0]))
    packed = pack({1: (counters, torch.zeros(3).split(1))}, 1, E, torch.device("cpu"))
    assert RoutingStatistics(packed).assignments[0].tolist() == [2**40 + 1, 1, 0, 0]
    assert summarize(RoutingStatistics(packed)).experts_per_token == 1 + 1 / (2**40 + 1)


def test_names_written_are_those_that_the_routing_has():
    from megatron_dynmoe.runs.metrics import scalars, summarize

    summary = summarize(statistics_of(random_maps()))
    always = {
        f"dynmoe/{name}"
        for name in (
            "experts_per_token", "std_experts_per_token", "threshold", "balance_loss",
            "dynamic_loss", "max_over_mean_load", "max_over_mean_load_median",
            "max_over_mean_load_95th_percentile", "max_violation",
        )
    }  # fmt: skip
    layers = {f"dynmoe_layers/experts_per_token_layer_{n}" for n in (1, 3, 4)}
    assert set(dict(scalars(summary, TOP_P, 1))) == always | layers
    more = {f"dynmoe_layers/{name}_layer_{n}" for name in ("theta", "threshold") for n in (1, 3, 4)}
    written = dict(scalars(summary, BY_LAYER, 1))
    controlled = {"dynmoe/share_of_tokens_at_cap", "dynmoe/target_experts_per_token"}
    assert set(written) == always | layers | more | controlled
    assert written["dynmoe_layers/theta_layer_3"] == pytest.approx(1.3)
    assert all(value == value for value in written.values()), "layers without experts are left out"


def test_a_rule_without_a_knob_reports_no_threshold(monkeypatch):
    from megatron_dynmoe.moe.rules import RULES, TopP
    from megatron_dynmoe.runs.metrics import scalars, summarize
    from megatron_dynmoe.runs.tensorboard import tensorboard_layout

    class Fixed(TopP):
        knob = None

    monkeypatch.setitem(RULES, TOP_P.routing, Fixed)
    summary = summarize(statistics_of(random_maps()))
    assert "dynmoe/threshold" not in dict(scalars(summary, TOP_P, 1))
    assert "threshold" not in tensorboard_layout(TOP_P)["routing"]


def test_the_target_is_written_as_it_was_at_the_step():
    from megatron_dynmoe.runs.metrics import scalars, summarize

    summary = summarize(statistics_of(random_maps()))
    dynmoe = DynMoEConfig(routing="dtop_p", target_experts_per_token="0:4,2:2").resolve(E)
    targets = [
        dict(scalars(summary, dynmoe, step))["dynmoe/target_experts_per_token"]
        for step in (1, 2, 3, 9)
    ]
    assert targets == [4, 3, 2, 2]


def test_the_table_by_layer_marks_layers_without_experts():
    from megatron_dynmoe.runs.metrics import _layer_table, summarize

    summary = summarize(statistics_of(random_maps()))
    lines = _layer_table(summary, BY_LAYER).splitlines()
    assert [line.split(" by layer")[0].strip() for line in lines] == [
        "experts per token", "threshold", "theta",
    ]  # fmt: skip
    assert lines[2].split()[-4:] == ["1.100", "-", "1.300", "1.400"]
    assert len(_layer_table(summary, TOP_P).splitlines()) == 1


@pytest.fixture
def tracker(monkeypatch):
    """The tracker, with the few things of a training run that it asks for."""
    from megatron.core.transformer.moe.moe_logging import get_moe_metrics_tracker

    from megatron_dynmoe.runs import metrics

    args = SimpleNamespace(
        log_interval=2, tensorboard_log_interval=1, seq_length=10, eval_interval=4, train_iters=6
    )
    timer = SimpleNamespace(elapsed=lambda reset: 5.0)
    monkeypatch.setattr(metrics, "get_args", lambda: args)
    monkeypatch.setattr(metrics, "get_timers", lambda: lambda name: timer)
    monkeypatch.setattr(metrics, "get_current_global_batch_size", lambda: 3)
    monkeypatch.setattr(
        metrics, "floating_point_operations", lambda args, samples, experts: samples * 1e12
    )
    metrics.install_metrics_tracker(BY_LAYER)
    return get_moe_metrics_tracker()


def writer():
    written = []
    return SimpleNamespace(
        add_scalar=lambda name, value, iteration: written.append((iteration, name, value)),
        add_custom_scalars=lambda layout: written.append((None, "layout", layout)),
        add_figure=lambda name, figure, iteration: written.append((iteration, name, figure)),
        written=written,
    )


def report(tracker, iteration: int, **kwargs) -> str:
    return tracker.report(loss_scale=1.0, iteration=iteration, track_names=[], **kwargs)


def test_tracker_writes_each_step_and_reports_each_interval(tracker, capsys):
    from megatron_dynmoe.runs.metrics import summarize

    tensorboard = writer()
    first, second = statistics_of(random_maps(0)), statistics_of(random_maps(1))
    tracker.add(first)
    assert "experts per token" not in report(tracker, 1, writer=tensorboard)
    tracker.add(second)
    line = report(tracker, 2, writer=tensorboard)

    steps = [w for w in tensorboard.written if w[1] == "dynmoe/experts_per_token"]
    assert steps == [
        (1, "dynmoe/experts_per_token", summarize(first).experts_per_token),
        (2, "dynmoe/experts_per_token", summarize(second).experts_per_token),
    ]
    mean = summarize(first + second).experts_per_token
    assert f"experts per token: {mean:.4f} (target 2)" in line
    assert "tokens/s: 12 |" in line  # 2 steps of 3 samples of 10 tokens in 5 seconds
    assert "TFLOP/s from measured experts: 1.2 |" in line
    assert f"tokens at cap {CAP}: " in line
    assert "theta by layer" in capsys.readouterr().out

    tracker.add(first)
    report(tracker, 3)
    tracker.add(first)
    assert f"experts per token: {summarize(first).experts_per_token:.4f}" in report(tracker, 4)


@pytest.mark.parametrize("has_ranks", [False, True])
@pytest.mark.parametrize("dynmoe", [TOP_P, BY_LAYER], ids=["top_p", "layer, cap, drn"])
def test_tensorboard_groups_every_metric_and_no_other(tmp_path, dynmoe, has_ranks):
    """As its plugin reads the layout: each expression must match some tag, each tag of ours one."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    from tensorboard.plugins.custom_scalar.layout_pb2 import Layout
    from torch.utils.tensorboard import SummaryWriter

    from megatron_dynmoe.runs.metric_names import MEANINGS
    from megatron_dynmoe.runs.metrics import scalars, summarize
    from megatron_dynmoe.runs.tensorboard import tensorboard_layout

    with SummaryWriter(str(tmp_path)) as events:
        events.add_custom_scalars(tensorboard_layout(dynmoe, has_ranks))
    accumulator = EventAccumulator(str(tmp_path))
    accumulator.Reload()
    (tag,) = accumulator.Tags()["tensors"]
    content = accumulator.Tensors(tag)[0].tensor_proto.string_val[0]
    categories = Layout.FromString(content).category
    assert categories[0].title == "training"
    patterns = [
        tag for category in categories for chart in category.chart for tag in chart.multiline.tag
    ]
    statistics = statistics_of(random_maps())
    if has_ranks:
        statistics.dispatches.fill_(1)
    tags = {name for name, _ in scalars(summarize(statistics), dynmoe, 1)} | {
        "lm loss", "lm loss validation", "learning-rate", "grad-norm",
        "dynmoe/tokens_per_second", "dynmoe/tflops_per_second",
        "dynmoe/validation_experts_per_token", "dynmoe/validation_std_experts_per_token",
    }  # fmt: skip
    if has_ranks:
        tags.add("dynmoe/share_of_step_waiting")
    for pattern in patterns:
        assert any(re.match(pattern, tag) for tag in tags), f"{pattern} matches nothing"
    for tag in tags:
        assert sum(bool(re.match(pattern, tag)) for pattern in patterns) == 1, tag
    assert not any(re.match(pattern, "lm loss vs samples") for pattern in patterns)
    listed = {re.sub(r"_layer_\d+$", "_layer_N", tag) for tag in tags if tag.startswith("dynmoe")}
    assert listed <= MEANINGS.keys(), "docs/monitoring.md lists every name"


def test_layout_once_and_a_heat_map_at_each_evaluation_and_at_the_end(tracker):
    tensorboard = writer()
    for iteration in range(1, 7):
        tracker.add(statistics_of(random_maps(iteration)))
        report(tracker, iteration, writer=tensorboard)
    assert [name for _, name, _ in tensorboard.written].count("layout") == 1
    drawn = [w for w in tensorboard.written if w[1] == "dynmoe/experts_per_token_by_layer"]
    assert [iteration for iteration, _, _ in drawn] == [4, 6]
    (mesh,) = drawn[-1][2].axes[0].collections
    assert mesh.get_array().shape == (4, 3)  # 4 layers, 3 log intervals


def test_a_heat_map_that_fails_stops_no_training(tracker, capsys):
    def broken(*args):
        raise OSError("disk full")

    tensorboard = writer()
    tensorboard.add_figure = broken
    for iteration in range(1, 5):
        tracker.add(statistics_of(random_maps(iteration)))
        report(tracker, iteration, writer=tensorboard)
    assert "no heat map at iteration 4: disk full" in capsys.readouterr().out


def test_the_history_of_a_long_run_stays_small():
    from megatron_dynmoe.runs.drawing.curves import MAX_COLUMNS
    from megatron_dynmoe.runs.tensorboard import LayerHistory

    history = LayerHistory()
    assert history.draw() is None
    for iteration in range(1, 2 * MAX_COLUMNS + 1):
        history.add(iteration, [float(iteration), math.nan, 1.0])
    (mesh,) = history.draw().axes[0].collections
    values = mesh.get_array().reshape(3, -1)
    assert values.shape[1] == MAX_COLUMNS
    assert values[0][0] == 1.5 and values[2][-1] == 1.0
    assert values.mask[1].all()


def test_a_re_run_of_a_step_replaces_its_statistics(tracker):
    from megatron_dynmoe.runs.metrics import summarize

    once, again = statistics_of(random_maps(0)), statistics_of(random_maps(1))
    tracker.add(once)
    tracker.add(again)
    assert f"experts per token: {summarize(again).experts_per_token:.4f}" in report(tracker, 2)


def test_a_skipped_iteration_reports_nothing_new(tracker):
    assert "experts per token" not in report(tracker, 2, writer=(tensorboard := writer()))
    assert not tensorboard.written


def test_a_run_starts_with_a_tracker_of_its_own():
    from megatron.core.transformer.moe.moe_logging import get_moe_metrics_tracker

    from megatron_dynmoe.runs.metrics import install_metrics_tracker

    install_metrics_tracker(BY_LAYER)
    first = get_moe_metrics_tracker()
    install_metrics_tracker(TOP_P)
    assert get_moe_metrics_tracker() is not first
    assert get_moe_metrics_tracker().dynmoe is TOP_P


def test_flops_are_upstreams_formula_at_the_measured_number_of_experts():
    from argparse import ArgumentParser

    from megatron.training.arguments import add_megatron_arguments
    from megatron.training.training import num_floating_point_operations

    from megatron_dynmoe.runs.metrics import floating_point_operations

    parser = add_megatron_arguments(ArgumentParser(allow_abbrev=False))
    flags = (
        "--num-layers 2 --hidden-size 64 --num-attention-heads 4 --kv-channels 16 "
        "--ffn-hidden-size 128 --moe-ffn-hidden-size 128 --num-experts 8 --seq-length 32 "
        "--max-position-embeddings 32 --swiglu"
    )
    args = parser.parse_args(flags.split())
    args.padded_vocab_size = 512
    at = {}
    for k in (1, 2, 3):
        args.moe_router_topk = k
        at[k] = num_floating_point_operations(args, 4)
        assert floating_point_operations(args, 4, k) == at[k]
    assert at[1] < at[2] < at[3]
    assert floating_point_operations(args, 4, 2.5) == pytest.approx((at[2] + at[3]) / 2)
    assert args.moe_router_topk == 3, "the arguments stay as they are"
