"""Transformers serves an exported folder: over HTTP it gives what the model gives here."""

import importlib.util
import json
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_dynmoe.conversion.convert import Target, to_hf
from megatron_dynmoe.huggingface.encoding import encode_prompt
from megatron_dynmoe.use.load import load_config, load_model, load_tokenizer
from tests.helpers.ports import reserved_port
from tests.helpers.tiny_export import command_environment, export_tiny, make_tokenizer

NEEDED = ("fastapi", "openai", "uvicorn")
MISSING = [name for name in NEEDED if importlib.util.find_spec(name) is None]
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(bool(MISSING), reason=f"transformers[serving] lacks {', '.join(MISSING)}"),
]
PROMPTS = (
    *("It is a truth universally acknowledged", "She was", "The house", "He had never been"),
    *("In the evening", "There is no", "A letter from my sister came in the morning", "What"),
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An exported folder with its settings of generation and a real tokenizer."""
    given, folder = tmp_path_factory.mktemp("given"), tmp_path_factory.mktemp("serve") / "model"
    curve = [{"experts_per_token": 1, "threshold": 0}, {"experts_per_token": 4, "threshold": 0.8}]
    settings = {"threshold": 0.6, "max_position_embeddings": 128, "budget_curve": curve}
    export_tiny(given, make_tokenizer(given), **settings)
    to_hf(given, Target(folder))
    return folder


@pytest.fixture(scope="module", params=["", "--continuous-batching"], ids=["", "batching"])
def url(
    folder: Path, tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest
) -> Iterator[str]:
    """Where a server listens, without and with continuous batching."""
    log = tmp_path_factory.mktemp("log") / "log"
    more = [request.param, "--cb-num-blocks", "16"] if request.param else []
    keeper, port = reserved_port()
    with keeper, log.open("w") as file:
        server = subprocess.Popen(
            [
                *(sys.executable, "-m", "megatron_dynmoe.huggingface", "serve", str(folder)),
                *("--device", "cpu", *more),
                *("--host", "127.0.0.1", "--port", port),
            ],
            stdout=file,
            stderr=subprocess.STDOUT,
            env=command_environment(),
        )
        url = f"http://127.0.0.1:{port}"
        try:
            wait_for(url, server, log)
            yield url
        finally:
            server.kill()  # with continuous batching it would not end by itself
            server.wait()


def wait_for(url: str, server: subprocess.Popen[bytes], log: Path, seconds: int = 240) -> None:
    until = time.monotonic() + seconds
    while server.poll() is None and time.monotonic() < until:
        try:
            with urllib.request.urlopen(f"{url}/health", timeout=5):
                return
        except (urllib.error.URLError, OSError):
            time.sleep(0.5)
    raise AssertionError(f"no server:\n{log.read_text()[-3000:]}")


def post(url: str, path: str, **fields: Any) -> dict[str, Any]:
    body = json.dumps(fields).encode()
    request = urllib.request.Request(url + path, body, {"Content-Type": "application/json"})
    with urllib.request.urlopen(request, timeout=240) as response:
        return json.load(response)


def test_completions_are_those_of_generate(
    folder: Path, url: str, request: pytest.FixtureRequest
) -> None:
    """One by one, and all at once: requests that wait for each other lose or mix nothing."""
    tokenizer, model = load_tokenizer(folder), load_model(folder, load_config(folder))

    def ask(prompt: str, **more: Any) -> dict[str, Any]:
        fields = {"model": str(folder), "prompt": prompt, "max_tokens": 12, "temperature": 0}
        return post(url, "/v1/completions", **fields, **more)

    def check(prompt: str, answer: dict[str, Any], **budget: Any) -> None:
        ids = torch.tensor([tokenizer(prompt)["input_ids"]])
        assert ids[0].tolist() == encode_prompt(tokenizer, prompt)  # what dynmoe generate reads
        how = {"do_sample": False, "max_new_tokens": 12, **budget}
        expected = model.generate(ids, **how)[0, ids.shape[1] :]
        (choice,) = answer["choices"]
        assert choice["text"] == tokenizer.decode(expected, skip_special_tokens=True)
        assert answer["usage"]["prompt_tokens"] == ids.shape[1]
        assert answer["usage"]["completion_tokens"] == len(expected)

    for prompt in PROMPTS[:2]:
        check(prompt, ask(prompt))
    with ThreadPoolExecutor(len(PROMPTS)) as pool:
        for prompt, answer in zip(PROMPTS, pool.map(ask, PROMPTS), strict=True):
            check(prompt, answer)
    for budget in ({"experts_per_token": 1}, {"experts_per_token": 3.5}):
        answer = ask(PROMPTS[0], generation_config=json.dumps(budget))
        # With continuous batching all requests are sampled and routed as the first one asked.
        check(PROMPTS[0], answer, **({} if "batching" in request.node.name else budget))


def test_a_prompt_that_is_longer_than_the_positions_is_answered(folder: Path, url: str) -> None:
    """As for any model here: the server does not ask how many positions there are (vLLM does)."""
    prompt = " ".join(["house"] * 60)
    answer = post(url, "/v1/completions", model=str(folder), prompt=prompt, max_tokens=2)
    assert answer["usage"]["prompt_tokens"] > load_config(folder).max_position_embeddings
    assert answer["usage"]["completion_tokens"] == 2
