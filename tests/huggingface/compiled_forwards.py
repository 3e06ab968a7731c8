"""Compiled forwards; ``test_compiled_forwards.py`` runs this file in a process of its own."""

import torch
from torch._dynamo.testing import CompileCounter
from transformers import CompileConfig

from tests.huggingface.test_budgets import budget_model
from tests.huggingface.test_interfaces import CLOSE, GREEDY, PACKED
from tests.huggingface.tiny import left_padded, tiny_model, tokens


def compiled(model):
    """Of one graph; without the slow part, the compilation of what dynamo has traced."""
    torch._dynamo.reset()
    return torch.compile(model, fullgraph=True, backend="eager")


def test_the_model_compiles_to_one_graph():
    model, ids = tiny_model(num_hidden_layers=1, routing="dtop_p", threshold=0.5), tokens(2, 12)
    _, mask = left_padded([tokens(1, 5)[0], tokens(1, 12)[0]])
    with torch.no_grad():
        for given in ({}, {"attention_mask": mask}, {"position_ids": PACKED, "use_cache": False}):
            found, expected = compiled(model)(ids, **given), model(ids, **given)
            valid = given.get("attention_mask", torch.ones_like(ids)).bool()
            torch.testing.assert_close(found.logits[valid], expected.logits[valid], **CLOSE)
            assert torch.equal(found.experts_per_token, expected.experts_per_token)
    loss = compiled(model.train())(ids, labels=ids).loss
    torch.testing.assert_close(loss, model(ids, labels=ids).loss)
    loss.backward()


def test_compiled_generation_with_a_static_cache_and_budgets():
    curve = [{"experts_per_token": k, "threshold": k / 5} for k in (1, 4)]
    model = tiny_model(num_hidden_layers=1, threshold=0.5, budget_curve=curve)
    ids, mask = left_padded([tokens(1, 4)[0], tokens(1, 9)[0]])
    torch._dynamo.reset()
    how = CompileConfig(fullgraph=True, backend="eager", mode=None)
    how._compile_all_devices = True
    given = {"attention_mask": mask, "experts_per_token": [1.5, 4], **GREEDY}
    expected = model.generate(ids, **given)
    found = model.generate(ids, cache_implementation="static", compile_config=how, **given)
    assert torch.equal(found, expected)
    assert hasattr(model, "_compiled_call")


def test_one_compiled_graph_serves_all_budgets_in_a_tensor():
    """Also those beyond an end, which it cannot see: they are at the end."""
    model, ids = budget_model(num_hidden_layers=1), tokens(2, 7)
    torch._dynamo.reset()
    counter = CompileCounter()
    once = torch.compile(model, fullgraph=True, backend=counter)
    with torch.no_grad():
        for budgets, seen in (([1, 4], [1, 4]), ([2.5, 1.7], [2.5, 1.7]), ([0.5, 9], [1, 4])):
            given = torch.tensor(budgets, dtype=torch.float64)
            found = once(ids, experts_per_token=given, use_cache=False)
            expected = model(ids, experts_per_token=seen, use_cache=False)
            torch.testing.assert_close(found.logits, expected.logits, **CLOSE)
            assert torch.equal(found.experts_per_token, expected.experts_per_token)
    assert counter.frame_count == 1
