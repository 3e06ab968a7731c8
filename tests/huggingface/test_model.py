"""The Transformers model against Transformers' own models and against plain loops."""

import copy
from fractions import Fraction
from functools import partial

import pytest
import torch
import transformers
from transformers import (
    MixtralConfig,
    MixtralForCausalLM,
    Qwen2MoeConfig,
    Qwen2MoeForCausalLM,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)
from transformers.models.glm4_moe.modeling_glm4_moe import apply_rotary_pos_emb

from megatron_dynmoe.huggingface import layers_dynmoe
from tests.huggingface.tiny import LAYERS, left_padded, tiny_config, tiny_model, tokens
from tests.oracles import expert_threshold, relu
from tests.oracles import routing as oracle

SHAPE = {
    "vocab_size": 97,
    "hidden_size": 32,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 64,
    "rms_norm_eps": 1e-5,
    "rope_parameters": {"rope_type": "default", "rope_theta": 5000.0},
    "num_experts_per_tok": 2,
}
YARN = {
    "rope_parameters": {
        "rope_type": "yarn",
        "rope_theta": 5000.0,
        "factor": 2.0,
        "original_max_position_embeddings": 8,
    }
}
DENSE_SECOND = {"mlp_layer_types": ["sparse", "dense", "sparse"], "intermediate_size": 48}
# name: a model of Transformers, its settings, and what in ours gives the same function
REFERENCES = {
    "mixtral": (
        MixtralForCausalLM,
        MixtralConfig(**SHAPE, num_local_experts=8, intermediate_size=16),
        {},
    ),
    "mixtral_tied": (
        MixtralForCausalLM,
        MixtralConfig(**SHAPE, num_local_experts=8, intermediate_size=16, tie_word_embeddings=True),
        {"tie_word_embeddings": True},
    ),
    "mixtral_reading_further_than_it_was_trained": (
        MixtralForCausalLM,
        MixtralConfig(**(SHAPE | YARN), num_local_experts=8, intermediate_size=16),
        YARN,
    ),
    "qwen3_head_norms_and_a_dense_layer": (
        Qwen3MoeForCausalLM,
        Qwen3MoeConfig(
            **SHAPE,
            num_experts=8,
            moe_intermediate_size=16,
            intermediate_size=48,
            mlp_only_layers=[1],
            norm_topk_prob=True,
        ),
        {"qk_norm": True, **DENSE_SECOND},
    ),
    "qwen2_biases_shared_expert_and_raw_weights": (
        Qwen2MoeForCausalLM,
        Qwen2MoeConfig(
            **(SHAPE | {"head_dim": 8}),
            num_experts=8,
            moe_intermediate_size=16,
            shared_expert_intermediate_size=24,
            norm_topk_prob=False,
        ),
        {
            "attention_bias": True,
            "head_dim": 8,
            "shared_expert_intermediate_size": 24,
            "shared_expert_gate": True,
            "weights": "raw",
        },
    ),
}


@pytest.mark.parametrize("name", REFERENCES)
@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_top_k_gives_the_logits_of_transformers_own_model(name, attention):
    reference_class, reference_config, settings = REFERENCES[name]
    ours = tiny_model(attention=attention, routing="top_k", **(SHAPE | settings))
    reference = reference_class(reference_config).eval()
    theirs = {key.replace("mlp.router.", "mlp.gate."): v for key, v in ours.state_dict().items()}
    reference.load_state_dict(theirs)
    ids, mask = left_padded([tokens(1, length)[0] for length in (9, 5, 7)])
    # Their default positions count padding; ours do not.
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    with torch.no_grad():
        expected = reference(ids, attention_mask=mask, position_ids=positions).logits
        actual = ours(ids, attention_mask=mask).logits
    assert expected.abs().max() > 1  # the comparison is not one of zeros
    torch.testing.assert_close(actual[mask.bool()], expected[mask.bool()], atol=2e-5, rtol=1e-5)


