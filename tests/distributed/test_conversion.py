"""Conversion of checkpoints that Megatron saved, and of what it makes of converted ones."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from megatron_dynmoe.conversion.formats import FORMATS
from megatron_dynmoe.layers.rules import LAYER_RULES
from tests.conversion.checkpoints import EXAMPLES
from tests.distributed.harness import DTOP_P, TINY, Case, Results, add
from tests.distributed.selection import matrix
from tests.distributed.test_resume import differences, is_model, tensors

pytestmark = [pytest.mark.distributed, pytest.mark.megatron]

CASES = "tests.distributed.conversion_cases"
STEPS = 3
TEXT = add(Case("text", flags="{dir}/text", entry=f"{CASES}:prepare_text"))
REAL_TEXT = (
    "--data-path {dir}/text_text_document --split 90,10,0 "
    "--tokenizer-type SentencePieceTokenizer --tokenizer-model {dir}/text.model"
)
# As many token ids as the tokenizer has: NullTokenizer adds one.
MOCK = "--mock-data --tokenizer-type NullTokenizer --vocab-size 503"
MODEL = (
    TINY.replace("--mock-data --tokenizer-type NullTokenizer --vocab-size 120", "")
    + f" --seq-length 64 --max-position-embeddings 64 --save-interval {STEPS}"
)
TOP_P = "--moe-dynamic-routing top_p --moe-dynamic-threshold 0.3"
TOP_K = "--moe-router-topk 2"
LAYOUTS = {
    "one": (1, ""),
    "ep2": (2, "--expert-model-parallel-size 2"),
    "pp2": (2, "--pipeline-model-parallel-size 2"),
    "pp2ep2": (4, "--pipeline-model-parallel-size 2 --expert-model-parallel-size 2"),
}
QWEN3 = (
    f"{TOP_K} --qk-layernorm --group-query-attention --num-query-groups 2 --kv-channels 12 "
    "--moe-layer-freq 2 --moe-ffn-hidden-size 40"
)
# Of each format, those of the routing that it can hold; models without experts are of one kind.
FLAGS = {
    name: {"dtop_p": DTOP_P, "top_p": TOP_P, "top_k": TOP_K}[EXAMPLES[name]["routing"]]
    for name in FORMATS
} | {"qwen3-moe": QWEN3, "llama": "", "qwen3": "--qk-layernorm --kv-channels 12"}
DENSE = ("llama", "qwen3")
# Layouts and formats do not know of each other, so these are tried in one layout only.
ONE_LAYOUT = {"qwen3-moe": "pp2ep2", "llama": "pp2", "qwen3": "one"}
# Everything that a checkpoint can differ in from the plain one, at once.
ODD = (
    f"{DTOP_P} --group-query-attention --num-query-groups 2 --add-qkv-bias --qk-layernorm "
    "--moe-shared-expert-intermediate-size 24 --moe-layer-freq 2 --kv-channels 12 "
    "--moe-ffn-hidden-size 40 --rotary-percent 0.5 --rotary-base 50000 --norm-epsilon 1e-6 "
    "--moe-dynamic-scope layer --moe-dynamic-max-experts-per-token 4"
)


def train(name: str, layout: str, flags: str, has_experts: bool = True) -> Case:
    """A few steps, saved."""
    num_ranks, layout_flags = LAYOUTS[layout]
    model = MODEL if has_experts else MODEL.replace("--num-experts 8", "")
    return add(
        Case(name, num_ranks, f"{model} {MOCK} {flags} {layout_flags} --save {{dir}}/{name}")
    )


def to_hf(origin: Case, name: str, flags: str) -> Case:
    """Its export."""
    flags = f"to-hf --quiet --load {{dir}}/{origin.name} --output {{dir}}/{name} {flags}"
    return add(Case(name, flags=flags, entry=f"{CASES}:convert", after=(origin,)))


def from_hf(origin: Case, name: str, flags: str = "") -> Case:
    """A checkpoint made of an export."""
    flags = f"from-hf --quiet --model {{dir}}/{origin.name} --save {{dir}}/{name} {flags}"
    return add(Case(name, flags=flags, entry=f"{CASES}:convert", after=(origin,)))


def round_trip(layout: str, format: str, flags: str, name: str | None = None) -> tuple[Case, ...]:
    """Training, export, back, and the export of that."""
    name = name or f"{layout}_{format}"
    trained = train(f"{name}_trained", layout, flags, has_experts=format not in DENSE)
    shards = "--max-shard-size 60KB"
    exported = to_hf(trained, f"{name}_hf", f"--format {format} {shards}")
    back = from_hf(exported, f"{name}_back")
    return trained, exported, back, to_hf(back, f"{name}_again", f"--format {format}")


TRIPS = {
    f"{format}, {layout}": round_trip(layout, format, flags)
    for format, flags in FLAGS.items()
    for layout in LAYOUTS
    if layout == ONE_LAYOUT.get(format, layout)
} | {
    "dynmoe, odd": round_trip("one", "dynmoe", f"{ODD} --swiglu", "odd"),
    "dynmoe, bf16": round_trip(
        "ep2", "dynmoe", f"{DTOP_P} --bf16 --use-distributed-optimizer", "bf16"
    ),
    "dynmoe, top-k": round_trip("one", "dynmoe", f"{TOP_K} --moe-router-pre-softmax", "raw_top_k"),
    "dynmoe, padded vocabulary": round_trip(
        "one", "dynmoe", f"{DTOP_P} --make-vocab-size-divisible-by 100", "padded"
    ),
}


OF_FOUR_RANKS = TRIPS["dynmoe, pp2ep2"]


def evaluate(origin: Case, flags: str) -> Case:
    """Megatron's own evaluation on real text, which writes down what it computed."""
    flags = (
        f"{MODEL} {REAL_TEXT} {flags} --load {{dir}}/{origin.name} --exit-on-missing-checkpoint "
        "--skip-train --eval-iters 1 --eval-interval 1 --micro-batch-size 8"
    )
    hooks = (f"{CASES}:computed",)
    return add(Case(f"{origin.name}_computed", flags=flags, hooks=hooks, after=(origin, TEXT)))


