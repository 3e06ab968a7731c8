"""A budget of experts per token: of a call, of each sequence, of a model and of a generation."""

import json

import pytest
import torch
from transformers import GenerationConfig
from transformers.generation.configuration_utils import ContinuousBatchingConfig

from megatron_dynmoe.huggingface import DynMoEForCausalLM, DynMoEModelConfig
from tests.huggingface.tiny import left_padded, tiny_config, tiny_model, tokens

CURVE = [
    {"experts_per_token": 1, "threshold": 0.0, "loss": None},
    {"experts_per_token": 2.0, "threshold": 0.3, "loss": 4.5},
    {"experts_per_token": 4.0, "threshold": 0.7, "loss": 4.25},
]
# Of each budget the threshold, by hand.
THRESHOLDS = {1: 0.0, 1.5: 0.15, 2: 0.3, 2.5: 0.4, 4: 0.7}
BUDGETS = [1, 4, 1.5, 2.5]
GREEDY = {"max_new_tokens": 6, "do_sample": False}
CLOSE = {"atol": 2e-5, "rtol": 1e-4}


def budget_model(**settings):
    """A model whose own threshold is none of the curve's."""
    return tiny_model(**{"threshold": 0.55, "budget_curve": CURVE} | settings)


def rows():
    """Sequences of different lengths, as a batch with padding, and each alone."""
    alone = [tokens(1, length, seed=length)[0] for length in (5, 9, 7, 8)]
    return alone, *left_padded(alone)


def at(threshold, ids, **given):
    """What a model computes whose own threshold is another: the oracle, which knows no budget."""
    return tiny_model(threshold=threshold)(ids, **given)


@pytest.mark.parametrize("given", [list, tuple, torch.tensor, "float64"])
def test_each_sequence_of_a_batch_is_as_if_alone_with_its_threshold(given):
    model, (alone, ids, mask) = budget_model(), rows()
    budgets = torch.tensor(BUDGETS).double() if given == "float64" else given(BUDGETS)
    with torch.no_grad():
        found = model(ids, attention_mask=mask, experts_per_token=budgets)
        for row, (sequence, budget) in enumerate(zip(alone, BUDGETS, strict=True)):
            expected = at(THRESHOLDS[budget], sequence[None])
            start = ids.shape[1] - len(sequence)
            counts = found.experts_per_token[:, row, start:]
            assert torch.equal(counts, expected.experts_per_token[:, 0])
            torch.testing.assert_close(found.logits[row, start:], expected.logits[0], **CLOSE)
    assert found.experts_per_token[:, 0, -5:].max() == 1 < found.experts_per_token[:, 1].max()


@pytest.mark.parametrize("budget", THRESHOLDS)
def test_one_budget_for_all(budget):
    model, ids = budget_model(), tokens(3, 8)
    expected = at(THRESHOLDS[budget], ids)
    for given in (budget, [budget] * 3, torch.tensor(budget), torch.tensor([budget] * 3)):
        found = model(ids, experts_per_token=given)
        assert torch.equal(found.logits, expected.logits)
        assert torch.equal(found.experts_per_token, expected.experts_per_token)
    model.set_budget(budget)
    assert torch.equal(model(ids).logits, expected.logits)
    assert torch.equal(model(ids, experts_per_token=4).logits, at(0.7, ids).logits)
    model.set_budget(None)
    assert torch.equal(model(ids).logits, at(0.55, ids).logits)


def test_a_threshold_by_layer_and_one_for_inference_give_way():
    ids, settings = tokens(2, 8), {"threshold": [0.2, 0.5, 0.9], "inference_threshold": 0.1}
    model = budget_model(**settings)
    assert torch.equal(model(ids, experts_per_token=2).logits, at(0.3, ids).logits)
    model.set_budget(2)
    assert torch.equal(model(ids).logits, at(0.3, ids).logits)
    assert model.train().config.threshold_and_cap(2, training=True) == (0.9, None)


def test_generation_with_a_budget_for_each_sequence():
    """Of a list, of a tensor, of a generation's config; then the next call has the model's own."""
    model, (alone, ids, mask) = budget_model(), rows()
    expected = torch.stack(
        [
            tiny_model(threshold=THRESHOLDS[budget]).generate(sequence[None], **GREEDY)[0, -6:]
            for sequence, budget in zip(alone, BUDGETS, strict=True)
        ]
    )
    own = model.generate(ids, attention_mask=mask, **GREEDY)[:, -6:]
    assert not torch.equal(own, expected)
    config = GenerationConfig(experts_per_token=BUDGETS, **GREEDY)
    for given in (
        {"experts_per_token": BUDGETS, **GREEDY},
        {"experts_per_token": torch.tensor(BUDGETS), **GREEDY},
        {"generation_config": config},
        {"experts_per_token": BUDGETS, "cache_implementation": "static", **GREEDY},
        {"experts_per_token": BUDGETS, "use_cache": False, **GREEDY},
    ):
        found = model.generate(ids, attention_mask=mask, **given)
        assert torch.equal(found[:, -6:], expected)
        assert torch.equal(model.generate(ids, attention_mask=mask, **GREEDY)[:, -6:], own)
    model.generation_config.experts_per_token = 4
    of_four = tiny_model(threshold=0.7).generate(ids, attention_mask=mask, **GREEDY)
    assert torch.equal(model.generate(ids, attention_mask=mask, **GREEDY), of_four)
    found = model.generate(ids, attention_mask=mask, experts_per_token=BUDGETS, **GREEDY)
    assert torch.equal(found[:, -6:], expected)
    model.set_budget(None)  # of whatever set it
    assert torch.equal(model.generate(ids, attention_mask=mask, **GREEDY)[:, -6:], own)


