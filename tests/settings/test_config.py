"""DynMoEConfig: kinds, YAML, defaults of each routing, and every combination that is refused."""

import dataclasses
import re

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from megatron_dynmoe.settings.config import SETTINGS, DynMoEConfig
from megatron_dynmoe.settings.distribution import TargetDistribution
from megatron_dynmoe.settings.schedule import TargetSchedule

TOP_P = {"routing": "top_p"}
DTOP_P = {"routing": "dtop_p", "target_experts_per_token": 2}
SEQ_TOP_K = {"routing": "seq_top_k", "target_experts_per_token": 2}


def config(**settings) -> DynMoEConfig:
    return DynMoEConfig.from_dict(settings, source="test")


# --- kinds ---------------------------------------------------------------------------------------

GOOD = {
    "choice": [],  # see test_every_choice_is_taken
    "int": [(3, 3), ("3", 3), (3.0, 3)],
    "float": [(0.25, 0.25), ("0.25", 0.25), ("1e-3", 1e-3), (1, 1.0)],
    "float_or_auto": [(0.25, 0.25), ("0.25", 0.25), ("auto", "auto")],
    "schedule": [(2, TargetSchedule(((0, 2.0),))), ("0:4,9:2", TargetSchedule(((0, 4), (9, 2))))],
}
BAD = {
    "choice": ["nonsense", "", 1, True, ["top_p"]],
    "int": ["two", "", 2.5, "2.5", True, [2], {}, "nan", float("inf"), 10**400],
    "float": ["high", "", True, [0.1], {}, "nan", float("nan"), "inf", "auto", 10**400],
    "float_or_auto": ["high", "", True, [0.1], {}, "nan", "Auto", 10**400],
    "schedule": ["two", "", True, [2], {0: 2}, "nan", "9:2,5:3"],
}


@pytest.mark.parametrize("name", SETTINGS)
def test_values_of_its_kind_are_taken(name):
    for value, want in GOOD[SETTINGS[name].kind]:
        got = getattr(config(**{name: value}), name)
        assert got == want
        assert type(got) is type(want)


@pytest.mark.parametrize("name", SETTINGS)
def test_every_choice_is_taken(name):
    for choice in SETTINGS[name].choices:
        assert getattr(config(**{name: choice}), name) == choice


@pytest.mark.parametrize("name", SETTINGS)
def test_other_values_are_refused_by_name_and_value(name):
    for value in BAD[SETTINGS[name].kind]:
        with pytest.raises(ValueError, match=re.escape(f"{name} is {value!r}: use ")):
            config(**{name: value})


def test_an_empty_routing_is_refused_and_not_taken_for_a_default():
    with pytest.raises(ValueError, match="routing is not set: use one of top_k, top_p, dtop_p"):
        config(routing=None)


def test_every_field_is_a_setting_with_help():
    assert list(SETTINGS) == [field.name for field in dataclasses.fields(DynMoEConfig)]
    for setting in SETTINGS.values():
        assert setting.help.endswith(".")
        assert (setting.kind == "choice") == bool(setting.choices)


def test_unknown_names_are_refused_with_a_suggestion():
    with pytest.raises(ValueError, match=r"test: .*'treshold'; did you mean threshold\?"):
        config(treshold=0.4)  # codespell:ignore
    with pytest.raises(ValueError, match="'zzz'; known are routing, threshold"):
        config(zzz=0.4)
    with pytest.raises(ValueError, match="no setting 1;"):
        DynMoEConfig.from_dict({1: 2}, source="test")


# --- YAML ----------------------------------------------------------------------------------------


def write(folder, text: str) -> str:
    path = folder / "settings.yaml"
    path.write_text(text, encoding="utf-8")
    return str(path)


def test_yaml(tmp_path):
    path = write(
        tmp_path,
        "# größer\nrouting: dtop_p\ntarget_experts_per_token: 0:8,1000:2\n"
        "dynamic_loss_coeff: 1e-3\nbalance_loss: none\nnormalization: none\nintegral_gain: auto\n"
        "scope:\n",
    )
    assert DynMoEConfig.from_yaml(path) == DynMoEConfig(
        routing="dtop_p",
        target_experts_per_token=TargetSchedule(((0, 8.0), (1000, 2.0))),
        dynamic_loss_coeff=1e-3,
        balance_loss="none",
        normalization="none",
        integral_gain="auto",
    )


