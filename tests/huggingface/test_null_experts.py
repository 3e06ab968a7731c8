"""Null slots in models in plain PyTorch: against loops and LongCat's layer, and generation."""

import pytest
import torch

from megatron_dynmoe.routing.rules.null_experts import fill_slots
from tests.huggingface.test_model import tiny_model
from tests.oracles import null_experts as oracle
from tests.oracles.routing import moe as looped

SLOTS, NULLS, BIAS = 3, 6, 0.5


@pytest.mark.parametrize(
    ("kind", "weights"),
    [("zero", "renormalized"), ("identity", "renormalized"), ("identity", "raw")],
)
def test_a_layer_is_every_slot_in_a_loop(kind, weights):
    model = tiny_model(
        routing="null_experts",
        weights=weights,
        max_experts_per_token=SLOTS,
        router_state={"share": [[0.25]] * 3, "null_bias": [[0.0], [BIAS], [0.0]]},
        rule_settings={"null_slots": NULLS, "null_kind": kind},
    )
    moe, size = model.model.layers[1].mlp, model.config.moe_intermediate_size
    with torch.no_grad():
        moe.router.weight.mul_(4)  # so that logits differ by more than a rounding
        moe.router.weight[-1] *= 3
    hidden_BSD = torch.randn(2, 15, model.config.hidden_size)
    hidden_BSD[0, :5] = -hidden_BSD[0, 5:10]
    valid_BS = torch.ones(2, 15, dtype=torch.bool)
    valid_BS[1, 9:] = False
    with torch.no_grad():
        output_BSD, logits_BSL, counts_BS, loss = moe(hidden_BSD, valid_BS)
    assert logits_BSL.shape[-1] == 9 and loss.isfinite()

    def expert(index):
        gate_up, down = moe.experts.gate_up_proj[index], moe.experts.down_proj[index]
        return lambda x: (
            down @ (torch.nn.functional.silu(gate_up[:size] @ x) * (gate_up[size:] @ x))
        )

    hidden_TD, weights_TE, choices, residuals = hidden_BSD.flatten(0, 1), [], [], []
    with torch.no_grad():
        for hidden_D, valid in zip(hidden_TD, valid_BS.flatten().tolist(), strict=True):
            logits = (moe.router.weight @ hidden_D).unbind()
            chosen = oracle.choose(logits, BIAS, NULLS, SLOTS)
            probs = oracle.probabilities(logits, NULLS)
            of_experts, of_token = oracle.outputs(
                probs, chosen, 8, kind == "identity", weights == "renormalized"
            )
            weights_TE.append(of_experts)
            residuals.append(of_token * valid * hidden_D)
            choices.append({slot for slot in chosen if slot < 8} if valid else set())
        expected_TD = looped(hidden_TD, weights_TE, choices, [expert(e) for e in range(8)])
        expected_TD = expected_TD + torch.stack(residuals)
    assert counts_BS.flatten().tolist() == [len(choice) for choice in choices]
    counts = {len(choice) for choice in choices[:15]}
    assert 0 in counts and len(counts) > 2
    torch.testing.assert_close(output_BSD.flatten(0, 1), expected_TD, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("slots", [2, 4])
def test_raw_weights_and_copies_are_those_of_longcats_layer(slots):
    # Each null slot has gate rows of its own there; with equal rows and no bias both are the same.
    from transformers.models.longcat_flash.configuration_longcat_flash import LongcatFlashConfig
    from transformers.models.longcat_flash.modeling_longcat_flash import LongcatFlashMoE

    width, null_slots = 12, 5
    torch.manual_seed(0)
    config = LongcatFlashConfig(
        hidden_size=width,
        expert_ffn_hidden_size=4,
        n_routed_experts=8,
        zero_expert_num=null_slots,
        zero_expert_type="identity",
        moe_topk=slots,
        routed_scaling_factor=1.0,
    )
    theirs = LongcatFlashMoE(config)
    for parameter in theirs.parameters():
        torch.nn.init.normal_(parameter)
    classifier = theirs.router.classifier.weight.data
    classifier[8:] = classifier[8]
    inputs_TD = torch.randn(48, width)
    filled = fill_slots(
        inputs_TD @ classifier[:9].T,
        0.0,
        null_slots=null_slots,
        identity=True,
        max_experts=slots,
        renormalize=False,
    )
    output_TD = filled.residual_T.unsqueeze(-1) * inputs_TD
    for expert in range(8):
        gate, up = (inputs_TD @ theirs.experts.gate_up_proj[expert].T).chunk(2, dim=-1)
        hidden = theirs.experts.act_fn(gate) * up @ theirs.experts.down_proj[expert].T
        output_TD = output_TD + filled.weights_TE[:, expert : expert + 1] * hidden
    assert 0 < filled.map_TE.sum(-1).double().mean() < slots
    torch.testing.assert_close(output_TD, theirs(inputs_TD[None])[0], atol=1e-5, rtol=1e-4)


def test_a_model_generates_with_and_without_its_cache_alike():
    model = tiny_model(
        routing="null_experts",
        max_experts_per_token=SLOTS,
        router_state={"share": [[0.25]] * 3, "null_bias": [[0.0], [50.0], [-50.0]]},
        rule_settings={"null_slots": NULLS, "null_kind": "identity"},
    ).eval()
    prompt = torch.tensor([[3, 5, 7, 9]])
    counts = model(prompt).experts_per_token
    assert not counts[1].any() and (counts[2] == SLOTS).all()
    settings = {"max_new_tokens": 6, "do_sample": False}
    cached, alone = (model.generate(prompt, use_cache=use, **settings) for use in (True, False))
    assert torch.equal(cached, alone)


@pytest.mark.parametrize(
    ("rule", "message"),
    [
        (
            {"null_slots": 7, "null_kind": "zero"},
            "null_slots.* is 7: use .*at least the most slots",
        ),
        ({"null_slots": 8, "null_kind": "copy"}, "null_kind.* is 'copy': use zero or identity"),
        ({"null_slots": 4}, "rule_settings has null_slots, and routing 'null_experts' has null_k"),
    ],
)
def test_settings_that_the_rule_does_not_have_are_refused(rule, message):
    with pytest.raises(ValueError, match=message):
        tiny_model(
            routing="null_experts",
            router_state={"share": [[0.25]] * 3, "null_bias": [[0.0]] * 3},
            rule_settings=rule,
        )
