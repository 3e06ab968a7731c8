"""Writes a training tokenizer into an exported folder, in the form that transformers loads.

A SentencePiece model becomes a tokenizer.json (sentencepiece_json.py), so that loading needs
neither sentencepiece nor code from the folder. Every export is read back and compared with the
tokenizer that made the training data. transformers is imported only when a function is called.
"""

import json
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from megatron_dynmoe.conversion.hugging_face import sentencepiece_json
from megatron_dynmoe.conversion.hugging_face.sentencepiece_json import CONTROL, UNUSED, USER_DEFINED
from megatron_dynmoe.data.tokenizer import Tokenizer, build_tokenizer

# Text as corpora hold it: an export that gives other ids for one of these is refused.
ORDINARY_TEXTS = (
    "A plain sentence, with 12,345.67 numbers (and brackets).",
    "Two sentences. The second isn't like the first; “it's quoted” — twice!",
    "First paragraph.\n\nSecond paragraph:\n- one\n- two\n",
    'def f(x: int) -> str:\n    if x != 0:\n        return f"{x:>8}"\n    # the end\n',
    "See https://example.org/a_b?c=d&e=%20 or write to someone@example.org.",
    "Größe, café, naïve, Ελληνικά, русский, 日本語の文章, العربية",
)
# Each of these is for one thing that has gone wrong in some conversion.
HARD_TEXTS = (
    "",
    " ",
    "   ",
    "\n",
    "\t\ttabs\tbetween\t words",
    " one leading space",
    "   three leading, two  between, three trailing   ",
    "line\r\nends\rof\x0bfive\x0c\n\n\n\nkinds\x85 \u2028 \u2029",
    "spaces \u00a0 no-break, \u3000 ideographic, \u2009 thin, \u200b zero, \ufeff mark",
    "\x00 NUL \x01\x02 control \x1b[0m \x7f",
    "emoji 🙂👍🏽 👩‍👩‍👧‍👦 🇩🇪 and \U0010ffff \ue000 \ufffd",
    "e\u0301 and é, a\u0323\u0307, ﬁ\u0301, ①②, ½, ㎏, \uff46\uff55ll, 한국 and \u1112\u1161\u11ab",
    "中文字符没有空格。 שלום עולם ไทย हिन्दी \U0001d518\U0001d52b 𠜎",
    "▁ the separator ▁▁itself▁",
    "<s> <unk></s><pad> <0x0A> [INST] <|endoftext|> <mask>",
    "====----____    aaaaaaaaaaaaa\n\n\n\n\n\n\n bababababa 0000000000000",
    "x" * 3000,
    "loooong" * 400,
)
# Files of a Hugging Face tokenizer that are copied, if they exist; no others are.
HUGGING_FACE_FILES = (
    *("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json"),
    *("tokenizer.model", "sentencepiece.bpe.model", "spiece.model", "spm.model", "tekken.json"),
    *("vocab.json", "vocab.txt", "merges.txt", "chat_template.jinja", "chat_template.json"),
)


def export_tokenizer(source: Path, output: Path, sample_texts: Sequence[str] = ()) -> list[str]:
    """Write the tokenizer `source` into the folder `output` and compare what the two encode.

    Call it after config.json is written, because AutoTokenizer reads that, too. A tokenizer made of
    a SentencePiece model adds no begin or end token to a text, as in training, and treats the names
    of special tokens within a text as text, as SentencePiece does (`split_special_tokens`). The
    model itself is copied, too, to tokenizer.model.

    Args:
        source: the value of --tokenizer-model: a SentencePiece model, or a Hugging Face folder or
            tokenizer.json.
        output: an existing folder.
        sample_texts: texts to compare in addition to the built-in ones.

    Returns:
        The unusual texts that get other ids than in training. The list is usually empty;
        sentencepiece_json.py says what can be in it.

    Raises:
        ValueError: the source is not a tokenizer, its kind cannot be written, or an ordinary text
            gets other ids, or is decoded differently, than in training.
    """
    texts = [*HARD_TEXTS, *sample_texts]
    if source.is_dir() or source.suffix == ".json":
        trained = build_tokenizer("HuggingFaceTokenizer", source, include_special_tokens=False)
        _copy_files(source, output)
        decode = None
    else:
        trained = build_tokenizer("SentencePieceTokenizer", source)
        proto = sentencepiece_json.read_model(source)
        _write_json(proto, source, output)
        decode = _sentencepiece_decode(source)
        with_rules = (CONTROL, USER_DEFINED, UNUSED)
        texts += [f"{p.piece}a {p.piece}" for p in proto.pieces if p.type in with_rules]

    exported = _load(output)
    _require_equal_ordinary(trained, exported, decode, source)
    return [text for text in texts if _encode(exported, text) != _trained_ids(trained, text)]


