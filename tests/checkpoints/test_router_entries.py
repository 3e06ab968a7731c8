"""Which checkpoints have routers that this run can go on from; see also test_resume_settings."""

from __future__ import annotations

import pickle
from types import SimpleNamespace

import pytest

from megatron_dynmoe.checkpoints.collective import CheckpointError
from megatron_dynmoe.checkpoints.router_entries import check_router_entries
from megatron_dynmoe.moe.rules import RULES, TopP
from tests.conversion.checkpoints import DTOP_P, TOP_K, TOP_P, model_config, write_megatron

pytestmark = pytest.mark.megatron

ROUTER = "decoder.layers.mlp.router."
STATE = ("weight", "threshold", "integral", "measured")
STRICT = "assume_ok_unexpected"  # Megatron's default


def check(folder, names, strictness=STRICT):
    """As if a model with such a router were to be loaded, with its optimizer."""
    model = {name: SimpleNamespace(key=ROUTER + name) for name in names}
    moments = {name: SimpleNamespace(key=f"optimizer.{ROUTER}{name}") for name in names}
    state_dict = {"args": object(), "model": model, "optimizer": {"state": [moments]}}
    check_router_entries(folder / "release", state_dict, strictness)


@pytest.fixture(scope="module", params=[TOP_K, TOP_P, DTOP_P])
def saved(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp("saved")
    return write_megatron(folder, model_config(**request.param)), request.param


def test_a_checkpoint_of_other_routing_is_refused_with_the_flags_that_load_it(saved):
    folder, settings = saved
    check(folder, [])  # dense
    check(folder, ["weight"])  # top-k
    if settings is TOP_K:
        with pytest.raises(CheckpointError, match="no integral, measured, threshold"):
            check(folder, STATE)
    else:
        check(folder, STATE)
    if settings is DTOP_P:
        check(folder, [*STATE, "theta_offset"])
    else:
        with pytest.raises(CheckpointError, match=r"theta_offset.*log_all --no-load-optim"):
            check(folder, [*STATE, "theta_offset"])


def test_a_dynamic_checkpoint_in_a_top_k_model_is_warned_of(saved, capsys):
    folder, settings = saved
    check(folder, [])
    check(folder, ["weight"] if settings is TOP_K else STATE)
    assert not capsys.readouterr().out
    check(folder, ["weight"])
    warned = f"> warning: the checkpoint {folder / 'release'} was trained with --moe-dynamic"
    assert capsys.readouterr().out.startswith(warned) is (settings is not TOP_K)


def test_a_checkpoint_of_another_rule_is_refused(saved, monkeypatch):
    class Other(TopP):
        knob, entries = "margin", ("margin",)

    monkeypatch.setitem(RULES, "other", Other)
    folder, settings = saved
    trained = "not trained with dynamic" if settings is TOP_K else "trained with another --moe-dyn"
    with pytest.raises(CheckpointError, match=rf"{trained}.*: its routers have no .*margin"):
        check(folder, ["weight", "margin", "integral", "measured"])


def test_a_gate_with_other_rows_is_told_of_without_a_remedy_that_cannot_help(saved):
    with pytest.raises(CheckpointError, match=r"another number of rows: its weights fit only"):
        check(saved[0], ["weight", "null_bias", "integral", "measured"])


def test_what_is_asked_to_be_lenient_is(saved):
    for strictness in ("log_all", "log_unexpected", "return_all", "ignore_all"):
        check(saved[0], [*STATE, "theta_offset"], strictness)


def test_what_is_not_about_routing_is_left_to_megatron(tmp_path):
    from torch.distributed.checkpoint.metadata import Metadata

    (tmp_path / "release").mkdir()
    check(tmp_path, STATE)  # another format
    (tmp_path / "release" / ".metadata").write_bytes(pickle.dumps(Metadata({}, {}, {})))
    check(tmp_path, STATE)  # a dense model's