PARITY = {
    name: (TRIPS[trip], evaluate(TRIPS[trip][step], flags))
    for name, trip, step, flags in (
        ("dtop_p", "dynmoe, pp2ep2", 0, DTOP_P),
        ("dtop_p, after the round trip", "dynmoe, one", 2, DTOP_P),
        ("odd", "dynmoe, odd", 0, ODD),
        ("top_p", "dynamic-moe, ep2", 0, TOP_P),
        ("top_k", "mixtral, pp2", 0, TOP_K),
        ("qwen3-moe", "qwen3-moe, pp2ep2", 0, QWEN3),
        ("raw top_k", "dynmoe, top-k", 0, f"{TOP_K} --moe-router-pre-softmax"),
        ("bf16", "dynmoe, bf16", 0, f"{DTOP_P} --bf16"),
    )
}


def of_a_rule(rule: str) -> tuple[Case, Case]:
    """A training with a rule that only our format holds, exported; and its evaluation."""
    flags = f"--moe-dynamic-routing {rule} --moe-dynamic-target-experts-per-token 2"
    trained = train(f"rule_{rule}_trained", "one", flags)
    return to_hf(trained, f"rule_{rule}_hf", ""), evaluate(trained, flags)


OF_RULES = {rule: of_a_rule(rule) for rule in LAYER_RULES}
# The published layout has no code for this Transformers: its weights are looked at in ours.
OURS = {"top_p": to_hf(TRIPS["dynamic-moe, ep2"][0], "ep2_dynamic-moe_ours", "")}


def train_on(name: str, origin: Case, flags: str, layout: str = "one") -> Case:
    num_ranks, layout_flags = LAYOUTS[layout]
    flags = f"{MODEL} {MOCK} {flags} {layout_flags} --load {{dir}}/{origin.name}"
    flags += " --exit-on-missing-checkpoint"
    return add(Case(name, num_ranks, flags, after=(origin,)))


STARTED_FRESH = train_on("fresh", TRIPS["dynmoe, one"][0], f"{DTOP_P} --finetune")
TRAINED_ON = {
    layout: train_on(f"trained_on_{layout}", TRIPS["dynmoe, one"][2], DTOP_P, layout)
    for layout in LAYOUTS
}
REROUTED = from_hf(
    TRIPS["mixtral, one"][1], "rerouted", "--routing dtop_p --target-experts-per-token 3"
)
TRAINED_REROUTED = train_on(
    "trained_rerouted",
    REROUTED,
    "--moe-dynamic-routing dtop_p --moe-dynamic-target-experts-per-token 3",
)


def weights(folder: Path) -> dict[str, torch.Tensor]:
    """All tensors of a Hugging Face folder."""
    found: dict[str, torch.Tensor] = {}
    for file in sorted(folder.glob("*.safetensors")):
        found |= load_file(file)
    return found


