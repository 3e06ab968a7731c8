"""Folders that want to be more than weights: nothing in them runs, reads elsewhere or fills memory.

`generate`, `evaluate`, `calibrate` and `analyze` load by the same three functions.
"""

import json
import os
import pickle
import resource
import shlex
import shutil
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

from megatron_dynmoe.data.tokenizer import build_tokenizer
from megatron_dynmoe.use import load
from tests.helpers.tiny_export import export_tiny, make_tokenizer

CODE = """open({evidence!r}, "w").close()
from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerFast
class Config(PreTrainedConfig):
    model_type = "hostile"
class Model(PreTrainedModel):
    config_class = Config
class Tokenizer(PreTrainedTokenizerFast):
    pass
"""


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("good")
    export_tiny(folder, make_tokenizer(tmp_path_factory.mktemp("tokenizer")))
    return folder


@pytest.fixture
def model(good: Path, tmp_path: Path) -> Path:
    return shutil.copytree(good, tmp_path / "model")


class Call:
    """Unpickled, it runs a command."""

    def __init__(self, command: str) -> None:
        self.command = command

    def __reduce__(self) -> Any:
        return os.system, (self.command,)


def edit(path: Path, **changes: Any) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def evidence_of(model: Path) -> Path:
    return model.parent / "evidence"


def write_code(model: Path, name: str = "hostile.py") -> None:
    (model / name).parent.mkdir(exist_ok=True)
    (model / name).write_text(CODE.format(evidence=str(evidence_of(model))))


def write_pickle(path: Path) -> None:
    path.write_bytes(pickle.dumps(Call(shlex.join(["touch", str(evidence_of(path.parent))]))))


AUTO_MAP = {
    "AutoConfig": "hostile.Config",
    "AutoModelForCausalLM": "hostile.Model",
    "AutoTokenizer": [None, "hostile.Tokenizer"],
}


def code_beside_a_known_model(model: Path) -> None:
    write_code(model)
    edit(model / "config.json", auto_map=AUTO_MAP)


def code_for_an_unknown_model(model: Path) -> None:
    code_beside_a_known_model(model)
    edit(model / "config.json", model_type="hostile")


def code_of_a_tokenizer(model: Path) -> None:
    write_code(model)
    edit(model / "tokenizer_config.json", tokenizer_class="Tokenizer", auto_map=AUTO_MAP)


def code_of_a_decoding_loop(model: Path) -> None:
    write_code(model, "custom_generate/generate.py")


def kernel_from_a_hub(model: Path) -> None:
    edit(model / "config.json", _attn_implementation="somebody/kernel")


def kernel_in_a_part(model: Path) -> None:
    edit(model / "config.json", text_config={"experts_implementation": "somebody/kernel:v1"})


def pickles_beside(model: Path) -> None:
    for name in ("pytorch_model.bin", "training_args.bin", "adapter_model.bin"):
        write_pickle(model / name)


def index_of(model: Path, name: str) -> None:
    keys = load_file(model / "model.safetensors")
    index = {"metadata": {}, "weight_map": dict.fromkeys(keys, name)}
    (model / "model.safetensors.index.json").write_text(json.dumps(index))


def pickle_in_the_index(model: Path) -> None:
    index_of(model, "pytorch_model.bin")
    write_pickle(model / "pytorch_model.bin")
    (model / "model.safetensors").unlink()


def index_that_leads_out(model: Path) -> None:
    index_of(model, "../outside.safetensors")
    shutil.move(model / "model.safetensors", model.parent / "outside.safetensors")
    shutil.copy(model.parent / "outside.safetensors", model / "other.safetensors")


def index_with_an_absolute_path(model: Path) -> None:
    index_that_leads_out(model)
    shutil.copy(model / "other.safetensors", model / "model.safetensors")
    index_of(model, str(model.parent / "outside.safetensors"))
    (model / "model.safetensors").unlink()


def declares(**settings: Any) -> Callable[[Path], None]:
    def change(model: Path) -> None:
        edit(model / "config.json", **settings)

    return change


def huge_header(model: Path) -> None:
    (model / "model.safetensors").write_bytes(struct.pack("<Q", 2**60) + b"{}")


def deep(name: str) -> Callable[[Path], None]:
    def change(model: Path) -> None:
        (model / name).write_text("[" * 10**5)

    return change


# What is done to a folder, and what is then said; "" if it loads and nothing happens.
ATTACKS = {
    "code beside a known model": (code_beside_a_known_model, ""),
    "code for an unknown model": (code_for_an_unknown_model, "custom code"),
    "code of a tokenizer": (code_of_a_tokenizer, "custom code"),
    "code of a decoding loop": (code_of_a_decoding_loop, ""),
    "kernel from a hub": (kernel_from_a_hub, "code from a hub"),
    "kernel in a part": (kernel_in_a_part, "code from a hub"),
    "pickles beside": (pickles_beside, ""),
    "pickle in the index": (pickle_in_the_index, "pickle"),
    "index that leads out": (index_that_leads_out, "only files in its own folder"),
    "index with an absolute path": (index_with_an_absolute_path, "only files in its own folder"),
    "huge vocabulary": (declares(vocab_size=10**10), "vocab_size is 10,000,000,000"),
    "huge experts": (declares(moe_intermediate_size=10**9), "number of parameters"),
    "huge hidden size": (declares(hidden_size=4 * 10**6), "much too few"),
    "many experts": (declares(num_experts=10**8), "num_experts is 100,000,000"),
    "many layers": (
        declares(num_hidden_layers=10**5, mlp_layer_types=["sparse"] * 10**5),
        "num_hidden_layers is 100,000",
    ),
    "huge header": (huge_header, "cut short or damaged"),
    "deep configuration": (deep("config.json"), "config.json"),
    "deep tokenizer": (deep("tokenizer.json"), "tokenizer"),
}


def load_all(folder: Path) -> None:
    load.be_quiet()
    config = load.load_config(folder)
    load.load_tokenizer(folder)
    load.load_model(folder, config)


@pytest.mark.parametrize("name", ATTACKS)
def test_nothing_runs_and_nothing_else_is_read(model: Path, name: str) -> None:
    attack, says = ATTACKS[name]
    attack(model)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    if says:
        with pytest.raises(ValueError, match=says):
            load_all(model)
    else:
        load_all(model)
    assert not evidence_of(model).exists()
    grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before  # KB
    assert grown < 500_000


def test_the_attacks_would_work(model: Path) -> None:
    """On those who trust the folder."""
    import transformers

    code_for_an_unknown_model(model)
    transformers.AutoConfig.from_pretrained(model, trust_remote_code=True)
    assert evidence_of(model).exists()
    evidence_of(model).unlink()
    pickles_beside(model)
    pickle.loads((model / "pytorch_model.bin").read_bytes())
    assert evidence_of(model).exists()


def test_the_data_tools_run_no_code_of_a_tokenizer(
    model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And nobody is asked on the terminal whether to."""
    monkeypatch.setattr("builtins.input", lambda *_: "y")
    code_of_a_tokenizer(model)
    with pytest.raises(ValueError, match="custom code"):
        build_tokenizer("HuggingFaceTokenizer", model)
    assert not evidence_of(model).exists()