def test_rotary_turns_pairs_of_the_first_part_of_a_head_as_complex_numbers():
    config = tiny_config(
        head_dim=12,
        rope_parameters={
            "rope_type": "default",
            "rope_theta": 100.0,
            "partial_rotary_factor": 2 / 3,
        },
    )
    values = torch.randn(1, 2, 5, 12, dtype=torch.float64)
    positions = torch.tensor([[0, 1, 2, 7, 50]])
    tables = layers_dynmoe.DynMoERotaryEmbedding(config).bfloat16()(torch.ones(1), positions)
    rotated, _ = apply_rotary_pos_emb(values, values, *tables)
    expected = values.clone()
    for index, position in enumerate(positions[0].tolist()):
        for pair in range(4):  # 8 of 12 entries, the first with the fifth and so on
            turn = torch.polar(
                torch.tensor(1.0, dtype=torch.float64),
                torch.tensor(position * 100.0 ** (-pair / 4), dtype=torch.float64),
            )
            number = torch.complex(values[0, :, index, pair], values[0, :, index, pair + 4]) * turn
            expected[0, :, index, pair] = number.real
            expected[0, :, index, pair + 4] = number.imag
    torch.testing.assert_close(rotated, expected, atol=1e-5, rtol=0)


ROUTINGS = {
    "top_p": {"routing": "top_p", "threshold": 0.5},
    "top_p_capped": {"routing": "top_p", "threshold": 0.9, "max_experts_per_token": 3},
    "per_layer": {"routing": "top_p", "threshold": [0.0, 1.0, 0.6]},
    "dtop_p": {"routing": "dtop_p", "threshold": 0.4, "theta": [1.5, 0.7, 2.0]},
    "top_k": {"routing": "top_k", "num_experts_per_tok": 3},
    "top_k_raw": {"routing": "top_k", "num_experts_per_tok": 3, "weights": "raw"},
    "shared": {"threshold": 0.5, "shared_expert_intermediate_size": 24},
    "seq_top_k": {
        "routing": "seq_top_k",
        "max_experts_per_token": 2,
        "router_state": {"score_threshold": [[0.1], [0.3], [0.2]]},
    },
    "expert_threshold": {
        "routing": "expert_threshold",
        "weights": "raw",
        "max_experts_per_token": 3,
        "rule_settings": {"threshold_decay": 0.99},
        "router_state": {
            "share": [[0.25]] * 3,
            "thresholds": [[0.1 * e - 0.2 * layer for e in range(8)] for layer in range(3)],
            "batches": [[7.0]] * 3,
        },
    },
    "relu": {
        "routing": "relu",
        "weights": "raw",
        "rule_settings": {"control_law": "pi"},
        "router_state": {"log10_lambda": [[-3.0]] * 3},
    },
}


def choices_by_oracle(config, layer, probs_TE):
    """Each token's experts, from exact sums of the very probabilities that the router has."""
    rows = [[float(prob) for prob in row] for row in probs_TE]
    if config.routing == "top_k":
        k = config.num_experts_per_tok
        return [set(sorted(range(len(r)), key=lambda e: (-r[e], e))[:k]) for r in rows]
    if config.routing == "seq_top_k":
        least = torch.tensor(config.router_state["score_threshold"][layer][0]).item()
        best = [sorted(range(len(r)), key=lambda e: (-r[e], e)) for r in rows]
        cap = config.max_experts_per_token
        return [{e for e in b[:cap] if r[e] > least} for b, r in zip(best, rows, strict=True)]
    if config.routing == "relu":  # the gates stand in place of probabilities
        return [{e for e, gate in enumerate(r) if gate > 0} for r in rows]
    if config.routing == "expert_threshold":  # and here the logits
        least = torch.tensor(config.router_state["thresholds"][layer]).tolist()
        cap = config.max_experts_per_token
        return [expert_threshold.choose(row, least, cap) for row in rows]
    threshold, cap = config.threshold_and_cap(layer, training=False)
    exact = Fraction(torch.tensor(threshold).item())  # the float32 nearest to the config's number
    return [
        oracle.algorithm_1([Fraction(p) for p in row], exact, cap)
        if exact < 1
        else set(range(len(row)))
        for row in rows
    ]


