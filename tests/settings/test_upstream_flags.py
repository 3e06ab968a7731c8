"""Every MoE setting of the installed Megatron is known, and what is refused is refused by name."""

import re
from argparse import Namespace
from types import SimpleNamespace

import pytest

from megatron_dynmoe.settings.upstream_flags import (
    _REFUSED_VALUES,
    UNRELEASED,
    UPSTREAM_FLAGS,
    Refused,
    check_query_groups,
    check_sequence_parallel,
    check_upstream_settings,
    layers_with_experts,
)
from tests.moe import one_rank
from tests.upstream import settings as upstreams

REFUSED = {name: entry for name, entry in UPSTREAM_FLAGS.items() if isinstance(entry, Refused)}


@pytest.fixture(scope="module")
def upstream_parser():
    one_rank.megatron_on_cpu()
    return upstreams.parser()


@pytest.mark.megatron
def test_every_setting_is_known(upstream_parser):
    unknown = upstreams.unknown(upstreams.flags(), upstreams.fields())
    assert not unknown, "Megatron has settings whose effect on dynamic routing nobody has judged"


@pytest.mark.megatron
def test_nothing_is_known_that_megatron_does_not_have(upstream_parser):
    has = upstreams.flags().keys() | upstreams.fields().keys()
    assert has & UPSTREAM_FLAGS.keys() == UPSTREAM_FLAGS.keys() - UNRELEASED.keys()


@pytest.mark.megatron
def test_upstreams_defaults_pass(upstream_parser):
    check_upstream_settings(one_rank.transformer_config())
    check_upstream_settings(upstream_parser.parse_args([]))


@pytest.mark.megatron
def test_errors_name_the_flag_as_upstream_spells_it(upstream_parser):
    spelled = {action.dest: action.option_strings for action in upstream_parser._actions}
    for name, entry in REFUSED.items():
        if name in spelled:
            assert _message(Namespace(**{name: _used(entry)})).split()[0] in spelled[name]


def _used(entry: Refused):
    """A value that is not among the unused ones."""
    return next(value for value in (True, 2, "local") if value not in entry.unused)


def _message(settings) -> str:
    with pytest.raises(ValueError) as error:
        check_upstream_settings(settings)
    return str(error.value)


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_refused_names_flag_value_reason_and_remedy(name):
    entry = REFUSED[name]
    message = _message(SimpleNamespace(**{name: _used(entry)}))
    assert message.startswith("--" + name.replace("_", "-"))
    shown = "given" if _used(entry) is True else _used(entry)
    assert f" is {shown}," in message
    assert entry.reason in message
    assert f"Remedy: {entry.remedy}." in message
    for value in entry.unused:
        check_upstream_settings(SimpleNamespace(**{name: value}))


@pytest.mark.parametrize(("name", "value"), _REFUSED_VALUES)
def test_single_values_are_refused_also_in_a_list(name, value):
    assert name in UPSTREAM_FLAGS
    for given in (value, ["seq_aux_loss", value]):
        message = _message(SimpleNamespace(**{name: given}))
        assert message.startswith(f"--{name.replace('_', '-')} is {value}, ")


def test_a_pattern_without_expert_layers_is_refused():
    message = _message(SimpleNamespace(moe_layer_freq=[0, 0]))
    assert message.startswith("--moe-layer-freq is [0, 0]")
    for frequency in (1, 2, [0, 1], [1, 0]):
        check_upstream_settings(SimpleNamespace(moe_layer_freq=frequency))


def test_the_first_layer_of_every_few_has_experts_or_those_that_a_list_says():
    assert layers_with_experts(1, 2) == (True, True)
    assert layers_with_experts(2, 5) == (True, False, True, False, True)
    assert layers_with_experts([0, 1, 1], 3) == (False, True, True)


@pytest.mark.parametrize("frequency", [0, -1, "2", None, [1, 0, 1]])
def test_a_pattern_that_fits_no_model_is_refused(frequency):
    with pytest.raises(ValueError, match=rf"^--moe-layer-freq is {re.escape(repr(frequency))}: "):
        layers_with_experts(frequency, 2)


@pytest.mark.megatron
@pytest.mark.parametrize(
    ("setting", "value"),
    [
        ("moe_expert_capacity_factor", 1.0),
        ("mtp_num_layers", 1),
        ("moe_token_dispatcher_type", "flex"),
        ("moe_router_dtype", "fp64"),
    ],
)
def test_a_model_with_such_a_setting_is_not_built(setting, value):
    from megatron_dynmoe.settings.config import DynMoEConfig

    one_rank.megatron_on_cpu()
    transformer = one_rank.transformer_config()
    setattr(transformer, setting, value)
    one_rank.world_of_one()
    with pytest.raises(ValueError, match="--" + setting.replace("_", "-")):
        one_rank.prepared_spec(transformer, DynMoEConfig(routing="top_p"))


@pytest.mark.parametrize("name", ("num_experts", "num_moe_experts"))
def test_experts_under_tensor_parallelism_alone_are_refused(name):
    settings = {name: 4, "tensor_model_parallel_size": 2, "sequence_parallel": False}
    for check in (check_sequence_parallel, check_upstream_settings):
        with pytest.raises(ValueError, match="is 2 without --sequence-parallel"):
            check(SimpleNamespace(**settings))
        for change in (
            {name: None},
            {"sequence_parallel": True},
            {"tensor_model_parallel_size": 1},
        ):
            check(SimpleNamespace(**settings | change))


@pytest.mark.parametrize(
    ("groups", "divides"), [(1, True), (2, True), (4, True), (3, False), (0, False)]
)
def test_query_groups_divide_the_heads(groups: int, divides: bool) -> None:
    """Megatron would say that a shape is invalid, in the first step."""
    args = Namespace(group_query_attention=True, num_query_groups=groups, num_attention_heads=4)
    if divides:
        check_query_groups(args)
    else:
        with pytest.raises(ValueError, match=f"^--num-query-groups is {groups}, which does not"):
            check_query_groups(args)
    args.group_query_attention = False
    check_query_groups(args)