def special_token_ids(folder: Path) -> dict[str, int]:
    """bos_token_id, eos_token_id and pad_token_id for the generation_config.json of `folder`.

    Ids that the tokenizer lacks are left out. But if there is no padding token, the end token pads:
    generate would choose that, too, with a warning.
    """
    tokenizer = _load(folder)
    ids = {name: getattr(tokenizer, name) for name in ("bos_token_id", "eos_token_id")}
    pad = tokenizer.pad_token_id
    ids["pad_token_id"] = ids["eos_token_id"] if pad is None else pad
    return {name: number for name, number in ids.items() if number is not None}


def _write_json(proto: Any, source: Path, output: Path) -> None:
    from sentencepiece import SentencePieceProcessor

    tokenizer = json.loads(sentencepiece_json.to_rust_tokenizer(proto).to_str())
    if "merges" in tokenizer["model"]:
        # Merges are written as text, which Transformers 4 can read, too; no piece holds a space.
        tokenizer["model"]["merges"] = [" ".join(pair) for pair in tokenizer["model"]["merges"]]
    text = json.dumps(tokenizer, indent=2, ensure_ascii=False)
    (output / "tokenizer.json").write_text(text + "\n", "utf-8")
    shutil.copyfile(source, output / "tokenizer.model")
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "clean_up_tokenization_spaces": False,
        "padding_side": "left",
        "split_special_tokens": True,
    }
    processor = SentencePieceProcessor(model_file=str(source))
    for name in ("bos", "eos", "unk", "pad"):
        number = getattr(processor, f"{name}_id")()
        if number >= 0:
            config[f"{name}_token"] = processor.id_to_piece(number)
    if "pad_token" not in config:  # without one a batch could not be padded
        # Transformers' collators put no loss on padding. If it is the end token, a model that is
        # trained further never learns to end. With bytes no text has an unknown piece.
        unused = "unk_token" if proto.trainer_spec.byte_fallback else "eos_token"
        if unused in config:
            config["pad_token"] = config[unused]
    _write_config(config, output)


def _copy_files(source: Path, output: Path) -> None:
    if source.is_dir():
        for name in HUGGING_FACE_FILES:
            if (source / name).is_file():
                shutil.copyfile(source / name, output / name)
    else:
        shutil.copyfile(source, output / "tokenizer.json")
        _write_config({"tokenizer_class": "PreTrainedTokenizerFast"}, output)


def _write_config(config: dict[str, Any], output: Path) -> None:
    text = json.dumps(config, indent=2, ensure_ascii=False)
    (output / "tokenizer_config.json").write_text(text + "\n", "utf-8")


def _load(folder: Path) -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(str(folder), trust_remote_code=False)


def _sentencepiece_decode(source: Path) -> Callable[[list[int]], str]:
    from sentencepiece import SentencePieceProcessor

    return SentencePieceProcessor(model_file=str(source)).decode


def _encode(tokenizer: Any, text: str) -> list[int]:
    return tokenizer.encode(text, add_special_tokens=False)


def _trained_ids(tokenizer: Tokenizer, text: str) -> list[int]:
    return tokenizer.encode_batch([text])[0].tolist()


def _require_equal_ordinary(
    trained: Tokenizer, exported: Any, decode: Callable[[list[int]], str] | None, source: Path
) -> None:
    for text in ORDINARY_TEXTS:
        ids = _trained_ids(trained, text)
        actual = _encode(exported, text)
        if actual != ids:
            raise ValueError(
                f"tokenizer {source}: its export gives {text!r} the ids {actual}, training gave it "
                f"{ids}. The model would see tokens that it was not trained on: export without a "
                "tokenizer and add one that fits"
            )
        known = [i for i in ids if i != exported.unk_token_id]  # each writes unknowns its own way
        if decode and exported.decode(known, skip_special_tokens=True) != decode(known):
            raise ValueError(
                f"tokenizer {source}: its export decodes the ids of {text!r} as "
                f"{exported.decode(known)!r}, SentencePiece as {decode(known)!r}"
            )