@pytest.mark.parametrize(
    "how",
    [
        {"num_beams": 3, "num_return_sequences": 2, "do_sample": False},
        {"num_return_sequences": 2, "do_sample": True, "top_k": 1},
    ],
)
def test_beams_and_samples_of_a_sequence_have_its_budget(how):
    model, ids = budget_model(), tokens(2, 7)
    found = model.generate(ids, experts_per_token=[1, 4], max_new_tokens=5, **how)
    expected = [
        tiny_model(threshold=threshold).generate(row[None], max_new_tokens=5, **how)
        for row, threshold in zip(ids, (0.0, 0.7), strict=True)
    ]
    assert torch.equal(found, torch.cat(expected))


@pytest.mark.parametrize("implementation", ["grouped_mm", "batched_mm"])
def test_with_a_cap_and_other_experts(implementation):
    model, ids = budget_model(max_experts_per_token=3), tokens(2, 9)
    exact = model(ids, experts_per_token=[1, 2.5])
    expected = [
        tiny_model(threshold=threshold, max_experts_per_token=3)(row[None])
        for row, threshold in zip(ids, (0.0, 0.4), strict=True)
    ]
    for row, one in enumerate(expected):
        assert torch.equal(exact.experts_per_token[:, row], one.experts_per_token[:, 0])
    model.set_experts_implementation(implementation)
    found = model(ids, experts_per_token=[1, 2.5])
    torch.testing.assert_close(found.logits, exact.logits, **CLOSE)
    assert torch.equal(found.experts_per_token, exact.experts_per_token)
    for call in (lambda: model(ids, experts_per_token=[1, 4]), lambda: model.set_budget(4)):
        with pytest.raises(ValueError, match="is 4, and no token may use more than 3"):
            call()


def test_gradients_with_recomputation():
    ids, budgets, losses = tokens(2, 8), [2, 4], []
    for recompute in (False, True):
        model = budget_model().train()
        if recompute:
            model.gradient_checkpointing_enable()
        loss = model(ids, labels=ids, experts_per_token=budgets, use_cache=False).loss
        loss.backward()
        gradients = [parameter.grad for parameter in model.parameters()]
        losses.append((loss.detach(), gradients))
    (plain, by_plain), (again, by_recomputing) = losses
    torch.testing.assert_close(again, plain)
    for one, other in zip(by_recomputing, by_plain, strict=True):
        torch.testing.assert_close(one, other)


def test_continuous_batching_has_one_budget_for_all():
    model, prompts = budget_model(eos_token_id=1), [tokens(1, 5)[0].tolist()]
    config = {"eos_token_id": 1, "pad_token_id": 0, **GREEDY}
    how = {"continuous_batching_config": ContinuousBatchingConfig(num_blocks=16)}
    budget = GenerationConfig(experts_per_token=2, **config)
    for given in (
        {"generation_config": budget},
        {"generation_config": GenerationConfig(**config), "experts_per_token": 2},
    ):
        with pytest.raises(ValueError, match="is 2, and continuous batching has one budget"):
            model.generate_batch(prompts, **given, **how)
    model.set_budget(1.5)
    found = model.generate_batch(prompts, generation_config=GenerationConfig(**config), **how)
    alone = tiny_model(threshold=0.15, eos_token_id=1).generate(torch.tensor(prompts), **GREEDY)
    assert [one.generated_tokens for one in found.values()] == alone[:, 5:].tolist()


def test_a_curve_and_a_budget_are_kept_in_the_folder(tmp_path):
    model, ids = budget_model(), tokens(1, 6)
    model.set_budget(2.5)
    model.save_pretrained(tmp_path)
    loaded = DynMoEForCausalLM.from_pretrained(tmp_path)
    assert loaded.config.budget_curve == CURVE
    torch.testing.assert_close(loaded(ids).logits, at(0.4, ids).logits)
    loaded.set_budget(None)
    torch.testing.assert_close(loaded(ids).logits, at(0.55, ids).logits)


NO_CURVE = "experts_per_token is 2, and the model has no budget_curve.*dynmoe calibrate"