@pytest.mark.parametrize("name", ROUTINGS)
def test_a_moe_layer_is_the_papers_equations_token_by_token(name):
    """Choices exactly, output and gradients up to float32's rounding."""
    layer = 1
    model = tiny_model(**ROUTINGS[name])
    config, moe = model.config, model.model.layers[layer].mlp
    hidden_BSD = torch.randn(2, 15, config.hidden_size, requires_grad=True)
    output_BSD, logits_BSE, counts_BS, _ = moe(hidden_BSD, None, False)
    output_BSD.square().sum().backward()

    # The same in float64, one token and one expert at a time.
    moe64 = tiny_model(**ROUTINGS[name]).model.layers[layer].mlp.double()
    hidden_TD = hidden_BSD.detach().double().flatten(0, 1).requires_grad_()
    theta = moe64.router.theta_offset + 1 if config.normalization == "drn" else None
    probs = []
    for token in range(30):
        logits = list(moe64.router.weight @ hidden_TD[token])
        logits = logits if theta is None else oracle.normalize(logits, theta)
        if config.routing == "expert_threshold":
            of_token = [expert_threshold.sigmoid(logit) for logit in logits]
        else:
            of_token = relu.gates(logits) if config.routing == "relu" else oracle.softmax(logits)
        probs.append([prob.squeeze() for prob in of_token])
    logits_TE = logits_BSE.flatten(0, 1)
    of_logits = {"relu": torch.relu, "expert_threshold": torch.sigmoid}
    probs_TE = of_logits.get(config.routing, partial(torch.softmax, dim=-1))(logits_TE)
    torch.testing.assert_close(
        probs_TE.double(), torch.stack([torch.stack(row) for row in probs]), atol=1e-5, rtol=0
    )
    by_logit = config.routing == "expert_threshold"
    choices = choices_by_oracle(config, layer, logits_TE if by_logit else probs_TE)
    renormalize = config.weights == "renormalized"
    weights = [oracle.weights(row, c, renormalize) for row, c in zip(probs, choices, strict=True)]

    def expert(index):
        gate_up, down = moe64.experts.gate_up_proj[index], moe64.experts.down_proj[index]
        gate, up = gate_up[: config.moe_intermediate_size], gate_up[config.moe_intermediate_size :]
        return lambda x: down @ (torch.nn.functional.silu(gate @ x) * (up @ x))

    expected_TD = oracle.moe(hidden_TD, weights, choices, [expert(e) for e in range(8)])
    if moe64.shared_expert is not None:
        expected_TD = expected_TD + moe64.shared_expert(hidden_TD)
    expected_TD.square().sum().backward()

    assert counts_BS.flatten().tolist() == [len(choice) for choice in choices]
    close = {"atol": 2e-4, "rtol": 1e-4, "check_dtype": False}
    torch.testing.assert_close(output_BSD.flatten(0, 1), expected_TD, **close)
    torch.testing.assert_close(hidden_BSD.grad.flatten(0, 1), hidden_TD.grad, **close)
    for (parameter, ours), theirs in zip(moe.named_parameters(), moe64.parameters(), strict=True):
        if theirs.grad is None:  # theta does not change which experts top-k takes, but does weigh
            assert ours.grad is None, parameter
        else:
            torch.testing.assert_close(ours.grad, theirs.grad, **close, msg=parameter)


def test_the_routings_above_do_differ():
    counts = {
        name: tiny_model(**settings)(tokens(2, 30)).experts_per_token
        for name, settings in ROUTINGS.items()
    }
    assert len(counts["top_p"].unique()) > 2
    assert counts["top_p_capped"].max() == 3
    assert (counts["per_layer"][0] == 1).all() and (counts["per_layer"][1] == 8).all()
    assert len(counts["dtop_p"].unique()) > 2
    assert (counts["top_k"] == 3).all()
    assert counts["seq_top_k"].unique().tolist() == [0, 1, 2]
    assert counts["expert_threshold"].unique().tolist() == [0, 1, 2, 3]
    assert len(counts["relu"].unique()) > 4 and not (counts["relu"] == counts["top_p"]).all()


@pytest.mark.parametrize("router_dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"threshold": 0.4}, [0, 1, 2, 3]),  # 3/8 does not exceed 0.4
        ({"threshold": 0.5}, [0, 1, 2, 3, 4]),  # 4/8 does not exceed 0.5
        ({"threshold": 0.0}, [0]),
        ({"threshold": 1.0}, list(range(8))),
        ({"threshold": 1.0, "max_experts_per_token": 2}, [0, 1]),
        ({"routing": "top_k", "num_experts_per_tok": 3}, [0, 1, 2]),
    ],
)
def test_equal_probabilities_are_taken_by_index(settings, expected, router_dtype):
    model = tiny_model(router_dtype=router_dtype, **settings)
    router = model.model.layers[0].mlp.router
    torch.nn.init.zeros_(router.weight)
    routing = router(torch.randn(5, 32))
    assert oracle.choices_of(routing.map_TE) == [set(expected)] * 5


