"""What stands around a text: the tokenizer's begin and end tokens, once and at the right place."""

from collections.abc import Callable

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from megatron_dynmoe.huggingface.encoding import (
    encode_continuation,
    encode_document,
    encode_prompt,
    encode_text,
)

BEGIN, END = 1, 0


def byte_level(template: str | None, **special: str) -> PreTrainedTokenizerFast:
    rust = Tokenizer(models.BPE())
    rust.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    rust.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=300,
        special_tokens=["<|end|>", "<|begin|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    rust.train_from_iterator(["the river runs past the mill"] * 9, trainer)
    if template:
        names = [("<|end|>", END), ("<|begin|>", BEGIN)]
        rust.post_processor = processors.TemplateProcessing(single=template, special_tokens=names)
    return PreTrainedTokenizerFast(tokenizer_object=rust, **special)


EOS = {"eos_token": "<|end|>"}
BOS = {"bos_token": "<|begin|>"}
# Template, tokens that the tokenizer knows by name; what stands before and after a document.
TOKENIZERS = {
    "nothing known": (None, {}, [], []),
    "GPT-2's": (None, EOS | {"bos_token": "<|end|>"}, [], [END]),
    "adds nothing": (None, EOS | BOS, [], [END]),
    "Llama's": ("<|begin|> $A", EOS | BOS, [BEGIN], [END]),
    "ends": ("$A <|end|>", EOS, [], [END]),
    "begins and ends": ("<|begin|> $A <|end|>", EOS | BOS, [BEGIN], [END]),
    "begins with the end token": ("<|end|> $A", EOS | {"bos_token": "<|end|>"}, [END], [END]),
    "begins, without an end": ("<|begin|> $A", BOS, [BEGIN], []),
}


@pytest.fixture(params=TOKENIZERS, ids=lambda name: name.replace(" ", "-"))
def case(request: pytest.FixtureRequest) -> tuple[PreTrainedTokenizerFast, list[int], list[int]]:
    template, special, begin, end = TOKENIZERS[request.param]
    return byte_level(template, **special), begin, end


@pytest.mark.parametrize("text", ["the river", " the river ", "a", "\n", "ü 河"])
def test_prompts_begin_and_documents_end(case, text: str) -> None:
    tokenizer, begin, end = case
    own = encode_text(tokenizer, text)
    assert tokenizer.decode(own) == text
    assert encode_prompt(tokenizer, text) == begin + own
    assert encode_document(tokenizer, text) == begin + own + end


def test_an_empty_prompt_is_the_begin_token_alone(case) -> None:
    tokenizer, begin, end = case
    assert encode_prompt(tokenizer, "") == begin
    assert encode_document(tokenizer, "") in (begin + end, end)


@pytest.mark.parametrize("encode", [encode_prompt, encode_document])
def test_tokens_that_the_text_spells_out_are_not_added_again(case, encode: Callable) -> None:
    tokenizer, begin, end = case
    spelled = tokenizer.decode(begin) + "the river"
    if encode is encode_document:
        spelled += tokenizer.decode(end)
    assert encode(tokenizer, spelled) == encode(tokenizer, "the river")


@pytest.mark.parametrize("spaced", [False, True], ids=["plain", "space-before-a-text"])
def test_a_continuation_goes_on_in_a_word(spaced: bool) -> None:
    """Llama's tokenizer and others put a space before a text."""
    rust = Tokenizer(models.BPE())
    rust.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=spaced)
    rust.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    rust.train_from_iterator(
        ["the river"] * 9,
        trainers.BpeTrainer(vocab_size=300, initial_alphabet=alphabet, show_progress=False),
    )
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=rust)
    assert encode_text(tokenizer, "river")  # " river" with the space
    assert tokenizer.decode(encode_continuation(tokenizer, "ver")) == "ver"
    assert tokenizer.decode(encode_continuation(tokenizer, " river")) == " river"
