"""The --moe-dynamic-* flags, DYNMOE_CONFIG, and upstream's flags for the balance loss."""

from argparse import ArgumentParser, Namespace

import pytest

from megatron_dynmoe.settings.arguments import (
    adapt_balance_loss,
    add_dynmoe_args,
    adopt_upstream_balance_loss,
    config_from_args,
    config_from_environment,
    flag_of,
    resolved_from_args,
)
from megatron_dynmoe.settings.config import SETTINGS, DynMoEConfig

TYPE, COEFF = "--moe-router-load-balancing-type", "--moe-aux-loss-coeff"


@pytest.fixture(autouse=True)
def no_settings_file(monkeypatch):
    monkeypatch.delenv("DYNMOE_CONFIG", raising=False)


def parse(*flags: str) -> Namespace:
    parser = ArgumentParser(allow_abbrev=False, exit_on_error=False)
    # As upstream declares them.
    parser.add_argument(TYPE, nargs="+", type=str, default="aux_loss")
    parser.add_argument(COEFF, nargs="+", type=float, default=0.0)
    return add_dynmoe_args(parser).parse_args(flags)


VALUES = {"int": "3", "float": "0.25", "float_or_auto": "0.5", "schedule": "0:8,1000:2"}


@pytest.mark.parametrize("name", SETTINGS)
def test_a_flag_mirrors_each_field(name):
    setting = SETTINGS[name]
    for text in setting.choices or (VALUES[setting.kind],):
        config = config_from_args(parse(flag_of(name), text))
        assert config == DynMoEConfig(**{name: text})
        assert config.to_dict()[name] == DynMoEConfig(**{name: text}).to_dict()[name]


def test_there_are_no_other_flags_of_ours():
    ours = {name for name in vars(parse()) if name.startswith("moe_dynamic_")}
    assert ours == {f"moe_dynamic_{name}" for name in SETTINGS}


def test_no_flag_leaves_the_defaults():
    assert config_from_args(parse()) == DynMoEConfig()


@pytest.mark.parametrize("name", SETTINGS)
def test_a_bad_value_is_a_value_error_that_names_it(name):
    with pytest.raises(ValueError, match=f"^{flag_of(name)} is 'nonsense': use "):
        config_from_args(parse(flag_of(name), "nonsense"))


def test_help_shows_every_choice_and_default():
    text = " ".join(add_dynmoe_args(ArgumentParser()).format_help().split())
    assert "top_k|top_p|dtop_p" in text
    for name, setting in SETTINGS.items():
        assert flag_of(name) in text
        assert setting.help.split()[0] in text


def test_flags_override_the_settings_file(tmp_path, monkeypatch):
    path = tmp_path / "settings.yaml"
    path.write_text("routing: top_p\nthreshold: 0.3\nweights: renormalized\n")
    monkeypatch.setenv("DYNMOE_CONFIG", str(path))
    from_file = DynMoEConfig(routing="top_p", threshold=0.3, weights="renormalized")
    assert config_from_environment() == from_file
    assert config_from_args(parse()) == from_file
    assert config_from_args(parse(flag_of("threshold"), "0.5")) == DynMoEConfig(
        routing="top_p", threshold=0.5, weights="renormalized"
    )


MISTAKES = {
    "--moe-dynamic-threshold 0.3": "--moe-dynamic-threshold is 0.3, which --moe-dynamic-routing "
    "'dtop_p' does not have: use --moe-dynamic-initial-threshold, or set --moe-dynamic-routing to "
    "'top_p'.",
    "--moe-dynamic-min-threshold 0.6 --moe-dynamic-max-threshold 0.5": "--moe-dynamic-min-"
    "threshold is 0.6 and --moe-dynamic-max-threshold is 0.5: use 0 <= min < max <= 1.",
    "--moe-dynamic-max-experts-per-token 1": "--moe-dynamic-target-experts-per-token is 2: every "
    "token uses at least 1 expert and at most 1 (--moe-dynamic-max-experts-per-token), so use 1 to "
    "1.",
    "--moe-dynamic-scope threshold": "--moe-dynamic-scope is 'threshold': use one of global, "
    "layer.",
    "--moe-dynamic-weights /a/scope": "--moe-dynamic-weights is '/a/scope': use one of raw, "
    "renormalized.",
}


@pytest.mark.parametrize("flags", MISTAKES)
def test_a_refusal_names_flags_where_flags_were_given(flags):
    args = parse(flag_of("routing"), "dtop_p", flag_of("target_experts_per_token"), "2")
    with pytest.raises(ValueError) as error:
        resolved_from_args(parse_into(args, flags), 16)
    assert str(error.value) == MISTAKES[flags]


def parse_into(args: Namespace, flags: str) -> Namespace:
    return Namespace(**vars(args) | {k: v for k, v in vars(parse(*flags.split())).items() if v})


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ((), "initial_threshold is 0.9: it must lie between --moe-dynamic-min-threshold .*"),
        (("0.7",), "--moe-dynamic-initial-threshold is 0.7: .* max_threshold "),
    ],
)
def test_a_refusal_names_fields_where_they_were_given_in_a_file(
    tmp_path, monkeypatch, flags, message
):
    path = tmp_path / "settings.yaml"
    path.write_text(
        "{routing: dtop_p, target_experts_per_token: 2, initial_threshold: 0.9, max_threshold: 0.5}"
    )
    monkeypatch.setenv("DYNMOE_CONFIG", str(path))
    given = (flag_of("initial_threshold"), *flags) if flags else ()
    with pytest.raises(ValueError, match=rf"^{message}"):
        resolved_from_args(parse(*given), 16)


