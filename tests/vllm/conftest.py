"""Models as a user exports them, and a vLLM server for each.

Nothing here runs without ``DYNMOE_VLLM``, the folder of vLLM's environment, which
``make test-vllm`` makes and names.
"""

import json
import os
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from tests.helpers.tiny_export import command_environment, export_tiny, make_tokenizer
from tests.vllm import reference
from tests.vllm.server import Server, serving

QUICKSTART = Path("runs/quickstart/checkpoints")


class Case(NamedTuple):
    """One way to serve.

    Attributes:
        export: the name of the model, see :func:`export`.
        flags: of the server, as a user types them.
        settings: of the reference, to the same effect.
    """

    export: str
    flags: str
    settings: dict[str, Any] = {}  # noqa: RUF012


CAP = {"inference_max_experts_per_token": 2}
OURS = "--trust-remote-code --enforce-eager"
CASES = {
    "quickstart": Case("quickstart", OURS),
    "quickstart-cap": Case("quickstart", f"{OURS} --hf-overrides '{json.dumps(CAP)}'", CAP),
    # No theta, so that nothing but its layout tells its router from one of a fixed number.
    "top-p": Case("top-p", OURS),
    "mixtral": Case("mixtral", "--enforce-eager"),
}


@pytest.fixture(scope="session")
def environment() -> Path:
    """The folder of vLLM's environment."""
    folder = Path(os.environ.get("DYNMOE_VLLM", ""))
    if not folder.name:
        pytest.skip("needs an environment with vLLM: make test-vllm makes one and runs this")
    assert (folder / "bin/python").exists(), f"DYNMOE_VLLM is {folder}, which has no bin/python"
    return folder.absolute()


class Served(NamedTuple):
    """A server, the model that it serves, in Transformers, and its tokenizer."""

    server: Server
    model: Any
    tokenizer: Any
    case: Case


@pytest.fixture(scope="session", params=CASES)
def served(
    request: pytest.FixtureRequest,
    environment: Path,
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[Served]:
    """Every test runs with one case before the next one's server starts."""
    from transformers import AutoTokenizer

    case = CASES[request.param]
    log = tmp_path_factory.mktemp(request.param) / "server.log"
    exported = export(case.export, tmp_path_factory.getbasetemp() / f"model-{case.export}")
    model = reference.load(exported, **case.settings)
    tokenizer = AutoTokenizer.from_pretrained(exported)
    with serving(environment, exported, log, shlex.split(case.flags)) as server:
        yield Served(server, model, tokenizer, case)


def export(name: str, folder: Path) -> Path:
    """Write a model as ``dynmoe convert`` does, unless an earlier case did; return its folder.

    ``quickstart`` is a model of ``make quickstart``, from a short run if there is none yet. The
    others have random weights.
    """
    output = folder / name
    if output.exists():
        return output
    folder.mkdir(exist_ok=True)
    if name == "quickstart":
        convert("to-hf", "--load", trained(folder), "--output", output)
        return output
    tokenizer = make_tokenizer(folder)
    shape = {"hidden_size": 128, "num_key_value_heads": 2, "max_position_embeddings": 256}
    # The CPU's kernel for experts takes sizes that 32 divides, and pads others.
    shape |= {"initializer_range": 0.2, "moe_intermediate_size": 32}
    if name == "mixtral":
        shape |= {"mlp_layer_types": None, "routing": "top_k", "num_experts_per_tok": 2}
        export_tiny(folder / "ours", tokenizer, **shape)
        convert("to-hf", "--load", folder / "ours", "--format", "mixtral", "--output", output)
        return output
    shape |= {"routing": "top_p", "threshold": 0.8, "qk_norm": True}
    shape |= {"shared_expert_intermediate_size": 16, "shared_expert_gate": True}
    export_tiny(folder / "ours", tokenizer, **shape)
    convert("from-hf", "--model", folder / "ours", "--save", folder / "checkpoint")
    convert("to-hf", "--load", folder / "checkpoint", "--output", output)
    return output


def trained(folder: Path) -> Path:
    """Checkpoints of the quickstart's model: yours, or those of a run of 60 steps."""
    if QUICKSTART.is_dir():
        return QUICKSTART
    run(
        "bash",
        "examples/quickstart.sh",
        RUN=str(folder / "run"),
        STEPS="60",
        PATH=f"{Path(sys.executable).parent}:{os.environ['PATH']}",
    )
    return folder / "run/checkpoints"


def convert(*words: object) -> None:
    """Call ``dynmoe convert``."""
    run(sys.executable, "-m", "megatron_dynmoe", "convert", *map(str, words), "--quiet")


def run(*words: str, **variables: str) -> None:
    """Run a command and show what it says if it fails."""
    done = subprocess.run(
        words, env=command_environment() | variables, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