def test_a_missing_yaml_file_is_named(tmp_path):
    path = tmp_path / "no.yaml"
    with pytest.raises(ValueError, match=f"DYNMOE_CONFIG is '{path}': cannot read it"):
        DynMoEConfig.from_yaml(path)


@pytest.mark.parametrize("text", ["", "top_p", "- routing\n- top_p", "3"])
def test_yaml_that_is_no_mapping_is_refused(tmp_path, text):
    with pytest.raises(ValueError, match=r"DYNMOE_CONFIG is .*'name: value' lines"):
        DynMoEConfig.from_yaml(write(tmp_path, text))


def test_yaml_that_does_not_parse_is_refused(tmp_path):
    with pytest.raises(
        ValueError, match=r"DYNMOE_CONFIG is .*: cannot read it \(.+\)\.$"
    ) as refused:
        DynMoEConfig.from_yaml(write(tmp_path, "routing: [top_p"))
    assert "\n" not in str(refused.value)
    (tmp_path / "binary.yaml").write_bytes(b"\xff\xfe\x00r")
    with pytest.raises(ValueError, match=r"DYNMOE_CONFIG is .*: cannot read it"):
        DynMoEConfig.from_yaml(tmp_path / "binary.yaml")


def test_an_unknown_name_in_yaml_names_the_file(tmp_path):
    path = write(tmp_path, "routing: top_p\ntreshhold: 0.3")
    with pytest.raises(ValueError, match=re.escape(path) + ".*did you mean threshold"):
        DynMoEConfig.from_yaml(path)


@pytest.mark.parametrize("line", ["threshold: yes", "threshold: [0.4]", "threshold: much"])
def test_a_bad_value_in_yaml_is_refused(tmp_path, line):
    with pytest.raises(ValueError, match=r"threshold is .*: use a number"):
        DynMoEConfig.from_yaml(write(tmp_path, f"routing: top_p\n{line}"))


# --- round trip ----------------------------------------------------------------------------------

numbers = st.floats(0, 10, allow_nan=False)
targets = st.dictionaries(st.integers(0, 10**6), st.floats(1, 64), min_size=1, max_size=4)
VALUES = {
    "int": st.integers(1, 512),
    "float": numbers,
    "float_or_auto": numbers | st.just("auto"),
    "schedule": targets.map(lambda points: TargetSchedule(tuple(sorted(points.items()))))
    | st.builds(TargetDistribution, st.floats(1, 8), st.floats(8.5, 64)),
}
configs = st.fixed_dictionaries(
    {"routing": st.sampled_from(SETTINGS["routing"].choices)},
    optional={
        name: st.sampled_from(setting.choices) if setting.choices else VALUES[setting.kind]
        for name, setting in SETTINGS.items()
        if name != "routing"
    },
).map(lambda settings: DynMoEConfig(**settings))


@given(configs)
def test_to_dict_reads_back_also_through_yaml(settings):
    as_dict = settings.to_dict()
    assert DynMoEConfig.from_dict(as_dict, source="test") == settings
    assert DynMoEConfig.from_dict(yaml.safe_load(yaml.safe_dump(as_dict)), "test") == settings


# --- defaults ------------------------------------------------------------------------------------


def test_defaults_of_top_p_are_those_of_the_paper():
    assert config(**TOP_P).resolve(16).to_dict() == {
        "routing": "top_p",
        "threshold": 0.4,
        "normalization": "none",
        "weights": "raw",
        "balance_loss": "seq_aux_loss",
        "balance_loss_coeff": 1e-2,
        "dynamic_loss_coeff": 1e-4,
        "row_buffer": "measured",
        "backend": "auto",
    }


def test_defaults_of_dtop_p_are_those_of_the_paper():
    assert config(**DTOP_P).resolve(16).to_dict() == {
        "routing": "dtop_p",
        "target_experts_per_token": "2",
        "controlled_quantity": "experts",
        "scope": "global",
        "proportional_gain": "auto",
        "integral_gain": "auto",
        "initial_threshold": "auto",
        "min_threshold": 0.0,
        "max_threshold": 1.0,
        "normalization": "drn",
        "weights": "renormalized",
        "balance_loss": "seq_aux_loss",
        "balance_loss_coeff": 1e-4,
        "dynamic_loss_coeff": 1e-3,
        "row_buffer": "measured",
        "backend": "auto",
    }


