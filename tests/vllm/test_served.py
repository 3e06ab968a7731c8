"""Models served by vLLM over HTTP, against Transformers: tokens, log-probabilities, refusals.

vLLM computes attention over pages of its own cache, and experts by its own kernels, for batches
that it puts together itself. Its log-probabilities come in float32 and cannot be ours to the bit.
"""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from functools import cache
from typing import Any

import pytest

from tests.vllm import reference
from tests.vllm.conftest import Served
from tests.vllm.server import Answer

pytestmark = pytest.mark.long

TOLERANCE = 1e-4  # of a log-probability
TEXTS = (
    "It is a truth",
    "def main(argv):\n    return",
    "The house was empty, and the rain had not stopped since the evening before; nobody spoke.",
    "Word, n. A sound, or a combination of sounds, that means something. " * 5,
)
NEW = 24


def prompts(served: Served) -> list[list[int]]:
    """Token ids of the texts, and of parts of them: 20 different ones of 2 to 120 tokens."""
    whole = [served.tokenizer(text)["input_ids"][:120] for text in TEXTS]
    return [ids[: max(2, len(ids) * part // 5)] for ids in whole for part in range(1, 6)]


@cache
def expected(model: Any, prompt: tuple[int, ...]) -> Answer:
    """The reference's greedy continuation."""
    tokens = reference.continue_greedily(model, list(prompt), NEW)
    found = reference.of_tokens(model, [*prompt, *tokens])
    return Answer([*prompt], tokens, found[len(prompt) - 1 :], found[: len(prompt) - 1])


def check(served: Served, prompt: list[int], answer: Answer) -> None:
    """Compare an answer with the reference's."""
    wanted = expected(served.model, tuple(prompt))
    assert answer.prompt == prompt
    assert answer.tokens == wanted.tokens
    assert answer.log_probs == pytest.approx(wanted.log_probs, abs=TOLERANCE)
    if answer.prompt_log_probs:
        assert answer.prompt_log_probs == pytest.approx(wanted.prompt_log_probs, abs=TOLERANCE)


def test_one_prompt_at_a_time(served: Served) -> None:
    for prompt in prompts(served)[4::5]:
        (answer,) = served.server.complete(prompt, NEW, prompt_logprobs=0)
        assert len(answer.prompt_log_probs) == len(prompt) - 1
        check(served, prompt, answer)


def test_prompts_of_different_lengths_in_one_request(served: Served) -> None:
    several = prompts(served)[::3]
    assert len({len(prompt) for prompt in several}) > 3
    answers = served.server.complete(several, NEW)
    for prompt, answer in zip(several, answers, strict=True):
        check(served, prompt, answer)


def test_twenty_requests_at_once(served: Served) -> None:
    many = prompts(served)
    assert len(many) == 20
    with ThreadPoolExecutor(len(many)) as pool:
        answers = pool.map(lambda prompt: served.server.complete(prompt, NEW)[0], many)
        for prompt, answer in zip(many, answers, strict=True):
            check(served, prompt, answer)


def test_a_text_is_encoded_as_by_the_exported_tokenizer(served: Served) -> None:
    (answer,) = served.server.complete(TEXTS[2], NEW)
    check(served, served.tokenizer(TEXTS[2])["input_ids"], answer)


def test_sampling_draws_from_the_model(served: Served) -> None:
    prompt = prompts(served)[2]
    heat, top_p = 0.8, 0.7
    drawn = []
    for seed in (1, 1, 2):
        fields = {"temperature": heat, "top_p": top_p, "seed": seed}
        (answer,) = served.server.complete(prompt, NEW, **fields)
        assert reference.in_nucleus(served.model, prompt, answer.tokens, heat, top_p)
        found = reference.of_tokens(served.model, prompt + answer.tokens)[len(prompt) - 1 :]
        assert answer.log_probs == pytest.approx(found, abs=TOLERANCE)
        drawn.append(answer.tokens)
    assert drawn[0] == drawn[1] != drawn[2]


def test_a_prompt_longer_than_the_models_positions_is_refused(served: Served) -> None:
    positions = served.model.config.max_position_embeddings
    status, answer = served.server.post(
        "/v1/completions", prompt=[5] * (positions + 1), max_tokens=1
    )
    message = answer["error"]["message"]
    assert status == 400, answer
    assert str(positions) in message and str(positions + 1) in message
    # And it goes on serving.
    assert len(served.server.complete([5] * (positions - 2), 1)[0].tokens) == 1


def test_a_missing_cap_is_named_with_the_remedy(served: Served) -> None:
    config, said = served.model.config, served.server.log.read_text()
    padded = config.model_type == "dynmoe" and config.cap(training=False) is None
    assert ("inference_max_experts_per_token is not set" in said) == padded