def megatron_weights(folder: Path) -> dict[str, Any]:
    """The model's tensors of a checkpoint, as torch's own reader sees them."""
    (latest,) = [path for path in folder.iterdir() if path.is_dir()]
    return {name: tensor for name, tensor in tensors(latest).items() if is_model(name)}


@pytest.mark.parametrize(
    "trip",
    matrix(
        TRIPS,
        (
            *("dynmoe, pp2ep2", "dynamic-moe, ep2", "mixtral, pp2", "qwen3-moe, pp2ep2"),
            *("dynmoe, odd", "dynmoe, top-k", "dynmoe, padded vocabulary"),
        ),
    ),
)
def test_round_trips_are_exact(results: Results, trip: str) -> None:
    trained, exported, back, again = (results[case] for case in TRIPS[trip])
    directory = trained.directory
    before = megatron_weights(directory / trained.case.name)
    after = megatron_weights(directory / back.case.name)
    aliases = {name for name in after if "pre_mlp_layernorm" in name or "input_layernorm" in name}
    assert differences(before, {k: v for k, v in after.items() if k not in aliases}) == {}
    assert {name: x.dtype for name, x in before.items()} == {
        name: x.dtype for name, x in after.items() if name not in aliases
    }

    one, two = (weights(directory / result.case.name) for result in (exported, again))
    assert one.keys() == two.keys()
    assert all(torch.equal(one[key], two[key]) for key in one)
    files = [directory / result.case.name / "config.json" for result in (exported, again)]
    assert json.loads(files[0].read_text()) == json.loads(files[1].read_text())


def test_the_export_holds_what_training_held(results: Results) -> None:
    """Names, by hand: not by the tables that the converter goes by."""
    trained, exported, *_ = (results[case] for case in OF_FOUR_RANKS)
    before = megatron_weights(trained.directory / trained.case.name)
    after = weights(trained.directory / exported.case.name)
    assert len(after) == 3 + 4 * 10
    head, hidden = 8, 32
    for layer in range(4):
        prefix = f"model.layers.{layer}"
        qkv = before["decoder.layers.self_attention.linear_qkv.weight"][layer]
        q, k, v = qkv.view(4, 3, head, hidden).unbind(dim=1)
        for name, tensor in (("q", q), ("k", k), ("v", v)):
            found = after[f"{prefix}.self_attn.{name}_proj.weight"]
            assert torch.equal(found, tensor.reshape(hidden, hidden))
        for theirs, ours in (
            ("self_attention.linear_proj.weight", "self_attn.o_proj.weight"),
            ("self_attention.linear_qkv.layer_norm_weight", "input_layernorm.weight"),
            ("mlp.linear_fc1.layer_norm_weight", "post_attention_layernorm.weight"),
            ("mlp.router.weight", "mlp.router.weight"),
            ("mlp.router.theta_offset", "mlp.router.theta_offset"),
            ("mlp.experts.experts.linear_fc1.weight", "mlp.experts.gate_up_proj"),
            ("mlp.experts.experts.linear_fc2.weight", "mlp.experts.down_proj"),
        ):
            assert torch.equal(after[f"{prefix}.{ours}"], before[f"decoder.layers.{theirs}"][layer])
    assert torch.equal(after["lm_head.weight"], before["output_layer.weight"])
    config = json.loads((exported.directory / exported.case.name / "config.json").read_text())
    state = {
        "threshold": config["threshold"],
        "integral": config["controller"]["integral"],
        "measured": config["measured_experts_per_token"],
    }
    for name, values in state.items():
        saved = before[f"decoder.layers.mlp.router.{name}"].flatten()
        assert torch.equal(torch.tensor(values), saved), name
    offsets = before["decoder.layers.mlp.router.theta_offset"].flatten()
    assert torch.equal(torch.tensor(config["theta"]), 1 + offsets)
    assert offsets.abs().min() > 0 and min(state["integral"]) != 0


