"""Upcycled models compute what the dense model computes, until they are trained."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from megatron_dynmoe.conversion.convert import Target, from_hf, to_hf
from megatron_dynmoe.conversion.upcycle import Upcycling
from megatron_dynmoe.settings.config import DynMoEConfig
from tests.conversion.bad_input.damage import Refused, edit_json
from tests.conversion.checkpoints import export, megatron_tensors
from tests.conversion.foreign import loaded, logits, save_random

DENSE = ("llama", "qwen3, tied")
DTOP_P = DynMoEConfig("dtop_p", target_experts_per_token=2.0)
TOP_P = DynMoEConfig("top_p", threshold=0.4, weights="renormalized")
# The intermediate size is 20.
EXACT: dict[str, tuple[Upcycling, DynMoEConfig | None]] = {
    "copies, top-2": (Upcycling(8), None),
    "all copies": (Upcycling(4, topk=4), None),
    "halves": (Upcycling(8, granularity=2), None),
    "five parts of three copies, two copies": (Upcycling(15, granularity=5, topk=10), None),
    "copies, DTop-p": (Upcycling(8), DTOP_P),
    "copies, top-p": (Upcycling(8), TOP_P),
}
make = partial(from_hf, progress=False)


@pytest.fixture(scope="module")
def dense(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Path, torch.Tensor]]:
    """Folders of dense models, and what these compute."""
    root = tmp_path_factory.mktemp("dense")
    return {
        name: (root / str(i), logits(save_random(name, root / str(i))))
        for i, name in enumerate(DENSE)
    }


@pytest.fixture
def llama(dense: dict[str, tuple[Path, torch.Tensor]]) -> Path:
    return dense["llama"][0]


@pytest.mark.parametrize("variant", EXACT)
@pytest.mark.parametrize("name", DENSE)
def test_the_function_is_unchanged(
    dense: dict[str, tuple[Path, torch.Tensor]], tmp_path: Path, name: str, variant: str
) -> None:
    upcycling, routing = EXACT[variant]
    folder, expected = dense[name]
    make(folder, tmp_path / "megatron", upcycling=upcycling, routing=routing)
    to_hf(tmp_path / "megatron", Target(tmp_path / "ours"))
    model = loaded(tmp_path / "ours")
    assert model.config.num_experts == upcycling.experts
    torch.testing.assert_close(logits(model), expected, atol=2e-5, rtol=0)
    # It routes: tokens differ in their first expert, and with a threshold in their number.
    with torch.no_grad():
        output = model(torch.arange(61)[None], output_router_logits=True)
    assert all(one.argmax(-1).unique().numel() > 1 for one in output.router_logits)
    counts = output.experts_per_token.float()
    assert counts.std() > 0 if routing else (counts == model.config.num_experts_per_tok).all()


def test_experts_are_parts_of_the_dense_layer(llama: Path, tmp_path: Path) -> None:
    """By hand, in Megatron's tensors."""
    make(llama, tmp_path / "megatron", upcycling=Upcycling(8, granularity=4))
    dense = load_file(llama / "model.safetensors")
    made = megatron_tensors(tmp_path / "megatron")
    for layer in range(3):
        gate, up, down = (
            dense[f"model.layers.{layer}.mlp.{name}_proj.weight"] for name in ("gate", "up", "down")
        )
        fc1 = made["decoder.layers.mlp.experts.experts.linear_fc1.weight"][layer]
        fc2 = made["decoder.layers.mlp.experts.experts.linear_fc2.weight"][layer]
        rows = made["decoder.layers.mlp.router.weight"][layer]
        for expert in range(8):
            part = slice(expert % 4 * 5, expert % 4 * 5 + 5)
            assert torch.equal(fc1[expert], torch.cat((gate[part], up[part])))
            assert torch.equal(fc2[expert], 4 * down[:, part])
            assert torch.equal(rows[expert], rows[expert // 4 * 4])
        assert rows.unique(dim=0).shape[0] == 2
        assert rows.std() == pytest.approx(0.3, rel=0.3)  # initializer_range
    assert made["decoder.layers.mlp.router.weight"].unique(dim=0).shape[0] == 3


def test_noise_has_the_stated_size_and_the_seed_decides_it(llama: Path, tmp_path: Path) -> None:
    made = {}
    for name, more in (("0", {}), ("a", {"noise": 0.1}), ("b", {"noise": 0.1}), ("c", {"seed": 1})):
        make(llama, tmp_path / name, upcycling=Upcycling(8, **more))
        made[name] = megatron_tensors(tmp_path / name)
    for key, plain in made["0"].items():
        assert torch.equal(made["a"][key], made["b"][key]), key
        if "experts" not in key:
            assert torch.equal(made["a"][key], plain), key
            assert torch.equal(made["c"][key], plain) != ("router" in key), key
            continue
        noise = made["a"][key] - plain  # [layers, experts, ...]
        assert noise.std() / plain.square().mean().sqrt() == pytest.approx(0.1, rel=0.05)
        flat = noise.flatten(2).flatten(0, 1)
        correlation = torch.corrcoef(flat) - torch.eye(len(flat))
        assert correlation.abs().max() < 0.35  # of every pair of experts, of any layers


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        (
            "--upcycle-experts 9 --upcycle-granularity 2",
            "--upcycle-experts is 9, which",
        ),
        ("--upcycle-experts 8 --upcycle-granularity 8", "intermediate_size is 20, which --upcycle"),
        (
            "--upcycle-experts 8 --upcycle-granularity 4 --upcycle-topk 6",
            "--upcycle-topk is 6, which --upcycle-granularity 4 does not divide (a token uses "
            "whole copies): use a granularity of 3, or a multiple of 4.",
        ),
        ("--upcycle-experts 4 --upcycle-topk 1", "--upcycle-topk is 1: the only weight"),
        ("--upcycle-experts 4 --upcycle-topk 5", "--upcycle-topk is 5: use at most"),
        ("--upcycle-experts 1", "--upcycle-experts is 1: use at least 2"),
        ("--upcycle-experts x", "--upcycle-experts is 'x': give a whole number"),
        ("--upcycle-experts 4 --upcycle-noise -1", "--upcycle-noise is -1: use at least 0"),
        ("--upcycle-noise 0.1", "--upcycle-noise needs --upcycle-experts"),
        (
            "--upcycle-experts 8 --upcycle-granularity 2 --routing dtop_p "
            "--target-experts-per-token 2",
            "--upcycle-granularity is 2, but the threshold of --routing dtop_p can end within",
        ),
        (
            "--upcycle-experts 8 --upcycle-topk 2 --routing dtop_p --target-experts-per-token 2",
            "--upcycle-topk is 2, but --routing dtop_p has no fixed number: leave it out",
        ),
        (
            "--upcycle-experts 8 --routing top_p --threshold 0.4",
            "--routing top_p has weights 'raw', which do not sum to 1, so copies of an MLP would "
            "not add up to it: give --weights renormalized",
        ),
        *(
            (
                f"--upcycle-experts 8 --routing {rule} --target-experts-per-token 2 {more}",
                f"--routing {rule} may leave a token without an expert, where the dense model has "
                "an MLP: use one of top_k, top_p, dtop_p, or upcycle with one of them, train",
            )
            for rule, more in (
                ("expert_threshold", "--weights renormalized"),
                ("seq_top_k", "--weights renormalized"),
                ("relu", ""),
            )
        ),
    ],
)
def test_what_cannot_be_upcycled(llama: Path, refused: Refused, flags: str, says: str) -> None:
    refused.from_hf(llama, says, flags=tuple(flags.split()), code=2)


