"""Which back end is chosen, and what is refused or kept from upstream."""

import pytest
import torch

from tests.backends.model import config

pytestmark = pytest.mark.megatron


def choose_parts(backend, model, **given):
    """The back end of a model's parts, as if the flag says ``backend``."""
    from megatron_dynmoe.backends import choice

    return choice.choose_parts(choice.choose_backend(backend, None), model, **given)


@pytest.mark.parametrize(
    ("backend", "transformer_impl", "has_te", "expected"),
    [
        ("auto", None, False, "torch_native"),
        ("auto", "local", False, "torch_native"),
        ("auto", None, True, "transformer_engine"),
        ("auto", "transformer_engine", True, "transformer_engine"),
        ("auto", "local", True, "torch_native"),
        ("auto", "inference_optimized", True, "inference_optimized"),
        ("local", None, True, "local"),
        ("local", "local", True, "local"),
        ("torch_native", None, True, "torch_native"),
        ("torch_native", "local", True, "torch_native"),
        ("transformer_engine", None, True, "transformer_engine"),
        ("transformer_engine", "local", True, "leave --transformer-impl out"),
        ("local", "transformer_engine", True, "leave --transformer-impl out"),
        ("torch_native", "transformer_engine", True, "leave --transformer-impl out"),
        ("transformer_engine", None, False, "not installed"),
    ],
)
def test_the_two_settings_settle(monkeypatch, backend, transformer_impl, has_te, expected):
    from megatron_dynmoe.backends import choice, transformer_engine

    monkeypatch.setattr(choice, "has_transformer_engine", lambda: has_te)
    monkeypatch.setattr(transformer_engine, "version_without_grouped_experts", lambda: None)
    if " " in expected:
        with pytest.raises(ValueError, match=expected):
            choice.choose_backend(backend, transformer_impl)
    else:
        assert choice.choose_backend(backend, transformer_impl).backend == expected


@pytest.mark.parametrize(
    ("settings", "part"),
    [
        ({"softmax_type": "off-by-one"}, "attention"),
        ({"window_size": (2, 0)}, "attention"),
        ({"layernorm_zero_centered_gamma": True}, "norm"),
        ({"add_bias_linear": True, "expert_model_parallel_size": 2}, "experts"),
        ({"activation_func": torch.nn.functional.gelu}, "experts"),
        ({"gated_linear_unit": False}, "experts"),
    ],
    ids=str,
)
def test_a_part_stays_locals_where_it_must(settings, part):
    from megatron_dynmoe.backends import choice

    model = config(**settings)
    plan = choose_parts("auto", model)
    assert list(plan.kept) == [part]
    assert f"{part}: upstream's local" in choice.describe(plan, model)
    with pytest.raises(ValueError, match=f"backend is 'torch_native', whose {part} cannot do"):
        choose_parts("torch_native", model)


@pytest.mark.parametrize("backend", ("auto", "local"))
def test_biases_that_upstreams_experts_stop_at_are_refused(backend):

    for settings in ({}, {"expert_tensor_parallel_size": 1}):
        with pytest.raises(ValueError, match="give --disable-bias-linear"):
            choose_parts(backend, config(add_bias_linear=True, **settings))
    dense = {"num_moe_experts": None, "moe_ffn_hidden_size": None}
    for settings in (dense, {"expert_model_parallel_size": 2}):
        choose_parts(backend, config(add_bias_linear=True, **settings))


@pytest.mark.parametrize("backend", ("torch_native", "local"))
def test_norms_that_only_transformer_engine_recomputes_are_refused(backend):

    selective = {"recompute_granularity": "selective"}
    refused = config(**selective, recompute_modules=["core_attn", "layernorm"])
    with pytest.raises(ValueError, match=r"--recompute-modules is core_attn layernorm.*leave"):
        choose_parts(backend, refused)
    choose_parts(backend, config(**selective, recompute_modules=["core_attn"]))


@pytest.mark.parametrize(
    ("backend", "settings"), [("local", {}), ("auto", {"moe_apply_probs_on_input": True})]
)
def test_experts_that_keep_their_activations_are_refused(backend, settings):
    recompute = {"recompute_granularity": "selective", "recompute_modules": ["moe_act"]}
    model = config(**recompute, moe_grouped_gemm=True)
    for name, value in settings.items():
        setattr(model, name, value)
    with pytest.raises(ValueError, match=r"--recompute-modules is moe_act, .*leave it out, or use"):
        choose_parts(backend, model)
    choose_parts("torch_native", config(**recompute, moe_grouped_gemm=True))


def test_an_optimizer_of_matrices_keeps_upstreams_experts():

    plan = choose_parts("auto", config(), optimizer="muon")
    assert plan.kept == {"experts": "--optimizer muon"}


@pytest.mark.parametrize(
    ("settings", "backend", "message"),
    [
        ({}, "auto", "--cp-comm-type is p2p, .*give --cp-comm-type a2a"),
        ({"cp_comm_type": ["a2a", "p2p"]}, "auto", "--cp-comm-type is a2a p2p, "),
        (
            {"cp_comm_type": "a2a", "num_attention_heads": 6, "num_query_groups": 3},
            "torch_native",
            "--num-query-groups is 3, which --context-parallel-size 2 does not divide",
        ),
        (
            {"cp_comm_type": "a2a", "tensor_model_parallel_size": 4, "sequence_parallel": True},
            "auto",
            "--num-attention-heads is 4, which .* times --tensor-model-parallel-size 4 does not",
        ),
        ({"cp_comm_type": "a2a"}, "local", "--context-parallel-size is 2, .*use 1, or .*torch_nat"),
        (
            {"cp_comm_type": "a2a", "softmax_type": "off-by-one"},
            "auto",
            "the attention of local, which softmax_type off-by-one needs, cannot split a sequence",
        ),
    ],
    ids=str,
)
def test_a_sequence_that_cannot_be_split_is_refused(settings, backend, message):

    # Some sizes are not those of a model, so nothing is built from them.
    split = config()
    for name, value in {"context_parallel_size": 2, **settings}.items():
        setattr(split, name, value)
    with pytest.raises(ValueError, match=message):
        choose_parts(backend, split)


@pytest.mark.parametrize(
    ("settings", "backend", "message"),
    [
        ({}, "local", "runs because of --moe-dynamic-backend local, takes no heads of two sizes"),
        ({"softmax_type": "off-by-one"}, "auto", "runs because of softmax_type off-by-one, takes"),
        ({"qk_pos_emb_head_dim": 3}, "auto", "--qk-pos-emb-head-dim is 3.*give an even number"),
        ({"q_lora_rank": None}, "auto", "without --q-lora-rank.*give --q-lora-rank, or leave"),
        ({"cache_mla_latents": True}, "auto", "--cache-mla-latents is given.*leave it out"),
    ],
    ids=str,
)
def test_latent_attention_that_cannot_be_built_is_refused(settings, backend, message):
    latent = {"multi_latent_attention": True, "q_lora_rank": 8, "qk_pos_emb_head_dim": 4}
    model = config(qk_layernorm=True)
    for name, value in (latent | settings).items():
        setattr(model, name, value)
    with pytest.raises(ValueError, match=message):
        choose_parts(backend, model)


def test_heads_that_every_rank_gets_are_accepted():

    split = config(context_parallel_size=2, cp_comm_type="a2a", num_query_groups=2)
    assert not choose_parts("torch_native", split).kept