@pytest.mark.parametrize(
    ("budgets", "said"),
    [
        (0.99, r"experts_per_token is 0.99, and .* goes from 1 to 4: use a number in.*calibrate"),
        (4.01, "experts_per_token is 4.01, and .* goes from 1 to 4"),
        (float("nan"), "experts_per_token is nan"),
        ("2", "experts_per_token is '2'"),
        (True, "experts_per_token is True"),
        ([1, None], "experts_per_token is None"),
        ([1, 5], "experts_per_token is 5"),
        ([1, 2, 4], "has 3 budgets, and the batch 2 sequences: give one number for all"),
        ([2], "has 1 budgets, and the batch 2"),
        ([], "has 0 budgets"),
        (torch.tensor([1.0, 7.0]), "experts_per_token is 7.0"),
        (torch.tensor([1.0, 2.0, 3.0]), "has 3 budgets"),
    ],
    ids=str,
)
def test_a_budget_that_cannot_be_honored_is_refused(budgets, said):
    model, ids = budget_model(), tokens(2, 4)
    for call in (
        lambda: model(ids, experts_per_token=budgets),
        lambda: model.generate(ids, experts_per_token=budgets, **GREEDY),
        lambda: model.generate(ids, experts_per_token=budgets, num_beams=3, **GREEDY),
    ):
        with pytest.raises(ValueError, match=said):
            call()
    assert model.config.inference_experts_per_token is None


@pytest.mark.parametrize("settings", [{}, {"routing": "top_k", "num_experts_per_tok": 2}], ids=str)
def test_without_a_curve_the_remedy_is_named(settings):
    ids, model = tokens(1, 4), tiny_model(**settings)
    for call in (
        lambda: model(ids, experts_per_token=2),
        lambda: model.generate(ids, experts_per_token=2, **GREEDY),
        lambda: model.set_budget(2),
    ):
        with pytest.raises(ValueError, match=NO_CURVE):
            call()
    assert model.generate(ids, experts_per_token=None, **GREEDY).shape == (1, 10)


def test_guidance_is_refused():
    with pytest.raises(ValueError, match=r"guidance_scale is 1.5.*set_budget"):
        budget_model().generate(tokens(1, 4), experts_per_token=2, guidance_scale=1.5, **GREEDY)


def changed(index, **values):
    return [point | values if i == index else point for i, point in enumerate(CURVE)]


@pytest.mark.parametrize(
    ("curve", "said"),
    [
        ([], r"budget_curve is \[\]: use a list of points"),
        (3, "budget_curve is 3"),
        ([3], r"budget_curve\[0\] is 3"),
        (changed(1, threshold=0.0), r"\[1\].threshold is 0.0, not above the 0.0 before it"),
        (changed(1, experts_per_token=1), r"\[1\].experts_per_token is 1, not above the 1"),
        (CURVE[::-1], r"budget_curve\[1\].experts_per_token is 2.0, not above the 4.0"),
        (changed(2, threshold=1.01), r"\[2\].threshold is 1.01: use 0 to 1"),
        (changed(2, threshold=float("nan")), r"\[2\].threshold is nan"),
        (changed(2, experts_per_token=9), r"\[2\].experts_per_token is 9: use 1 to 8"),
        (changed(0, experts_per_token=0.5), r"\[0\].experts_per_token is 0.5"),
        (changed(0, experts_per_token=True), r"\[0\].experts_per_token is True"),
        (changed(1, loss=float("inf")), r"\[1\].loss is inf: use a number from 0"),
        (changed(1, loss="low"), r"\[1\].loss is 'low'"),
        ([{"threshold": 0.1}], r"\[0\].experts_per_token is None"),
    ],
    ids=str,
)
def test_a_curve_that_makes_no_sense_is_refused(curve, said, tmp_path):
    with pytest.raises(ValueError, match=said):
        tiny_config(budget_curve=curve)
    tiny_config().save_pretrained(tmp_path)
    path = tmp_path / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"budget_curve": curve}))
    with pytest.raises(ValueError, match=said):
        DynMoEModelConfig.from_pretrained(tmp_path)


def test_a_config_with_a_budget_that_its_curve_lacks_is_refused():
    for settings, said in (
        ({"inference_experts_per_token": 2}, f"inference_{NO_CURVE}"),
        (
            {"inference_experts_per_token": 5, "budget_curve": CURVE},
            "inference_experts_per_token is 5, and .* goes from 1 to 4",
        ),
        (
            {"routing": "top_k", "num_experts_per_tok": 2, "budget_curve": CURVE},
            "budget_curve is .*'top_k' does not have",
        ),
    ):
        with pytest.raises(ValueError, match=said):
            tiny_config(**settings)


def test_a_curve_of_one_point_has_one_budget():
    model, ids = budget_model(budget_curve=CURVE[1:2]), tokens(1, 5)
    assert torch.equal(model(ids, experts_per_token=2).logits, at(0.3, ids).logits)
    with pytest.raises(ValueError, match="goes from 2 to 2"):
        model(ids, experts_per_token=2.1)