def test_only_a_buffer_for_the_target_has_a_margin():
    resolved = config(**DTOP_P, row_buffer="target").resolve(16)
    assert resolved.row_buffer_margin == 0.1
    assert resolved.resolve(16) == resolved
    assert config(**DTOP_P).resolve(16).row_buffer_margin is None


def test_top_k_has_a_back_end():
    given = DynMoEConfig(backend="local")
    assert given.resolve(16) == given
    with pytest.raises(ValueError, match="backend is 'te'"):
        DynMoEConfig(backend="te")


def test_top_k_stays_as_it_is():
    for num_experts in (None, 0, 16):
        assert DynMoEConfig().resolve(num_experts) == DynMoEConfig()
    assert not DynMoEConfig().is_dynamic
    assert not config(**TOP_P).is_controlled
    assert config(**TOP_P).is_dynamic
    assert config(**DTOP_P).is_controlled


@pytest.mark.parametrize("base", [TOP_P, DTOP_P], ids=["top_p", "dtop_p"])
def test_settings_that_were_given_stay(base):
    given = {
        "normalization": "none" if base is DTOP_P else "drn",
        "weights": "raw" if base is DTOP_P else "renormalized",
        "balance_loss": "global_aux_loss",
        "balance_loss_coeff": 0.5,
        "dynamic_loss_coeff": 0.0,
        "max_experts_per_token": 4,
        "inference_max_experts_per_token": 3,
        "inference_threshold": 0.25,
    }
    resolved = config(**base, **given).resolve(16)
    assert {name: getattr(resolved, name) for name in given} == given


def test_inference_takes_the_cap_of_training_unless_it_has_its_own():
    resolved = config(**TOP_P, max_experts_per_token=4).resolve(16)
    assert resolved.inference_max_experts_per_token == 4
    assert config(**TOP_P).resolve(16).inference_max_experts_per_token is None


@pytest.mark.parametrize("base", [TOP_P, DTOP_P], ids=["top_p", "dtop_p"])
@pytest.mark.parametrize("extra", [{}, {"balance_loss": "none"}, {"max_experts_per_token": 4}])
def test_what_is_resolved_can_be_resolved_again(base, extra):
    resolved = config(**base, **extra).resolve(16)
    assert resolved.resolve(16) == resolved
    assert DynMoEConfig.from_dict(resolved.to_dict(), "test").resolve(16) == resolved


def test_no_balance_loss_means_no_coefficient():
    assert config(**TOP_P, balance_loss="none").resolve(16).balance_loss_coeff == 0


@pytest.mark.parametrize(
    ("settings", "num_experts"),
    [
        (TOP_P | {"threshold": 0}, 16),
        (TOP_P | {"threshold": 1}, 16),
        (TOP_P | {"max_experts_per_token": 1}, 16),
        (TOP_P | {"max_experts_per_token": 16}, 16),
        (TOP_P, 1),
        (TOP_P, 512),
        (DTOP_P | {"target_experts_per_token": 1}, 1),
        (DTOP_P | {"target_experts_per_token": 16}, 16),
        (DTOP_P | {"target_experts_per_token": "0:16,9:1"}, 16),
        (DTOP_P | {"target_experts_per_token": "uniform(1,16)"}, 16),
        (DTOP_P | {"target_experts_per_token": "uniform(1,4)", "max_experts_per_token": 4}, 16),
        (DTOP_P | {"max_experts_per_token": 2}, 16),
        (DTOP_P | {"min_threshold": 0.3, "max_threshold": 0.4, "initial_threshold": 0.3}, 16),
        (DTOP_P | {"proportional_gain": 0}, 16),
        (DTOP_P | {"dynamic_loss_coeff": 0, "balance_loss_coeff": 0}, 16),
        (TOP_P | {"balance_loss": "none", "balance_loss_coeff": 0}, 16),
    ],
)
def test_the_edges_of_what_makes_sense(settings, num_experts):
    config(**settings).resolve(num_experts)


# --- what makes no sense -------------------------------------------------------------------------

EVERY_DYNAMIC_SETTING = {
    name: setting.choices[0] if setting.choices else {"int": 1}.get(setting.kind, 0.5)
    for name, setting in SETTINGS.items()
    if name not in ("routing", "backend")
}


