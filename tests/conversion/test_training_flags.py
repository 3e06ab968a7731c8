"""The flags that from-hf writes, read with the parser of the command that they are for."""

from __future__ import annotations

import shlex
from argparse import ArgumentParser
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_dynmoe.conversion.formats import FORMATS
from megatron_dynmoe.conversion.megatron.settings import (
    args_from_config,
    config_from_megatron,
    training_flags,
)
from megatron_dynmoe.conversion.model_settings import check_config
from megatron_dynmoe.conversion.routing_settings import router_state
from megatron_dynmoe.settings.arguments import add_dynmoe_args, config_from_args
from tests.conversion.checkpoints import DTOP_P, TOP_P, model_config
from tests.moe import one_rank

pytestmark = pytest.mark.megatron

# Written into the checkpoint, and either not said by a flag or said by leaving one out.
OF_TOP_K = ("moe_router_topk", "moe_router_dtype")  # dynamic routing has its own
NOT_FLAGS = {
    *("add_position_embedding", "rotary_interleaved", "seq_length", "moe_dynamic_settings"),
    *("tensor_model_parallel_size", "pipeline_model_parallel_size", "ckpt_format"),
    *("no_save_optim", "no_save_rng", "moe_router_score_function"),
}


@pytest.fixture(scope="module")
def parser() -> ArgumentParser:
    one_rank.megatron_on_cpu()
    from megatron.training.arguments import add_megatron_arguments

    return add_dynmoe_args(add_megatron_arguments(ArgumentParser(allow_abbrev=False)))


def check(parser: ArgumentParser, config: dict[str, Any], dtype: str = "float32") -> Any:
    """Every number that the checkpoint holds is what Megatron reads from the flags."""
    config = check_config(config)
    written = args_from_config(config, dtype)
    words = [word for line in training_flags(config, dtype) for word in shlex.split(line)]
    read = parser.parse_args(words)
    for name, value in written.items():
        if name in NOT_FLAGS or value is None:
            continue
        found = getattr(read, name)
        found = found[0] if isinstance(found, list) and not isinstance(value, list) else found
        if name == "num_query_groups" and not written["group_query_attention"]:
            continue
        if name in OF_TOP_K and "moe_dynamic_settings" in written:
            continue
        assert found == value, (name, value, found)
        assert type(found) is type(value) or float in (type(found), type(value)), name
    settings = written.get("moe_dynamic_settings")
    if settings is not None:
        assert config_from_args(read).to_dict() == settings
    return read


NUMBER = st.floats(1e-12, 1, exclude_min=True) | st.sampled_from((1e-5, 1e-6, 0.1 + 0.2, 1 / 3))


@given(data=st.data())
def test_every_number_is_read_as_it_was_written(
    parser: ArgumentParser, data: st.DataObject
) -> None:
    draw = data.draw
    settings: dict[str, Any] = draw(st.sampled_from(({"num_experts_per_tok": 2}, TOP_P, DTOP_P)))
    settings = settings | {
        "rope_parameters": {
            "rope_type": "default",
            "rope_theta": float(
                draw(st.integers(1, 2**53) | st.sampled_from((10000, 10**6, 1234567, 5 * 10**8)))
            ),
            "partial_rotary_factor": draw(NUMBER),
        },
        "rms_norm_eps": draw(NUMBER),
        "initializer_range": draw(NUMBER),
        "attention_dropout": draw(NUMBER),
        "hidden_dropout": draw(NUMBER),
        "vocab_size": draw(st.integers(1, 10**7)),
        "max_position_embeddings": draw(st.integers(1, 10**7)),
        "mlp_layer_types": draw(st.sampled_from((["sparse"] * 2, ["dense", "sparse"]))),
        "intermediate_size": 123456,
        "moe_intermediate_size": 1234567,
        "shared_expert_intermediate_size": draw(st.none() | st.integers(1, 10**7)),
        "balance_loss": "aux_loss",
        "balance_loss_coeff": draw(NUMBER),
    }
    if settings.get("routing") in ("top_p", "dtop_p"):
        settings |= {"dynamic_loss_coeff": draw(NUMBER), "threshold": draw(NUMBER)}
        settings |= {"inference_threshold": draw(st.none() | NUMBER)}
    if settings.get("routing") == "dtop_p":
        settings["target_experts_per_token"] = draw(
            st.floats(1, 4) | st.sampled_from(("0:4,1000000:1.3333333333333333",))
        )
        names = ("proportional_gain", "integral_gain", "initial_threshold")
        settings["controller"] = settings["controller"] | {name: draw(NUMBER) for name in names}
    check(parser, model_config(**settings), draw(st.sampled_from(("float32", "bfloat16"))))


def test_a_mixtral_of_the_usual_numbers(parser: ArgumentParser) -> None:
    theirs = {
        "model_type": "mixtral", "vocab_size": 32000, "hidden_size": 4096, "head_dim": None,
        "intermediate_size": 14336, "num_hidden_layers": 32, "num_attention_heads": 32,
        "num_key_value_heads": 8, "max_position_embeddings": 32768, "rms_norm_eps": 1e-5,
        "rope_theta": 1e6, "router_aux_loss_coef": 0.02, "num_local_experts": 8,
        "torch_dtype": "bfloat16",
    }  # fmt: skip
    config = FORMATS["mixtral"].from_format(theirs)
    read = check(parser, config, "bfloat16")
    assert read.rotary_base == 1000000 and type(read.rotary_base) is int
    assert read.layernorm_epsilon == 1e-5
    assert read.moe_aux_loss_coeff == [0.02 * 2 / 32]
    # and what a run with these flags saves is exported as what came in
    state = router_state(config) | {"theta": None}
    back = config_from_megatron(read, 32000, state)
    for name in ("rms_norm_eps", "rope_parameters", "balance_loss", "balance_loss_coeff"):
        assert back[name] == config[name], name


@pytest.mark.parametrize("base", [0.5, 10000.5, 1e19, 1e300])
def test_a_base_that_the_flag_cannot_carry_is_refused_by_name(base: float) -> None:
    config = model_config(rope_parameters={"rope_type": "default", "rope_theta": base})
    with pytest.raises(ValueError, match=r"rope_theta is .*whole numbers.*--rotary-base"):
        training_flags(config, "float32")
