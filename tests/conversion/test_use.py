"""What people do with an export: share it, save it again, train on, look for damage."""

from __future__ import annotations

import json
import os
import shlex
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch

from megatron_dynmoe.cli import convert as convert_command
from megatron_dynmoe.conversion.convert import FLAGS, Target, from_hf, to_hf
from megatron_dynmoe.conversion.megatron.checkpoint import MegatronCheckpoint
from megatron_dynmoe.use.calibrate import Calibration, write_calibration
from megatron_dynmoe.use.load import load_config
from tests.conversion.checkpoints import DTOP_P, TOP_K, TOP_P, model_config, write_megatron
from tests.helpers.commands import exit_code_of

main = partial(exit_code_of, convert_command.main)


def exported(tmp_path: Path, routing: dict, **options: object) -> Path:
    megatron = write_megatron(tmp_path / "megatron", model_config(**routing))
    to_hf(megatron, Target(tmp_path / "hf", **options))
    return tmp_path / "hf"


def test_others_may_read_all_of_a_folder(tmp_path: Path) -> None:
    old = os.umask(0o022)
    try:
        folder = exported(tmp_path, DTOP_P)
    finally:
        os.umask(old)
    assert {file.stat().st_mode & 0o777 for file in folder.iterdir()} == {0o644}


def test_a_folder_that_transformers_saved_again_comes_back(tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    import megatron_dynmoe.huggingface  # noqa: F401

    folder = exported(tmp_path, DTOP_P)
    AutoModelForCausalLM.from_pretrained(folder).save_pretrained(tmp_path / "again")
    from_hf(tmp_path / "again", tmp_path / "back", progress=False)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_theta_is_rounded_with_the_weights(tmp_path: Path, dtype: str) -> None:
    folder = exported(tmp_path, DTOP_P, dtype=dtype)
    from_hf(folder, tmp_path / "back", progress=False)
    checkpoint = MegatronCheckpoint(tmp_path / "back")
    offsets = checkpoint.read("decoder.layers.mlp.router.theta_offset").flatten()
    assert offsets.dtype == getattr(torch, dtype)
    theta = json.loads((folder / "config.json").read_text())["theta"]
    assert np.array_equal(np.float32(theta), (1 + offsets.float()).numpy())


def test_a_theta_that_the_weights_do_not_have_is_refused(tmp_path: Path) -> None:
    folder = exported(tmp_path, DTOP_P)
    config = json.loads((folder / "config.json").read_text())
    config["theta"][1] += 1e-3
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "manifest.json").unlink()
    with pytest.raises(ValueError, match="change theta_offset to change theta"):
        from_hf(folder, tmp_path / "back", progress=False)


def test_a_calibrated_top_k_model_trains_on(tmp_path: Path) -> None:
    folder = exported(tmp_path, TOP_K)
    measurement = type("Measurement", (), {"tokens": 10, "experts": 2.0, "loss": 1.0})
    found = Calibration(threshold=0.25, scope="global", target=2.0, measurement=measurement)
    write_calibration(folder, found, None, "text")
    flags = " ".join(from_hf(folder, tmp_path / "back", progress=False))
    assert "--moe-dynamic-routing top_p --moe-dynamic-threshold 0.25" in flags
    # No loss appears that the model was not trained with.
    assert "--moe-dynamic-balance-loss none" in flags
    assert "--moe-dynamic-dynamic-loss-coeff 0.0" in flags


def test_the_size_of_the_vocabulary_is_among_the_flags(tmp_path: Path) -> None:
    folder = exported(tmp_path, TOP_P)
    from_hf(folder, tmp_path / "back", progress=False)
    assert "--padded-vocab-size 13" in (tmp_path / "back" / FLAGS).read_text()


@pytest.mark.megatron
def test_the_flags_are_read_from_their_file_whatever_the_folder_is_called(
    tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    from argparse import ArgumentParser

    from megatron.training.arguments import add_megatron_arguments

    from megatron_dynmoe.jobs.recipes import recipe_flags
    from megatron_dynmoe.training.flags import add_flags

    folder = exported(tmp_path, TOP_P).rename(tmp_path / "it's mine")
    (folder / "tokenizer.json").touch()
    save = tmp_path / "and back"
    assert main(["from-hf", "--quiet", "--model", str(folder), "--save", str(save)]) == 0
    command = shlex.split(capsys.readouterr().out.splitlines()[-1])[3:-2]
    parser = add_flags(add_megatron_arguments(ArgumentParser(allow_abbrev=False)))
    args = parser.parse_args(command)
    assert (args.tokenizer_model, args.load) == (str(folder), str(save))
    assert args.moe_dynamic_routing == "top_p" and args.padded_vocab_size == 13
    recipe = recipe_flags(save / FLAGS)
    assert recipe[recipe.index("--tokenizer-model") + 1] == str(folder)


def test_the_balance_loss_of_stock_top_k_comes_along(tmp_path: Path) -> None:
    config = model_config(**TOP_K)
    loss = {"moe_router_load_balancing_type": "seq_aux_loss", "moe_aux_loss_coeff": 0.02}
    to_hf(write_megatron(tmp_path / "megatron", config, **loss), Target(tmp_path / "hf"))
    # Upstream divides by k = 2, ours does not.
    found = load_config(tmp_path / "hf")
    assert (found.balance_loss, found.balance_loss_coeff) == ("seq_aux_loss", 0.01)
    flags = " ".join(from_hf(tmp_path / "hf", tmp_path / "back", progress=False))
    assert "--moe-router-load-balancing-type seq_aux_loss --moe-aux-loss-coeff 0.02" in flags
    args = vars(MegatronCheckpoint(tmp_path / "back").args)
    assert {name: args[name] for name in loss} == loss


def test_a_flipped_bit_is_found_without_a_manifest_too(tmp_path: Path) -> None:
    megatron = write_megatron(tmp_path / "megatron", model_config(**DTOP_P))
    checkpoint = MegatronCheckpoint(megatron)
    weight = checkpoint.read("embedding.word_embeddings.weight")
    (checkpoint.folder / "manifest.json").unlink()
    (path,) = checkpoint.folder.glob("*.distcp")
    content = bytearray(path.read_bytes())
    at = content.index(weight.numpy().tobytes()) + 7
    content[at] ^= 1
    path.write_bytes(content)
    with pytest.raises(ValueError, match=rf"{path.name}: embedding.*checksum"):
        to_hf(megatron, Target(tmp_path / "hf"))
    assert not (tmp_path / "hf").exists()


def test_the_published_layout_is_named_where_it_cannot_be_run(
    tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    folder = exported(tmp_path, TOP_P, format="dynamic-moe")
    with pytest.raises(ValueError, match=r"published layout.*to-hf --load"):
        load_config(folder)
    # The remedy that it names works.
    assert (
        main(["to-hf", "--quiet", "--load", str(folder), "--output", str(tmp_path / "ours")]) == 0
    )
    assert load_config(tmp_path / "ours").threshold == [0.3, 0.3]
    arguments = ["--load", str(folder), "--output", str(tmp_path / "x"), "--iteration", "3"]
    assert main(["to-hf", "--quiet", *arguments]) == 2
    assert "--iteration" in capsys.readouterr().err


def test_what_the_command_line_says_is_not_blamed_on_the_folder(tmp_path: Path) -> None:
    from megatron_dynmoe.settings.config import DynMoEConfig

    folder = exported(tmp_path, TOP_P)
    with pytest.raises(ValueError, match=r"^--routing dtop_p: target_experts_per_token"):
        from_hf(folder, tmp_path / "back", routing=DynMoEConfig("dtop_p"), progress=False)
