"""Router, experts, MoE layer and controller in plain PyTorch."""

import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from megatron_dynmoe import Controller, Experts, Losses, MoELayer, Router
from megatron_dynmoe.routing.route import route
from tests.huggingface.tiny import tiny_model

ROOT = Path(__file__).parents[2]
WIDTH, EXPERTS = 24, 8


def layer(**settings):
    torch.manual_seed(0)
    return MoELayer(Router(WIDTH, EXPERTS, **settings), Experts(WIDTH, EXPERTS, ffn_size=16))


def test_it_needs_neither_megatron_nor_transformers():
    code = "from megatron_dynmoe import Controller, Experts, MoELayer, Router; import sys; "
    code += "print({'megatron', 'transformers'} & set(sys.modules))"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert (run.stdout, run.stderr) == ("set()\n", "")


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"max_experts_per_token": 3, "threshold": 0.4},
        {"normalization": "none", "weights": "raw", "init_std": 0.5},
    ],
    ids=str,
)
def test_the_router_routes_as_megatrons(settings):
    router, hidden_TD = layer(**settings).router, torch.randn(50, WIDTH)
    routed = router(hidden_TD)
    normalized = settings.get("normalization") != "none"
    expected = route(
        hidden_TD @ router.weight.t(),
        settings.get("threshold", 0.4),
        theta=router.theta if normalized else None,
        max_experts=settings.get("max_experts_per_token"),
        renormalize=settings.get("weights") != "raw",
    )
    assert torch.equal(routed.map_TE, expected.map_TE)
    assert len(expected.experts_T.unique()) > 1
    torch.testing.assert_close(routed.weights_TE, expected.weights_TE)
    in_slots_TE = torch.zeros(50, EXPERTS).scatter_add(-1, *routed.slots())
    assert torch.equal(in_slots_TE, routed.weights_TE)


def test_the_exported_model_is_made_of_the_same_layer():
    model = tiny_model(routing="dtop_p", threshold=0.5).train()
    exported = model.model.layers[1].mlp
    plain = MoELayer(Router(32, 8), Experts(32, 8, ffn_size=16))
    plain.load_state_dict(exported.state_dict(), strict=False)
    plain.router.threshold.fill_(0.5)
    hidden_BSD = torch.randn(2, 9, 32)
    for ours, theirs in zip(plain(hidden_BSD), exported(hidden_BSD), strict=True):
        assert torch.equal(ours, theirs)


def test_a_layer_learns_and_counts_no_padding():
    moe, hidden_BSD = layer(), torch.randn(2, 7, WIDTH, requires_grad=True)
    valid_BS = torch.tensor([[1] * 7, [0] * 3 + [1] * 4]).bool()
    output = moe(hidden_BSD, valid_BS)
    assert output.hidden_states.shape == hidden_BSD.shape
    assert output.router_logits.shape == (2, 7, EXPERTS)
    assert torch.equal(output.experts_per_token > 0, valid_BS)
    assert (output.hidden_states[1, :3] == 0).all()
    (output.hidden_states.square().mean() + output.loss).backward()
    assert all(p.grad.abs().max() > 0 for p in (*moe.parameters(), hidden_BSD))
    assert moe(hidden_BSD, with_loss=False).loss is None


def test_the_controller_takes_steps_of_the_pi_law():
    moe = layer()
    controller = Controller(moe, target="0:3,4:2")
    threshold, integral = moe.router.threshold.clone(), torch.zeros(1)
    assert threshold.item() == pytest.approx(controller.law.initial_threshold)
    measured = moe(torch.randn(4, 64, WIDTH)).experts_per_token.double().mean()
    assert measured == pytest.approx(3, rel=0.1)  # the first guess
    batches = [torch.tensor([[4, 0, 2], [3, 0, 0]]), torch.tensor([1, 1]), torch.zeros(2, 2).long()]
    for target, means in ((3, 3.0), (2.75, 1.0), (2.5, torch.nan), (2.25, 2.2)):
        counts = batches.pop(0) if batches else [torch.tensor([1, 2]), torch.tensor([2, 3, 3])]
        controller.update(counts)
        threshold, integral = controller.law.step(
            threshold, integral, torch.tensor([means]), target
        )
        assert torch.equal(moe.router.threshold, threshold)
        torch.testing.assert_close(controller.measured, torch.tensor([means]), equal_nan=True)
    assert threshold != controller.law.initial_threshold


