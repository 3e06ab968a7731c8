"""What DeepEP gets from a routing map, against plain loops."""

from types import SimpleNamespace

import pytest
import torch

pytestmark = pytest.mark.megatron


@pytest.mark.parametrize("most", [1, 3, 8])
def test_ids_and_weights_are_those_of_the_map(most):
    from megatron_dynmoe.moe.flex import _VariableKDeepEP

    generator = torch.Generator().manual_seed(most)
    num_tokens, num_ranks, per_rank = 40, 2, 4
    counts = torch.randint(0, most + 1, (num_tokens, 1), generator=generator)
    noise = torch.rand(num_tokens, num_ranks * per_rank, generator=generator)
    map_TE = noise.argsort(dim=1).argsort(dim=1) < counts
    # Weights of experts that were not chosen are larger, and one that was chosen has none.
    probs_TE = torch.rand(map_TE.shape, generator=generator) + 2 * ~map_TE
    probs_TE[0] = 0
    probs_TE.requires_grad_()

    manager = object.__new__(_VariableKDeepEP)
    manager.num_experts, manager.router_topk = num_ranks * per_rank, most
    manager.setup_metadata(
        map_TE.view(num_tokens, num_ranks, per_rank), probs_TE.view(num_tokens, num_ranks, per_rank)
    )
    ids_TK, weights_TK = manager.token_indices, manager.token_probs
    assert ids_TK.shape == weights_TK.shape == (num_tokens, most)
    assert ids_TK.dtype == torch.int64
    for token in range(num_tokens):
        chosen = map_TE[token].nonzero().flatten().tolist()
        missing = most - len(chosen)
        assert ids_TK[token].tolist() == chosen + [-1] * missing
        expected = [*probs_TE[token, chosen].tolist(), *[0.0] * missing]
        assert weights_TK[token].tolist() == expected
    weights_TK.sum().backward()
    assert torch.equal(probs_TE.grad, map_TE.float())


def test_a_version_with_another_interface_is_refused(monkeypatch):
    from megatron.core.transformer.moe import fused_a2a

    from megatron_dynmoe.moe.flex import check_flex

    class Buffer:
        def dispatch(self, x, topk_idx, topk_weights, handle):
            raise AssertionError

    monkeypatch.setattr(fused_a2a, "HAVE_DEEP_EP", True)
    monkeypatch.setattr(fused_a2a, "Buffer", Buffer, raising=False)
    transformer = SimpleNamespace(moe_flex_dispatcher_backend="deepep")
    with pytest.raises(ValueError, match=r"Buffer\.dispatch .* does not take num_tokens_per_rank"):
        check_flex(transformer, 2)
