"""The tables of names: complete, without doubles, and exact in both directions."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from megatron_dynmoe.conversion.formats import FORMATS, OURS
from megatron_dynmoe.conversion.names import (
    DENSE,
    MEGATRON,
    PARAMETERS,
    SPARSE,
    Row,
    rows_by_part,
)
from megatron_dynmoe.conversion.shapes import Shapes
from tests.conversion.checkpoints import DTOP_P, EXAMPLES, TOP_K, model_config

TABLES = {name: format.rows for name, format in FORMATS.items()} | {"megatron": MEGATRON}
# What gives a model the parameters that not all models have.
WITH: dict[str | None, dict[str, Any]] = {
    None: {},
    "untied": {"tie_word_embeddings": False},
    "attention_bias": {"attention_bias": True},
    "qk_norm": {"qk_norm": True},
    "drn": DTOP_P,
    "shared_expert": {"shared_expert_intermediate_size": 3},
    "shared_expert_gate": {"shared_expert_intermediate_size": 3, "shared_expert_gate": True},
}


@st.composite
def configs(draw: st.DrawFn) -> dict[str, Any]:
    """Any model that training has, small."""
    small = st.integers(1, 5)
    groups, head = draw(small), draw(small) * 2
    layers = draw(st.lists(st.sampled_from((SPARSE, DENSE)), min_size=1, max_size=4))
    shared = draw(st.none() | small)
    return model_config(
        num_hidden_layers=len(layers),
        mlp_layer_types=layers,
        vocab_size=draw(small),
        hidden_size=draw(small),
        num_attention_heads=groups * draw(small),
        num_key_value_heads=groups,
        head_dim=head,
        intermediate_size=draw(small),
        moe_intermediate_size=draw(small),
        num_experts=draw(small),
        shared_expert_intermediate_size=shared,
        shared_expert_gate=draw(st.booleans()) and shared is not None,
        attention_bias=draw(st.booleans()),
        qk_norm=draw(st.booleans()),
        tie_word_embeddings=draw(st.booleans()),
        normalization=draw(st.sampled_from(("none", "drn"))),
    )


@pytest.mark.parametrize("name", TABLES)
def test_every_parameter_has_one_place(name: str) -> None:
    parts = [part for row in TABLES[name] for part in row.parts]
    assert len(parts) == len(set(parts))
    keys = [key for row in TABLES[name] for key in (row.key, *row.aliases)]
    assert len(keys) == len(set(keys))
    assert rows_by_part(TABLES[name]).keys() == set(parts)


def test_ours_and_megatrons_have_every_parameter() -> None:
    assert PARAMETERS.keys() == rows_by_part(OURS.rows).keys() == rows_by_part(MEGATRON).keys()


@pytest.mark.parametrize("name", FORMATS)
def test_a_model_with_a_parameter_that_a_format_has_no_row_for_is_refused(name: str) -> None:
    for lacking in PARAMETERS.keys() - rows_by_part(TABLES[name]).keys():
        parameter = PARAMETERS[lacking]
        experts = TOP_K | {"num_experts": 4} if parameter.where == SPARSE else {}
        config = model_config(**EXAMPLES[name] | experts | WITH[parameter.when])
        if parameter.where == DENSE:
            config["mlp_layer_types"] = ["sparse", "dense"]
        assert any(Shapes(config).blocks(rows_by_part(MEGATRON)[lacking])), lacking
        with pytest.raises(ValueError, match=f"format {name} cannot express"):
            FORMATS[name].check_expressible(config)


@pytest.mark.parametrize("name", TABLES)
def test_the_parts_of_a_row_exist_together(name: str) -> None:
    for row in TABLES[name]:
        first, *others = (PARAMETERS[part] for part in row.parts)
        for other in others:
            assert (other.where, other.when, other.per_expert, other.shape[1:]) == (
                *(first.where, first.when, first.per_expert, first.shape[1:]),
            )


@given(configs())
def test_no_two_blocks_share_a_key(config: dict[str, Any]) -> None:
    shapes = Shapes(config)
    for table in TABLES.values():
        blocks = [block for row in table for block in shapes.blocks(row)]
        places = {(block.key, block.expert if block.row.stacked else None) for block in blocks}
        assert len(places) == len(blocks)


@given(configs(), st.sampled_from([(n, row) for n, t in TABLES.items() for row in t]))
def test_join_and_part_undo_each_other(config: dict[str, Any], named: tuple[str, Row]) -> None:
    row, shapes = named[1], Shapes(config)
    if not any(True for _ in shapes.blocks(row)):
        return
    numel = torch.Size(shapes.of_row(row)).numel()
    block = torch.arange(numel).reshape(shapes.of_row(row))
    parts = [shapes.part(row, part, block) for part in row.parts]
    assert [tuple(part.shape) for part in parts] == [shapes.of_part(part) for part in row.parts]
    assert torch.equal(shapes.join(row, parts), block)
    assert torch.cat([part.flatten() for part in parts]).unique().numel() == numel


@given(configs())
def test_queries_lie_before_their_keys_and_values(config: dict[str, Any]) -> None:
    """Megatron's order, by hand: for each group its queries, then its key, then its value."""
    shapes, row = Shapes(config), rows_by_part(MEGATRON)["q"]
    groups, head = config["num_key_value_heads"], config["head_dim"]
    per_group = config["num_attention_heads"] // groups
    hidden = config["hidden_size"]
    q = torch.arange(groups * per_group * head * hidden).reshape(-1, hidden)
    k = torch.arange(groups * head * hidden).reshape(-1, hidden) + 10**6
    v = k + 10**6
    expected = []
    for group in range(groups):
        expected.append(q[group * per_group * head : (group + 1) * per_group * head])
        expected += [x[group * head : (group + 1) * head] for x in (k, v)]
    assert torch.equal(shapes.join(row, [q, k, v]), torch.cat(expected))