def test_all_routers_of_a_model_share_the_threshold_and_it_is_saved_with_them(tmp_path):
    model = nn.Sequential(layer(), layer())
    controller = Controller(model, target=2)
    for counts in (torch.tensor([3, 4]), torch.tensor([1, 1])):
        controller.update(counts)
    torch.save((model.state_dict(), controller.state_dict()), tmp_path / "saved.pt")
    again = nn.Sequential(layer(), layer())
    resumed = Controller(again, target=2)
    weights, state = torch.load(tmp_path / "saved.pt")
    again.load_state_dict(weights)
    resumed.load_state_dict(state)
    for one in (controller, resumed):
        one.update(torch.tensor([2, 5]))
    found = [moe.router.threshold for moe in (*model, *again)]
    assert all(torch.equal(threshold, found[0]) for threshold in found)
    assert model.bfloat16()[0].router.threshold.dtype == torch.float32
    assert torch.equal(model[0].router.threshold, resumed.threshold)


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        (lambda: Router(8, 4, threshold=1.5), "threshold is 1.5.*use 0"),
        (lambda: Router(8, 4, max_experts_per_token=5), "max_experts_per_token is 5: use 1 to 4"),
        (lambda: Router(8, 4, normalization="rms"), "normalization is 'rms'"),
        (lambda: Controller(layer(), target=9), "^target is 9.*use 1 to 8"),
        (lambda: Controller(layer(), target="uniform(1,4)"), "draw targets: give a number, or a"),
        (
            lambda: Controller(layer(), target=2, min_threshold=0.8, max_threshold=0.2),
            "min_threshold is 0.8.*max_threshold",
        ),
        (lambda: Controller(nn.Linear(2, 2), target=2), "no megatron_dynmoe.Router"),
        (lambda: Controller(layer(), target=2).update([]), "counts is empty"),
        (  # the whole output
            lambda: Controller(layer(), target=2).update(layer()(torch.zeros(1, 2, WIDTH))),
            "values of torch.float32: give the output's experts_per_token",
        ),
        (lambda: Controller(layer(), target=2).update([2, 3]), "values of int: give the output's"),
        (lambda: layer()(torch.zeros(5, WIDTH)), r"shape \[5, 24\]: give .* \[1, tokens, hidden"),
        (
            lambda: MoELayer(Router(8, 4), Experts(8, 4, 8), Losses("seq_aux")),
            "balance_loss is 'seq_aux': use seq_aux_loss or",
        ),
        (lambda: MoELayer(Router(8, 4), Experts(8, 5, 8)), "4 experts and Experts has 5"),
        (lambda: MoELayer(Router(8, 4), Experts(6, 4, 8)), "hidden size is 8 .* is 6"),
        (
            lambda: Controller(nn.Sequential(layer(), layer(max_experts_per_token=2)), target=2),
            "2 routers differ in size, cap",
        ),
    ],
)
def test_what_makes_no_sense_is_refused_by_name(wrong, said):
    with pytest.raises(ValueError, match=said):
        wrong()


@pytest.mark.slow
def test_the_readmes_lines_train_and_hold_the_target():
    (code,) = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    assert len(code.splitlines()) <= 24
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert run.returncode == 0, run.stderr
    errors, counts = zip(
        *re.findall(r"error ([\d.]+), experts per token ([\d.]+)", run.stdout), strict=True
    )
    assert float(errors[-1]) < 0.7 * float(errors[0])
    assert all(float(count) == pytest.approx(2, rel=0.1) for count in counts[1:])
    assert len(counts) > 3


@pytest.mark.slow
def test_the_example_runs():
    code = (ROOT / "examples/pytorch/language_model.py").read_text()
    short = code.replace("STEPS, LENGTH, BATCH = 300,", "STEPS, LENGTH, BATCH = 10,")
    assert short != code
    run = subprocess.run([sys.executable, "-c", short], capture_output=True, text=True, cwd=ROOT)
    assert run.returncode == 0, run.stderr
    assert "resumed at threshold" in run.stdout
