"""``--recompute-modules moe_act``: what a layer keeps, and that its numbers stay the same."""

from typing import Any

import pytest
import torch
from torch.multiprocessing.reductions import StorageWeakRef

from megatron_dynmoe.moe import dispatch
from megatron_dynmoe.moe.experts import GroupedExperts
from megatron_dynmoe.settings.config import DynMoEConfig
from tests.moe import one_rank

pytestmark = pytest.mark.megatron

TOP_P = DynMoEConfig(routing="top_p", threshold=0.4, backend="torch_native")
WORST_CASE = DynMoEConfig(
    **{
        **TOP_P.to_dict(),
        "max_experts_per_token": 3,
        "inference_max_experts_per_token": 3,
        "row_buffer": "worst_case",
    }
)
MOE_ACT: dict[str, Any] = {
    "recompute_granularity": "selective",
    "recompute_modules": ["moe_act"],
    "moe_grouped_gemm": True,
}
SETTINGS: dict[str, dict[str, Any]] = {
    "": {},
    "shared": {"moe_shared_expert_intermediate_size": 6},
    "fused": {"bias_activation_fusion": True},
    "looped": {"moe_ffn_hidden_size": 7},
    "allgather": {"moe_token_dispatcher_type": "allgather"},
}


def step(monkeypatch, dynmoe: DynMoEConfig, **settings: Any) -> tuple[list[Any], list[str]]:
    """Output and gradients of a layer, and which of its tensors lived between the two passes."""
    made: list[tuple[str, StorageWeakRef]] = []

    def watched(part: str, function: Any) -> Any:
        def call(*given: Any) -> Any:
            result = function(*given)
            tensor = result[0] if isinstance(result, tuple) else result
            made.append((part, StorageWeakRef(tensor.untyped_storage())))
            return result

        return call

    one_rank.world_of_one()  # the same weights each time
    torch.manual_seed(1)
    layer = one_rank.moe_layer(dynmoe, num_experts=4, **settings)
    hidden = torch.randn(5, 2, 8, generator=torch.Generator().manual_seed(3)).requires_grad_()
    with monkeypatch.context() as patch:
        activated = watched("activations", GroupedExperts._activated)
        patch.setattr(GroupedExperts, "_activated", activated)
        patch.setattr(dispatch, "permute", watched("rows", dispatch.permute))
        output, _ = layer(hidden)
        kept = [part for part, storage in made if not storage.expired()]
        output.square().sum().backward()
    gradients = [parameter.grad for parameter in layer.parameters()]
    return [output, hidden.grad, *gradients], kept


CASES = [
    *((TOP_P, name) for name in SETTINGS),
    *((WORST_CASE, name) for name in ("", "shared", "fused")),  # others count rows on the host
]


@pytest.mark.parametrize(
    ("dynmoe", "name"), CASES, ids=lambda value: getattr(value, "row_buffer", value)
)
def test_less_is_kept_and_every_bit_is_the_same(monkeypatch, dynmoe, name):
    expected, kept = step(monkeypatch, dynmoe, **SETTINGS[name])
    gathers = name != "allgather"  # by upstream's code, and from all ranks
    assert sorted(kept) == ["activations"] + ["rows"] * gathers
    results, kept = step(monkeypatch, dynmoe, **SETTINGS[name], **MOE_ACT)
    assert kept == []
    assert all(torch.equal(*pair) for pair in zip(results, expected, strict=True))
    assert results[1].any()