def test_a_mistake_in_the_file_is_told_in_its_own_words(tmp_path, monkeypatch):
    path = tmp_path / "settings.yaml"
    path.write_text("treshold: 0.5")  # codespell:ignore
    monkeypatch.setenv("DYNMOE_CONFIG", str(path))
    with pytest.raises(ValueError, match=r"settings\.yaml: .* did you mean threshold\?$"):
        config_from_args(parse())


def test_the_baseline_is_one_flag_away_from_any_settings_file(tmp_path, monkeypatch):
    path = tmp_path / "settings.yaml"
    path.write_text("routing: dtop_p\ntarget_experts_per_token: 2\n")
    monkeypatch.setenv("DYNMOE_CONFIG", str(path))
    assert config_from_args(parse(flag_of("routing"), "top_k")) == DynMoEConfig()


def test_without_a_settings_file_there_are_no_settings(monkeypatch):
    assert config_from_environment() is None
    monkeypatch.setenv("DYNMOE_CONFIG", "")
    assert config_from_environment() is None


# --- upstream's flags for the balance loss -------------------------------------------------------

TOP_P = DynMoEConfig(routing="top_p")


@pytest.mark.parametrize("kind", SETTINGS["balance_loss"].choices)
def test_upstreams_flags_are_taken_over(kind):
    args = parse(TYPE, kind, COEFF, "0.02")
    config = adapt_balance_loss(args, TOP_P)
    assert (config.balance_loss, config.balance_loss_coeff) == (kind, 0.02)
    assert args.moe_router_load_balancing_type == "none", "upstream computes none"
    assert args.moe_aux_loss_coeff == 0


def test_without_upstreams_flags_the_defaults_of_the_routing_hold():
    args = parse()
    assert adapt_balance_loss(args, TOP_P) == TOP_P
    assert args.moe_router_load_balancing_type == "none"
    assert args.moe_aux_loss_coeff == 0


def test_both_flags_may_say_the_same():
    config = DynMoEConfig(routing="top_p", balance_loss="aux_loss", balance_loss_coeff=0.02)
    assert adapt_balance_loss(parse(TYPE, "aux_loss", COEFF, "0.02"), config) == config


@pytest.mark.parametrize(
    ("flags", "ours", "message"),
    [
        (
            (TYPE, "aux_loss"),
            {"balance_loss": "none"},
            f"--moe-dynamic-balance-loss is 'none' and {TYPE} is aux_loss",
        ),
        (
            (COEFF, "0.02"),
            {"balance_loss_coeff": 0.01},
            f"--moe-dynamic-balance-loss-coeff is 0.01 and {COEFF} is 0.02",
        ),
        ((TYPE, "aux_loss", "none"), {}, rf"{TYPE} is \['aux_loss', 'none'\].*give one"),
        ((COEFF, "0.1", "0.2"), {}, rf"{COEFF} is \[0.1, 0.2\].*give one"),
        ((TYPE, "sinkhorn"), {}, f"{TYPE} is sinkhorn.*use one of seq_aux_loss"),
        ((TYPE, "quantile_balancing"), {}, f"{TYPE} is quantile_balancing.*use one of"),
        ((TYPE, "auxloss"), {}, f"{TYPE} is auxloss.*use one of"),
    ],
)
def test_what_upstreams_flags_cannot_mean_is_refused(flags, ours, message):
    config = DynMoEConfig(routing="top_p", **ours)
    with pytest.raises(ValueError, match=message):
        adapt_balance_loss(parse(*flags), config)


def test_stock_top_k_keeps_upstreams_flags_and_defaults():
    args = parse()
    assert adapt_balance_loss(args, DynMoEConfig()) == DynMoEConfig()
    assert (args.moe_router_load_balancing_type, args.moe_aux_loss_coeff) == ("aux_loss", 0.0)
    args = parse(TYPE, "sinkhorn", COEFF, "0.5")
    assert adapt_balance_loss(args, DynMoEConfig()) == DynMoEConfig()
    assert (args.moe_router_load_balancing_type, args.moe_aux_loss_coeff) == (["sinkhorn"], [0.5])


def test_values_without_a_list_are_taken_too():
    """As a TransformerConfig holds them."""
    config = adopt_upstream_balance_loss(TOP_P, "global_aux_loss", 0.03)
    assert (config.balance_loss, config.balance_loss_coeff) == ("global_aux_loss", 0.03)
    assert adopt_upstream_balance_loss(TOP_P, None, None) == TOP_P


@pytest.mark.megatron
def test_upstreams_defaults_are_still_those_that_return_for_top_k():
    from megatron.training.arguments import add_megatron_arguments

    parser = add_megatron_arguments(ArgumentParser(allow_abbrev=False))
    assert parser.get_default("moe_router_load_balancing_type") == "aux_loss"
    assert parser.get_default("moe_aux_loss_coeff") == 0.0
    assert add_dynmoe_args(parser).parse_args([]).moe_aux_loss_coeff is None
