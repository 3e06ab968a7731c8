"""vLLM's server as a process of its own environment, and requests to it over HTTP."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, NamedTuple

from tests.helpers.ports import reserved_port

# A machine with much other work needs minutes for vLLM's imports.
SECONDS_TO_START = 1500
NAME = "model"


class Answer(NamedTuple):
    """One continuation of one prompt.

    Attributes:
        prompt: its tokens.
        tokens: the new tokens.
        log_probs: of each new token, under the model and not under the sampling.
        prompt_log_probs: of each token of the prompt but the first; empty if not asked for.
    """

    prompt: list[int]
    tokens: list[int]
    log_probs: list[float]
    prompt_log_probs: list[float]


class Server(NamedTuple):
    """A server that is up.

    Attributes:
        url: where it listens.
        log: everything it has said.
    """

    url: str
    log: Path

    def post(self, path: str, **fields: Any) -> tuple[int, dict[str, Any]]:
        """Send a request; return the status and the answer."""
        request = urllib.request.Request(
            self.url + path,
            json.dumps({"model": NAME} | fields).encode(),
            {"Content-Type": "application/json"},
        )
        try:
            with urllib.request.urlopen(request, timeout=900) as response:
                return response.status, json.load(response)
        except urllib.error.HTTPError as error:
            return error.code, json.load(error)

    def complete(self, prompt: Any, max_tokens: int, **fields: Any) -> list[Answer]:
        """Continue a prompt, or several in one request.

        Args:
            prompt: a text, token ids, or a list of either.
            max_tokens: the number of new tokens: an end-of-text token ends nothing.
            fields: further fields of the request; greedy without any.
        """
        wanted = {"logprobs": 0, "return_token_ids": True, "ignore_eos": True, "temperature": 0}
        status, answer = self.post(
            "/v1/completions", prompt=prompt, max_tokens=max_tokens, **(wanted | fields)
        )
        assert status == 200, answer
        return [_read(choice) for choice in sorted(answer["choices"], key=lambda one: one["index"])]


def _read(choice: dict[str, Any]) -> Answer:
    prompt = choice["prompt_token_ids"]
    after_first = (choice.get("prompt_logprobs") or [None])[1:]
    return Answer(
        prompt,
        choice["token_ids"],
        choice["logprobs"]["token_logprobs"],
        [of[str(token)]["logprob"] for of, token in zip(after_first, prompt[1:], strict=False)],
    )


@contextmanager
def serving(
    environment: Path, model: Path, log: Path, flags: Sequence[str] = ()
) -> Iterator[Server]:
    """Serve a folder in float32 on the loopback address, as long as the block lasts.

    Args:
        environment: where vLLM is installed.
        log: the file that keeps everything the server says.
        flags: further flags of the server.
    """
    keeper, port = reserved_port()
    command = [environment / "bin/python", "-m", "vllm.entrypoints.openai.api_server"]
    command += ["--model", model, "--served-model-name", NAME, "--dtype", "float32"]
    command += ["--host", "127.0.0.1", "--port", port, *flags]
    # Offline, so that nothing but the folder is served, and without what this checkout could lend.
    variables = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    variables |= {
        "HF_HUB_OFFLINE": "1",
        "HF_HOME": str(log.parent / "huggingface"),  # the model's code is copied there
        "VLLM_NO_USAGE_STATS": "1",
        "VLLM_CPU_KVCACHE_SPACE": "1",  # GiB
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",  # else it waits for core 0, even if 1 is free
        "LD_PRELOAD": str(environment / "lib/libiomp5.so"),
    }
    with log.open("w") as output:
        process = subprocess.Popen(
            [*map(str, command)],
            env=variables,
            cwd=log.parent,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    server = Server(f"http://127.0.0.1:{port}", log)
    try:
        _wait_until_up(server, process)
        yield server
    finally:
        _end(process)
        keeper.close()


def _wait_until_up(server: Server, process: subprocess.Popen[bytes]) -> None:
    end = time.monotonic() + SECONDS_TO_START
    while True:
        try:
            urllib.request.urlopen(server.url + "/health", timeout=10).close()
            return
        except OSError:
            time.sleep(1)
        if process.poll() is not None or time.monotonic() > end:
            why = f"exit code {process.poll()}" if process.poll() is not None else "no answer"
            last_lines = "\n".join(server.log.read_text().splitlines()[-40:])
            raise AssertionError(f"the server is not up ({why}); its last words:\n{last_lines}")


def _end(process: subprocess.Popen[bytes]) -> None:
    """End the server with the engine's process, and wait for both."""
    with suppress(subprocess.TimeoutExpired, ProcessLookupError):
        os.killpg(process.pid, signal.SIGTERM)
        process.wait(timeout=60)
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()
