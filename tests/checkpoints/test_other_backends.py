"""Names that differ between back ends; through Megatron: test_transformer_engine."""

from __future__ import annotations

import pickle
from types import SimpleNamespace

import pytest

from megatron_dynmoe.checkpoints.other_backends import adopt_names

pytestmark = pytest.mark.megatron

LAYERS = "decoder.layers."
LOCAL, TE = LAYERS + "mlp.linear_fc1.layer_norm_weight", LAYERS + "pre_mlp_layernorm.weight"


@pytest.fixture
def folder(tmp_path, request):
    from torch.distributed.checkpoint.metadata import BytesStorageMetadata, Metadata

    entries = {key: BytesStorageMetadata() for key in request.param}
    (tmp_path / ".metadata").write_bytes(pickle.dumps(Metadata(entries, {}, {})))
    return tmp_path


def asked(*keys):
    tensors = [SimpleNamespace(key=key) for key in keys]
    return {"model": {"a": tensors[0]}, "optimizer": {"state": {0: tensors[1:]}}}, tensors


@pytest.mark.parametrize("ours", [LOCAL, TE])
@pytest.mark.parametrize("folder", [[LOCAL], [TE], [LOCAL, TE]], indirect=True, ids=len)
def test_a_norm_is_asked_for_as_the_checkpoint_names_it(folder, ours, request):
    stored = request.node.callspec.params["folder"]
    moment = "optimizer.state.exp_avg."
    state_dict, (norm, its_moment) = asked(ours, moment + ours)
    adopt_names(folder, state_dict)
    assert norm.key == (ours if ours in stored else stored[0])
    assert its_moment.key == moment + ours  # which this checkpoint lacks under any name


@pytest.mark.parametrize("folder", [[TE, LAYERS + "router._extra_state/shard_0_1"]], indirect=True)
def test_a_state_that_the_checkpoint_lacks_stays_as_it_is(folder):
    from megatron.core.dist_checkpointing.mapping import LocalNonpersistentObject, ShardedObject

    missing, there, other = (
        ShardedObject(LAYERS + key, f"state of {key}", (1,), (0,))
        for key in ("pre_mlp_layernorm._extra_state", "router._extra_state", "router.threshold")
    )
    state_dict = {"model": {"missing": missing, "there": there}, "others": [other]}
    adopt_names(folder, state_dict)
    kept = state_dict["model"]["missing"]
    assert isinstance(kept, LocalNonpersistentObject)
    assert kept.unwrap() == "state of pre_mlp_layernorm._extra_state"
    assert state_dict["model"]["there"] is there
    assert state_dict["others"] == [other]  # missing, and Megatron says so


def test_a_checkpoint_of_another_format_is_left_to_megatron(tmp_path):
    state_dict, (norm,) = asked(LOCAL)
    adopt_names(tmp_path, state_dict)
    assert norm.key == LOCAL