@pytest.mark.parametrize("name", EVERY_DYNAMIC_SETTING)
def test_top_k_has_none_of_the_settings(name):
    with pytest.raises(ValueError, match=f"routing is 'top_k', which has no {name}: set routing"):
        config(**{name: EVERY_DYNAMIC_SETTING[name]}).resolve(16)


REFUSED = [
    # of the other routing
    (TOP_P | {"target_experts_per_token": 2}, "target_experts_per_token is 2", "'dtop_p'"),
    (TOP_P | {"scope": "layer"}, "scope is 'layer'", "'dtop_p'"),
    (TOP_P | {"proportional_gain": 1}, "proportional_gain is 1.0", "'dtop_p'"),
    (TOP_P | {"integral_gain": "auto"}, "integral_gain is 'auto'", "'dtop_p'"),
    (TOP_P | {"initial_threshold": 0.3}, "initial_threshold is 0.3", "'dtop_p'"),
    (TOP_P | {"min_threshold": 0.1}, "min_threshold is 0.1", "'dtop_p'"),
    (TOP_P | {"max_threshold": 0.9}, "max_threshold is 0.9", "'dtop_p'"),
    (TOP_P | {"row_buffer_margin": 0.1}, "row_buffer_margin is 0.1", "'dtop_p'"),
    (DTOP_P | {"threshold": 0.4}, "threshold is 0.4", "use initial_threshold"),
    # out of range
    (TOP_P | {"threshold": -0.1}, "threshold is -0.1", "0 (one expert) to 1"),
    (TOP_P | {"threshold": 1.1}, "threshold is 1.1", "0 (one expert) to 1"),
    (TOP_P | {"inference_threshold": -0.1}, "inference_threshold is -0.1", "0 (one expert)"),
    (TOP_P | {"inference_threshold": 2}, "inference_threshold is 2.0", "0 (one expert)"),
    (DTOP_P | {"initial_threshold": 1.5}, "initial_threshold is 1.5", "0 (one expert)"),
    (TOP_P | {"max_experts_per_token": 0}, "max_experts_per_token is 0", "use 1 to 16"),
    (TOP_P | {"max_experts_per_token": -1}, "max_experts_per_token is -1", "use 1 to 16"),
    (TOP_P | {"check_ranks": 0}, "check_ranks is 0", "from 1"),
    (TOP_P | {"max_experts_per_token": 17}, "max_experts_per_token is 17", "use 1 to 16"),
    (
        TOP_P | {"inference_max_experts_per_token": 0},
        "inference_max_experts_per_token is 0",
        "use 1 to 16",
    ),
    (TOP_P | {"dynamic_loss_coeff": -1}, "dynamic_loss_coeff is -1.0", "0 (off) or a positive"),
    (TOP_P | {"balance_loss_coeff": -1}, "balance_loss_coeff is -1.0", "0 (off) or a positive"),
    (
        DTOP_P | {"row_buffer": "target", "row_buffer_margin": -0.1},
        "row_buffer_margin is -0.1",
        "use 0 (room for the mean alone)",
    ),
    # together
    (
        TOP_P | {"row_buffer": "target"},
        "row_buffer is 'target', but routing 'top_p' holds no target",
        "leave row_buffer out",
    ),
    (
        DTOP_P | {"row_buffer_margin": 0.1},
        "row_buffer_margin is 0.1 and row_buffer is 'measured'",
        "set row_buffer to 'target'",
    ),
    (
        TOP_P | {"balance_loss": "none", "balance_loss_coeff": 0.01},
        "balance_loss_coeff is 0.01 and balance_loss is 'none'",
        "leave the coefficient out",
    ),
    # the controller
    ({"routing": "dtop_p"}, "target_experts_per_token is not set", "such as 2"),
    (DTOP_P | {"target_experts_per_token": 0.5}, "target_experts_per_token is 0.5", "use 1 to 16"),
    (DTOP_P | {"target_experts_per_token": -2}, "target_experts_per_token is -2", "use 1 to 16"),
    (DTOP_P | {"target_experts_per_token": 17}, "target_experts_per_token is 17", "use 1 to 16"),
    (
        DTOP_P | {"target_experts_per_token": "0:17,9:2"},
        "target_experts_per_token is 0:17,9:2",
        "use 1 to 16",
    ),
    *(
        (
            DTOP_P | {"target_experts_per_token": f"uniform({given})"} | cap,
            f"target_experts_per_token is uniform({given})",
            remedy,
        )
        for given, cap, remedy in (
            ("0.5,4", {}, "use 1 to 16"),
            ("1,17", {}, "at most 16 (all experts)"),
            ("1,4", {"max_experts_per_token": 3}, "at most 3 (max_experts_per_token)"),
        )
    ),
    (
        TOP_P | {"target_experts_per_token": "uniform(1,4)"},
        "target_experts_per_token is uniform(1,4)",
        "'dtop_p'",
    ),
    *(
        (DTOP_P | {"target_experts_per_token": "uniform(1,4)", name: 0.3}, f"{name} is 0.3", "auto")
        for name in ("initial_threshold", "proportional_gain", "integral_gain")
    ),
    (
        DTOP_P | {"target_experts_per_token": "uniform(1,4)", "row_buffer": "target"},
        "row_buffer is 'target', and target_experts_per_token is uniform(1,4)",
        "use 'worst_case' with max_experts_per_token",
    ),
    (
        DTOP_P | {"max_experts_per_token": 1},
        "target_experts_per_token is 2",
        "at most 1 (max_experts_per_token)",
    ),
    ({"routing": "seq_top_k"}, "target_experts_per_token is not set, which", "such as 2"),
    *(
        (SEQ_TOP_K | {"target_experts_per_token": given}, f"target_experts_per_token is {given}", x)
        for given, x in (
            ("0:4,100:2", "'seq_top_k' takes as many in every step: give one number"),
            ("uniform(1,4)", "give one number"),
            (0, "use more than 0 to 16"),
            (17, "at most 16 (all experts)"),
        )
    ),
    (SEQ_TOP_K | {"max_experts_per_token": 1}, "target_experts_per_token is 2", "at most 1 ("),
    (
        {"routing": "null_experts", "target_experts_per_token": 20},
        "target_experts_per_token is 20",
        "at most 16 (all experts)",
    ),
    (SEQ_TOP_K | {"scope": "layer"}, "scope is 'layer', which routing 'seq_top_k'", "'dtop_p'"),
    (SEQ_TOP_K | {"threshold": 0.1}, "threshold is 0.1, which routing 'seq_top_k'", "'top_p'"),
    (DTOP_P | {"min_threshold": -0.1}, "min_threshold is -0.1", "0 <= min < max <= 1"),
    *(
        (
            DTOP_P | {"max_threshold": given},
            f"max_threshold is {given} and min_threshold is 0.0",
            "0 <= min < max <= 1",
        )
        for given in (1.1, 0.0)
    ),
    (
        DTOP_P | {"min_threshold": 0.6, "max_threshold": 0.5},
        "min_threshold is 0.6 and max_threshold is 0.5",
        "0 <= min < max <= 1",
    ),
    (
        DTOP_P | {"initial_threshold": 0.2, "min_threshold": 0.3},
        "initial_threshold is 0.2",
        "between min_threshold (0.3)",
    ),
    (
        DTOP_P | {"initial_threshold": 0.9, "max_threshold": 0.8},
        "initial_threshold is 0.9",
        "max_threshold (0.8)",
    ),
    (DTOP_P | {"proportional_gain": -1}, "proportional_gain is -1.0", "'auto' or a positive"),
    (DTOP_P | {"integral_gain": -1}, "integral_gain is -1.0", "'auto' or a positive"),
    (DTOP_P | {"integral_gain": 0}, "integral_gain is 0", "'auto' or a positive"),
]


@pytest.mark.parametrize(("settings", "what", "remedy"), REFUSED, ids=[case[1] for case in REFUSED])
def test_refused_with_name_value_and_remedy(settings, what, remedy):
    with pytest.raises(ValueError) as error:
        config(**settings).resolve(16)
    assert what in str(error.value)
    assert remedy in str(error.value)
    # What follows from the settings was not given. Only a target can be missing.
    assert str(error.value).partition(" ")[0] in (*settings, "target_experts_per_token")


@pytest.mark.parametrize("num_experts", [None, 0])
@pytest.mark.parametrize("base", [TOP_P, DTOP_P], ids=["top_p", "dtop_p"])
def test_a_dense_model_is_refused(base, num_experts):
    with pytest.raises(ValueError, match=f"routing is '{base['routing']}'.*set --num-experts"):
        config(**base).resolve(num_experts)