def test_the_threshold_is_read_at_every_forward():
    model, ids = tiny_model(threshold=0.1), tokens(2, 20)
    few = model(ids).experts_per_token
    model.config.threshold = [0.1, 0.9, 0.1]
    more = model(ids).experts_per_token
    assert torch.equal(few[0], more[0])
    assert more[1].sum() > few[1].sum()
    model.config.routing, model.config.num_experts_per_tok = "top_k", 2
    assert (model(ids).experts_per_token == 2).all()


def test_a_bfloat16_model_routes_in_float32():
    model = tiny_model(threshold=0.5).to(torch.bfloat16)
    seen = []
    for layer in model.model.layers:
        layer.mlp.router.register_forward_hook(lambda *call: seen.append(call[1:]))
    outputs = model(tokens(2, 40), output_router_logits=True)
    assert outputs.logits.dtype == torch.bfloat16
    rounded = 0
    for layer, ((hidden_TD,), routing) in enumerate(seen):
        weight = model.model.layers[layer].mlp.router.weight
        assert hidden_TD.dtype == weight.dtype == torch.bfloat16
        exact_TE = hidden_TD.double() @ weight.double().t()
        assert outputs.router_logits[layer].dtype == torch.float32
        torch.testing.assert_close(routing.logits_TE.double(), exact_TE, atol=1e-4, rtol=0)
        choices = choices_by_oracle(model.config, layer, routing.probs_TE)
        assert oracle.choices_of(routing.map_TE) == choices
        rounded += (routing.logits_TE != routing.logits_TE.bfloat16()).sum()
    assert rounded > 0


@pytest.mark.parametrize("router_dtype", ["float32", "bfloat16"])
def test_the_experts_of_a_bfloat16_model_are_summed_in_float32(router_dtype):
    moe = tiny_model(threshold=1.0, router_dtype=router_dtype).bfloat16().model.layers[0].mlp
    hidden_TD = torch.randn(20, 32).bfloat16()
    routing = moe.router(hidden_TD)
    expected_TD = torch.zeros(20, 32)
    for expert in range(8):
        gate, up = (hidden_TD @ moe.experts.gate_up_proj[expert].t()).chunk(2, dim=-1)
        rows = (torch.nn.functional.silu(gate) * up) @ moe.experts.down_proj[expert].t()
        expected_TD += (rows * routing.weights_TE[:, expert, None]).float()
    for ids_TK, weights in ((None, routing.weights_TE), routing.slots()):
        assert torch.equal(moe.experts(hidden_TD, ids_TK, weights), expected_TD.bfloat16())


def test_a_router_in_bfloat16_compares_with_the_unrounded_threshold():
    """0.4 is 0.400390625 in bfloat16, which a sum of bfloat16 probabilities can equal."""
    model = tiny_model(threshold=0.4, router_dtype="bfloat16")
    router = model.model.layers[0].mlp.router
    # probabilities of 0.400390625, and 0.599609375 shared by the others
    with torch.no_grad():
        router.weight.zero_()
        router.weight[0, 0] = torch.tensor(0.400390625 / 0.599609375 * 7).log()
    hidden_TD = torch.zeros(1, 32)
    hidden_TD[0, 0] = 1
    routing = router(hidden_TD)
    assert routing.probs_TE.dtype == torch.bfloat16
    assert routing.probs_TE[0, 0].item() == 0.400390625
    assert oracle.choices_of(routing.map_TE) == [{0}]


GENERATE = {"max_new_tokens": 8, "do_sample": False}


@pytest.mark.parametrize(
    ("attention", "routing"),
    [
        *(("eager", "top_p"), ("sdpa", "top_p"), ("sdpa", "seq_top_k"), ("eager", "relu")),
        ("sdpa", "expert_threshold"),
    ],
)
def test_cached_steps_give_the_logits_and_counts_of_one_forward(attention, routing):
    model, ids = tiny_model(attention=attention, **ROUTINGS[routing]), tokens(2, 12)
    with torch.no_grad():
        whole = model(ids)
        cache, logits, counts = None, [], []
        for start, end in [(0, 5), (5, 6), (6, 10), (10, 12)]:  # a prompt, one token, chunks
            step = model(ids[:, start:end], past_key_values=cache, use_cache=True)
            cache = step.past_key_values
            logits.append(step.logits)
            counts.append(step.experts_per_token)
    # ReLU's gates do not sum to 1: what they weigh is larger, and rounds in larger steps.
    size = 10 if routing == "relu" else 1
    torch.testing.assert_close(
        torch.cat(logits, dim=1), whole.logits, atol=size * 1e-5, rtol=size * 1e-5
    )
    assert torch.equal(torch.cat(counts, dim=-1), whole.experts_per_token)


