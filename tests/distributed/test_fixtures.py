"""What an earlier version saved still loads, and goes on as it did.

The files in ``tests/fixtures`` are those of commit 6356c4e; ``tests/fixtures/make.py`` says how.
"""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file

from tests.distributed.harness import Case, Results, add
from tests.fixtures import make

pytestmark = [pytest.mark.distributed, pytest.mark.megatron]

FIGURES = json.loads(make.FIGURES.read_text())
GOES_ON = {name: add(make.going_on(f"old_{name}", name, make.CHECKPOINT)) for name in make.LAYOUTS}
EXPORTED = add(
    Case(
        "old_exported",
        flags=f"to-hf --load {make.CHECKPOINT} --output {{dir}}/old_exported",
        entry="megatron_dynmoe.cli.convert:main",
    )
)


@pytest.mark.parametrize("layout", make.LAYOUTS)
def test_a_run_goes_on_from_an_old_checkpoint_as_it_did(results: Results, layout: str) -> None:
    result = results[GOES_ON[layout]]
    losses = FIGURES["losses" if layout == "pp2ep2" else "losses_on_one_rank"]
    # Another processor rounds otherwise; a lost optimizer state is off by 1e-2 from step 2 on.
    assert result.losses == pytest.approx(losses, rel=1e-5)
    assert result.thresholds == pytest.approx(FIGURES["thresholds"], rel=1e-4)
    assert result.experts_per_token == pytest.approx(FIGURES["experts_per_token"], rel=1e-2)


def test_an_old_checkpoint_is_exported_to_the_same_weights_and_settings(results: Results) -> None:
    folder = results[EXPORTED].directory / "old_exported"
    old, new = (load_file(path / "model.safetensors") for path in (make.EXPORT, folder))
    assert old.keys() == new.keys()
    assert all(torch.equal(old[name], new[name]) for name in old)
    settings = [json.loads((path / "config.json").read_text()) for path in (make.EXPORT, folder)]
    assert settings[0].items() <= settings[1].items()  # a later version may say more


@pytest.mark.parametrize("with_its_own_code", [False, True])
def test_an_old_export_loads_and_computes_the_same(
    with_its_own_code: bool, tmp_path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = shutil.copytree(make.EXPORT, tmp_path / "exported")
    monkeypatch.setenv("HF_MODULES_CACHE", str(tmp_path / "modules"))
    got, want = make.figures_of_export(folder, with_its_own_code), FIGURES["exported"]
    assert got["loss"] == pytest.approx(want["loss"], rel=1e-5)
    assert got["experts_per_token"] == want["experts_per_token"]
    logits = [torch.tensor(figures["logits_of_the_last_token"]) for figures in (got, want)]
    torch.testing.assert_close(*logits, rtol=1e-4, atol=1e-5)