@pytest.mark.parametrize(
    "name",
    matrix(PARITY, PARITY.keys() - {"dtop_p, after the round trip", "bf16"}),
)
def test_the_exported_model_computes_what_training_computes(
    results: Results, name: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    from transformers import AutoModelForCausalLM

    import megatron_dynmoe.huggingface  # noqa: F401
    from megatron_dynmoe.huggingface import layers_dynmoe

    cases, evaluated = PARITY[name]
    result = results[evaluated].check()
    origin = result.case.after[0].name
    expected = torch.load(result.directory / f"{origin}.computed.pt")
    exported = OURS.get(name, cases[1])
    maps: list[torch.Tensor] = []
    forward = layers_dynmoe.DynMoERouter.forward

    def keep(router: Any, hidden: torch.Tensor) -> Any:
        routed = forward(router, hidden)
        if router.choice().threshold is not None:
            maps.append(routed.map_TE)
        return routed

    monkeypatch.setattr(layers_dynmoe.DynMoERouter, "forward", keep)
    model = AutoModelForCausalLM.from_pretrained(result.directory / results[exported].case.name)
    with torch.no_grad():
        output = model.eval()(expected["tokens"])
    B, S = expected["tokens"].shape

    # 1. The sets of experts: where they differ first, the sum all but equals the threshold
    differing_BS = torch.zeros(B, S, dtype=torch.bool)
    near = torch.zeros(B, S, dtype=torch.bool)
    thresholds = (
        [value for value in model.config.threshold or [] if value is not None] if maps else []
    )
    for probs, map_SBE, found, threshold in zip(
        expected["probs"], expected["maps"], maps, thresholds, strict=bool(maps)
    ):
        sums = probs.sort(dim=-1, descending=True).values.cumsum(-1)
        near |= ((sums - threshold).abs() < 1e-6).any(-1).T
        differing_BS |= (found.view(B, S, -1).transpose(0, 1) != map_SBE).any(-1).T
    clean_BS = differing_BS.cumsum(-1) == 0
    first_BS = differing_BS & (differing_BS.cumsum(-1) == 1)

    # 2. The logits up to there, and the next token
    difference = (output.logits.float() - expected["logits"].float()).abs().amax(-1)
    with capsys.disabled():
        print(
            f"\n  {name}: {B * S} tokens, {int(differing_BS.sum())} with other experts, "
            f"{int(near.sum())} within 1e-6 of the threshold; logits differ by at most "
            f"{difference[clean_BS].max():.1e} before any of them"
        )
    if name == "bf16":
        # Reported; routing is in float32 of activations that were rounded to 8 bits.
        assert model.dtype == torch.bfloat16
        assert difference.median() < 0.05
        return
    assert (near | ~first_BS).all()
    assert difference[clean_BS].max() < 1e-4
    same = output.logits.argmax(-1) == expected["logits"].argmax(-1)
    assert same[clean_BS].all()
    assert clean_BS.float().mean() > 0.9
    if maps:
        counts = torch.stack([chosen.sum(-1).T for chosen in expected["maps"]])
        assert torch.equal(output.experts_per_token[:, clean_BS], counts[:, clean_BS])
        assert counts.unique().numel() > 1


@pytest.mark.parametrize("rule", matrix(OF_RULES, ("expert_threshold",)))
def test_an_exported_rule_computes_what_training_computes(results: Results, rule: str) -> None:
    from transformers import AutoModelForCausalLM

    import megatron_dynmoe.huggingface  # noqa: F401

    exported, evaluated = OF_RULES[rule]
    result = results[evaluated].check()
    expected = torch.load(result.directory / f"{result.case.after[0].name}.computed.pt")
    model = AutoModelForCausalLM.from_pretrained(result.directory / results[exported].case.name)
    assert model.config.routing == rule
    with torch.no_grad():
        output = model.eval()(expected["tokens"])

    counts_LBS = torch.stack([chosen.sum(-1).T for chosen in expected["maps"]])
    assert counts_LBS.float().std() > 0.1, "every token has the same number of experts"
    # A score on its threshold may fall to either side, which changes all later tokens.
    differing_BS = (output.experts_per_token != counts_LBS).any(0)
    clean_BS = differing_BS.cumsum(-1) == 0
    assert clean_BS.float().mean() > 0.9
    difference = (output.logits - expected["logits"]).abs().amax(-1)
    assert difference[clean_BS].max() < 1e-4


def test_a_converted_checkpoint_trains_on_like_the_original(results: Results) -> None:
    fresh = results[STARTED_FRESH]
    assert results[TRAINED_ON["one"]].losses == fresh.losses
    assert results[TRAINED_ON["one"]].thresholds == fresh.thresholds
    for layout, case in TRAINED_ON.items():
        assert results[case].losses == pytest.approx(fresh.losses, rel=1e-5), layout


def test_a_top_k_model_trains_on_with_dynamic_routing(results: Results) -> None:
    result = results[TRAINED_REROUTED]
    assert result.losses[0] == pytest.approx(6, abs=0.5)  # ln 504 is 6.2
    assert result.experts_per_token[0] == pytest.approx(3, rel=0.15)
    assert result.thresholds[-1] != result.thresholds[0]  # it is steered