def test_a_model_with_experts_is_not_upcycled(tmp_path: Path, refused: Refused) -> None:
    _, folder = export(tmp_path / "model", "qwen3-moe")
    flags = ("--upcycle-experts", "8")
    refused.from_hf(folder, "the model has 4 experts already", "dense", flags=flags, code=2)


def test_a_dense_model_that_training_does_not_have_is_named(
    tmp_path: Path, refused: Refused
) -> None:
    save_random("qwen3, tied", tmp_path / "dense")
    change: dict[str, Any] = {"use_sliding_window": True}
    edit_json(tmp_path / "dense" / "config.json", lambda config: config.update(change))
    flags = ("--upcycle-experts", "8")
    refused.from_hf(tmp_path / "dense", "use_sliding_window is True", flags=flags, code=2)


def test_the_doctor_knows_that_copies_are_meant(llama: Path, tmp_path: Path) -> None:
    from megatron_dynmoe.data.finding import FAILED, WARNING
    from megatron_dynmoe.doctor.checkpoint.look import look

    make(llama, tmp_path / "megatron", upcycling=Upcycling(4))
    found = {check.name: check for check in look(tmp_path / "megatron")}
    assert found["copies"].state == WARNING and "upcycling" in (found["copies"].remedy or "")
    assert all(check.state != FAILED for check in found.values())