@pytest.mark.parametrize("routing", ["top_p", "seq_top_k", "expert_threshold", "relu"])
def test_generation_with_and_without_a_cache_is_the_same(routing):
    model, ids = tiny_model(**ROUTINGS[routing]), tokens(2, 6)
    cached = model.generate(ids, **GENERATE)
    assert cached.shape == (2, 14)
    assert torch.equal(cached, model.generate(ids, use_cache=False, **GENERATE))
    # step by step with the whole text, which no cache can spoil
    expected = ids
    for _ in range(8):
        following = model(expected, use_cache=False).logits[:, -1].argmax(-1, keepdim=True)
        expected = torch.cat((expected, following), dim=1)
    assert torch.equal(cached, expected)


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("how", [{}, {"num_beams": 3}], ids=["greedy", "beams"])
def test_a_padded_batch_generates_what_each_row_does_alone(attention, how):
    model = tiny_model(attention=attention, threshold=0.5)
    rows = [tokens(1, length, seed=length)[0] for length in (3, 9, 6)]
    ids, mask = left_padded(rows)
    together = model.generate(ids, attention_mask=mask, **GENERATE, **how)
    for row, continued in zip(rows, together, strict=True):
        alone = model.generate(row.unsqueeze(0), **GENERATE, **how)[0]
        assert torch.equal(continued[-8:], alone[-8:])


def test_positions_count_from_the_first_token_of_a_row():
    model = tiny_model(threshold=0.5)
    ids, mask = left_padded([tokens(1, 4)[0], tokens(1, 7)[0]])
    positions = torch.tensor([[0, 0, 0, 0, 1, 2, 3], [0, 1, 2, 3, 4, 5, 6]])
    with torch.no_grad():
        counted = model(ids, attention_mask=mask, use_cache=True)
    given = model(ids, attention_mask=mask, position_ids=positions)
    assert torch.equal(counted.logits, given.logits)
    # and on from there with the cache
    following, mask = tokens(2, 2), torch.cat((mask, torch.ones(2, 2, dtype=mask.dtype)), dim=1)
    caches = copy.deepcopy(counted.past_key_values), counted.past_key_values
    positions = None, torch.tensor([[4, 5], [7, 8]])
    logits = [
        model(following, attention_mask=mask, position_ids=ids, past_key_values=cache).logits
        for ids, cache in zip(positions, caches, strict=True)
    ]
    assert torch.equal(*logits)


def test_padding_takes_part_in_nothing():
    model = tiny_model(threshold=0.5)
    rows = [tokens(1, length, seed=length)[0] for length in (4, 9)]
    ids, mask = left_padded(rows)
    alone = [model(row.unsqueeze(0)) for row in rows]
    padded = model(ids, attention_mask=mask)
    other_ids = torch.where(mask.bool(), ids, 50)
    other = model(other_ids, attention_mask=mask)
    for index, row in enumerate(rows):
        ours = padded.logits[index, -len(row) :]
        torch.testing.assert_close(ours, alone[index].logits[0], atol=1e-5, rtol=1e-5)
        counts = padded.experts_per_token[:, index]
        assert torch.equal(counts[:, -len(row) :], alone[index].experts_per_token[:, 0])
    assert (padded.experts_per_token[:, ~mask.bool()] == 0).all()
    assert padded.logits.isfinite().all()
    assert torch.equal(padded.logits[mask.bool()], other.logits[mask.bool()])


def test_beams_find_a_text_at_least_as_probable():
    model, ids = tiny_model(threshold=0.5), tokens(1, 6)

    def log_probability(text):
        log_probs = torch.log_softmax(model(text).logits[0, 5:-1], dim=-1)
        return log_probs.gather(-1, text[0, 6:, None]).sum()

    greedy = model.generate(ids, **GENERATE)
    beams = model.generate(ids, num_beams=20, **GENERATE)
    assert not torch.equal(greedy, beams)
    assert log_probability(beams) > log_probability(greedy)


