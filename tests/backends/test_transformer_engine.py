"""What is settled and refused at start-up on Transformer Engine; tests/distributed trains on it."""

from argparse import Namespace

import pytest
import torch

from tests.backends.model import config

pytestmark = pytest.mark.megatron

OLD = "1.8.0"


@pytest.fixture
def te(monkeypatch):
    """As if Transformer Engine were installed."""
    from megatron_dynmoe.backends import choice, transformer_engine

    monkeypatch.setattr(choice, "has_transformer_engine", lambda: True)
    monkeypatch.setattr(transformer_engine, "version_without_grouped_experts", lambda: None)
    return transformer_engine


def test_a_version_that_groups_no_experts_is_left_alone(te, monkeypatch):
    from megatron_dynmoe.backends import choice

    monkeypatch.setattr(te, "version_without_grouped_experts", lambda: OLD)
    chosen = choice.choose_backend("auto", None)
    assert (chosen.backend, OLD in chosen.why) == ("torch_native", True)
    with pytest.raises(
        ValueError, match=r"version 1\.8\.0 .*install 1\.9\.0 or later, or use auto"
    ):
        choice.choose_backend("transformer_engine", None)
    choice.choose_backend("local", None)


@pytest.mark.parametrize(
    ("version", "is_old"), [("1.8.0", True), ("1.9.0.dev0", False), ("2.18.0", False)]
)
def test_the_version_is_that_of_upstreams_grouped_linear(monkeypatch, version, is_old):
    from megatron.core import utils
    from packaging.version import Version

    from megatron_dynmoe.backends import transformer_engine

    monkeypatch.setattr(utils, "_te_version", Version(version))
    assert transformer_engine.version_without_grouped_experts() == (version if is_old else None)


@pytest.mark.parametrize("routing", ["top_p", "top_k"])
def test_experts_are_grouped_for_a_dynamic_routing(te, routing):
    """Those of top-k are as Megatron's flags say."""
    from megatron_dynmoe.model.prepare import prepare_training
    from megatron_dynmoe.model.settled import settle_run
    from megatron_dynmoe.settings.config import DynMoEConfig

    model = config()
    settled = settle_run(DynMoEConfig(routing=routing).resolve(4), model)
    assert settled.backend.backend == "transformer_engine"
    prepare_training(settled, model)
    assert model.moe_grouped_gemm is (routing == "top_p")
    assert model.transformer_impl == "transformer_engine"


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            {"add_bias_linear": True, "bias_dropout_fusion": True},
            "--disable-bias-linear is not given, .*or --no-bias-dropout-fusion",
        ),
        (
            {
                "moe_permute_fusion": True,
                "moe_token_dispatcher_type": "allgather",
                "expert_model_parallel_size": 2,
            },
            "--moe-permute-fusion is given .*parallel-size 2, .*use alltoall, or leave",
        ),
    ],
    ids=["biases", "permutation"],
)
def test_what_its_experts_cannot_do_is_refused(te, settings, message):
    from megatron_dynmoe.model.settled import settle_run
    from megatron_dynmoe.settings.config import DynMoEConfig

    def settle(routing="top_p", **settings):
        model = config()  # whose own checks ask for packages and ranks that are not here
        for name, value in settings.items():
            setattr(model, name, value)
        settle_run(DynMoEConfig(routing=routing).resolve(4), model)

    with pytest.raises(ValueError, match=message):
        settle(**settings)
    settle("top_k", **settings)  # which is upstream's own
    for name in settings:  # each one is needed
        settle(**{other: value for other, value in settings.items() if other != name})


SPLIT = {
    "context_parallel_size": 2,
    "cp_comm_type": ["p2p"],
    "params_dtype": torch.bfloat16,
    "num_query_groups": 4,
}


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            {"params_dtype": torch.float32},
            r"--context-parallel-size is 2, and .* float32, .*give --bf16, or use .*torch_native",
        ),
        # As upstream's help spells it.
        ({"cp_comm_type": "allgather"}, "--cp-comm-type is allgather, .*p2p, all_gather, a2a, "),
        (
            {"cp_comm_type": ["p2p", "a2a"], "num_query_groups": 1},
            "--num-query-groups is 1, which --context-parallel-size 2 does not divide",
        ),
    ],
    ids=["float32", "kind", "heads"],
)
def test_a_sequence_that_it_cannot_split_is_refused(te, settings, message):
    from megatron_dynmoe.model.settled import settle_run
    from megatron_dynmoe.settings.config import DynMoEConfig

    def settle(**settings):
        model = config()
        for name, value in settings.items():
            setattr(model, name, value)
        settle_run(DynMoEConfig(routing="top_p").resolve(4), model)

    with pytest.raises(ValueError, match=message):
        settle(**SPLIT | settings)
    settle(**settings)  # one rank has whole sequences
    for kind in ("p2p", "all_gather", "a2a", "a2a+p2p"):
        settle(**SPLIT | {"cp_comm_type": kind})
    settle(**SPLIT | {"num_query_groups": 1})  # keys and values travel, and not heads


def test_a_mask_that_is_not_read_is_refused(te):
    with pytest.raises(ValueError, match=r"--reset-attention-mask is given, .*use .*torch_native"):
        te.check_mask(Namespace(reset_attention_mask=True))
    te.check_mask(Namespace(reset_attention_mask=False))


def test_defaults_that_need_what_is_missing_are_turned_off(te, monkeypatch):
    from megatron_dynmoe.backends import choice

    installed = set()
    monkeypatch.setattr(choice.importlib.util, "find_spec", lambda name: name in installed or None)
    for name in ("fused_weight_gradient_mlp_cuda", None):
        args = Namespace(
            gradient_accumulation_fusion=True,
            apply_rope_fusion=True,
            rotary_interleaved=False,
            multi_latent_attention=False,
        )
        installed = {name}
        choice.adapt_arguments(args)
        assert args.gradient_accumulation_fusion is (name is not None)
        assert args.apply_rope_fusion


@pytest.mark.parametrize("latent", [False, True])
@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("has_kernels", [False, True])
def test_without_it_our_kernel_rotates_what_upstream_lets_it(
    monkeypatch, latent, interleaved, has_kernels
):
    from megatron_dynmoe.backends import choice

    monkeypatch.setattr(choice, "has_transformer_engine", lambda: False)
    monkeypatch.setattr(choice.kernels, "available", lambda device: has_kernels)
    args = Namespace(
        gradient_accumulation_fusion=False,
        apply_rope_fusion=True,
        rotary_interleaved=interleaved,
        multi_latent_attention=latent,
    )
    choice.adapt_arguments(args)
    assert args.apply_rope_fusion is (has_kernels and not latent and not interleaved)