def test_sampling_is_repeatable_and_varies_with_the_seed():
    model, ids = tiny_model(threshold=0.5), tokens(2, 6)
    texts = []
    for seed in (1, 1, 2):
        transformers.set_seed(seed)
        texts.append(model.generate(ids, max_new_tokens=12, do_sample=True, top_k=20))
    assert torch.equal(texts[0], texts[1])
    assert not torch.equal(texts[0], texts[2])


def test_inference_settings_hold_in_generation_only():
    model = tiny_model(threshold=0.1, inference_threshold=1.0, inference_max_experts_per_token=2)
    assert (model(tokens(1, 9)).experts_per_token == 2).all()
    assert (model.train()(tokens(1, 9)).experts_per_token == 1).any()


def test_eager_and_sdpa_agree_and_eager_shows_its_attention():
    ids, mask = left_padded([tokens(1, 5)[0], tokens(1, 9)[0]])
    eager = tiny_model(attention="eager", threshold=0.5)
    sdpa = tiny_model(attention="sdpa", threshold=0.5)
    shown = eager(ids, attention_mask=mask, output_attentions=True, output_hidden_states=True)
    valid_BS = mask.bool()
    fast = sdpa(ids, attention_mask=mask).logits
    torch.testing.assert_close(shown.logits[valid_BS], fast[valid_BS], atol=1e-5, rtol=1e-5)
    assert len(shown.attentions) == LAYERS
    attention = shown.attentions[0].transpose(1, 2)[valid_BS]  # [valid tokens, N, K]
    torch.testing.assert_close(attention.sum(-1), torch.ones_like(attention[..., 0]))
    places = torch.arange(9).expand(2, -1)[valid_BS]
    assert (attention[torch.arange(9) > places[:, None, None].expand_as(attention)] == 0).all()
    assert (attention[:5, :, :4] == 0).all()  # nobody sees the padding of the first row
    assert len(shown.hidden_states) == LAYERS + 1
    torch.testing.assert_close(eager.lm_head(shown.hidden_states[-1]), shown.logits)
    with pytest.raises(ValueError, match="attn_implementation='eager'"):
        sdpa(ids, output_attentions=True)


def test_outputs_have_the_promised_shapes():
    settings = {"mlp_layer_types": ["sparse", "dense", "sparse"], "intermediate_size": 48}
    model, ids = tiny_model(**settings), tokens(2, 7)
    plain = model(ids)
    assert plain.loss is None and plain.aux_loss is None and plain.router_logits is None
    assert plain.experts_per_token.shape == (2, 2, 7)
    assert plain.experts_per_token.dtype == torch.int64
    full = model(ids, labels=ids, output_router_logits=True, logits_to_keep=0)
    assert [logits.shape for logits in full.router_logits] == [(2, 7, 8)] * 2
    assert full.loss.shape == full.aux_loss.shape == ()
    assert model(ids, logits_to_keep=2).logits.shape == (2, 2, 97)
    torch.testing.assert_close(model(ids, logits_to_keep=2).logits, plain.logits[:, -2:])
    as_tuple = model(ids, return_dict=False)
    assert torch.equal(as_tuple[0], plain.logits)
    embedded = model(inputs_embeds=model.get_input_embeddings()(ids))
    assert torch.equal(embedded.logits, plain.logits)


def test_a_model_without_experts_runs_too():
    model = tiny_model(
        routing="top_k", num_experts=0, mlp_layer_types=["dense"] * 3, intermediate_size=48
    )
    ids = tokens(2, 7)
    outputs = model(ids, labels=ids)
    assert outputs.experts_per_token.numel() == 0
    assert outputs.aux_loss is None and outputs.loss.isfinite()


@pytest.mark.parametrize(
    ("inputs", "said"),
    [
        ({}, "input_ids and inputs_embeds"),
        ({"input_ids": tokens(1, 4), "attention_mask": torch.ones(1, 3)}, r"\(1, 3\)"),
    ],
)
def test_inputs_that_do_not_fit_are_refused(inputs, said):
    with pytest.raises(ValueError, match=said):
        tiny_model()(**inputs)
