"""Tokenizers that encode a batch of texts to NumPy, with the same ids as Megatron's tokenizers.

The names are Megatron-LM's `--tokenizer-type`. The module imports neither torch nor Megatron. It
imports transformers only for a Hugging Face folder that cannot be read faithfully without it.
"""

import json
import os
import re
from abc import ABC, abstractmethod
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from megatron_dynmoe.settings.messages.command_line import UsageError

SENTENCEPIECE_TYPES = ("SentencePieceTokenizer", "GPTSentencePieceTokenizer", "Llama2Tokenizer")
TOKENIZER_TYPES = (*SENTENCEPIECE_TYPES, "HuggingFaceTokenizer")

# This lists what can be given, for messages about anything else.
KINDS = (
    f"a SentencePiece model, which ends in .model ({', '.join(SENTENCEPIECE_TYPES)}), or a Hugging "
    "Face folder or tokenizer.json (HuggingFaceTokenizer)"
)
# The tiktoken files of some models have these names: OpenAI's and Qwen's, and Mistral's.
_TIKTOKEN_NAMES = ("*.tiktoken", "tekken.json")
# A line of the first kind: a token in base64, and its rank. Llama 3 has such a tokenizer.model.
_TIKTOKEN_LINE = re.compile(rb"[A-Za-z0-9+/]+={0,2} \d+\r?\n")

# With these settings of tokenizer_config.json, the ids are those of tokenizer.json alone.
_NEUTRAL_SETTINGS = {
    *("backend", "chat_template", "clean_up_tokenization_spaces", "is_local", "model_input_names"),
    *("model_max_length", "model_specific_special_tokens", "padding_side", "tokenizer_class"),
    *("truncation_side", "special_tokens_map_file", "name_or_path"),
}
_SPECIAL_TOKENS = {f"{name}_token" for name in ("bos", "eos", "unk", "sep", "pad", "cls", "mask")}
_EXTRA_SPECIAL_TOKENS = {"additional_special_tokens", "extra_special_tokens"}


def build_tokenizer(
    tokenizer_type: str, model: str | Path, *, include_special_tokens: bool = True
) -> "Tokenizer":
    """Build the tokenizer that Megatron calls `tokenizer_type`.

    Args:
        model: the SentencePiece model file; or a Hugging Face folder or tokenizer.json.
        include_special_tokens: for Hugging Face only: whether to add the tokens that the tokenizer
            itself puts around a text (Megatron's default).

    Raises:
        UsageError: an unknown type, or a model that cannot be loaded.
    """
    if tokenizer_type not in TOKENIZER_TYPES:
        raise UsageError(
            f"--tokenizer-type is {tokenizer_type}, which is not supported: use one of "
            f"{', '.join(TOKENIZER_TYPES)}"
        )
    path = Path(model)
    if not path.exists():
        raise UsageError(
            f"--tokenizer-model is {model}: there is no such file or folder (a model on a hub has "
            "to be downloaded to a folder first)"
        )
    tiktoken = _tiktoken_file(path)
    if tiktoken is not None:
        raise UsageError(
            f"--tokenizer-model is {tiktoken}, a tiktoken file, which is none of the supported "
            f"kinds: give {KINDS}"
        )
    if tokenizer_type in SENTENCEPIECE_TYPES:
        return SentencePieceTokenizer(path)
    return HuggingFaceTokenizer(path, include_special_tokens)


class Tokenizer(ABC):
    """What the pipeline needs from a tokenizer; several threads may use it at once.

    Attributes:
        vocab_size: its size as Megatron counts it, which decides the dtype of the stored tokens.
        eod: the id of the end-of-document token, None if the tokenizer has none.
    """

    vocab_size: int
    eod: int | None

    @abstractmethod
    def encode_batch(self, texts: list[str]) -> Sequence[np.ndarray]:
        """The ids of each text: int32 arrays of shape [tokens of the text]."""


class SentencePieceTokenizer(Tokenizer):
    """A SentencePiece model; it adds no begin or end token, and `eod` is the model's `</s>`."""

    def __init__(self, path: Path) -> None:
        from sentencepiece import SentencePieceProcessor

        self._processor = SentencePieceProcessor()
        try:
            self._processor.Load(str(path))
        except (OSError, RuntimeError) as error:
            raise UsageError(
                f"--tokenizer-model is {path}, which is no SentencePiece model: give {KINDS}"
            ) from error
        self.vocab_size = self._processor.get_piece_size()
        eos = self._processor.eos_id()
        self.eod = eos if eos >= 0 else None

    def encode_batch(self, texts: list[str]) -> Sequence[np.ndarray]:
        # The interpreter lock is free while this runs.
        return self._processor.encode(texts, return_type="numpy", num_threads=1)


class HuggingFaceTokenizer(Tokenizer):
    """A Hugging Face tokenizer with its own begin and end tokens; `eod` is its `eos_token`.

    It loads tokenizer.json directly if that is known to give the same ids as transformers'
    AutoTokenizer, which Megatron uses. A folder that needs more (a class that rebuilds the
    tokenizer, add_bos_token, special tokens outside tokenizer.json) goes through AutoTokenizer,
    and pays for its import.
    """

    def __init__(self, path: Path, include_special_tokens: bool) -> None:
        # The pipeline's threads are the parallelism; the library's own would compete with them.
        os.environ["TOKENIZERS_PARALLELISM"] = "false"
        self._include_special_tokens = include_special_tokens
        try:
            loaded = _load_json(path) or _load_with_transformers(path)
        except Exception as error:  # the Rust library raises bare Exception
            raise UsageError(
                f"--tokenizer-model is {path}, which cannot be loaded ({error}): give {KINDS}"
            ) from error
        self._tokenizer, self.eod = loaded
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        self.vocab_size = self._tokenizer.get_vocab_size(with_added_tokens=True)

    def encode_batch(self, texts: list[str]) -> Sequence[np.ndarray]:
        encodings = self._tokenizer.encode_batch_fast(
            texts, add_special_tokens=self._include_special_tokens
        )
        return [np.array(encoding.ids, np.int32) for encoding in encodings]


def _tiktoken_file(path: Path) -> Path | None:
    """The tiktoken file that `path` means, if there is one."""
    candidates = [path]
    if path.is_dir():
        if (path / "tokenizer.json").exists():
            return None
        candidates = [file for name in _TIKTOKEN_NAMES for file in sorted(path.glob(name))]
        candidates += [path / "tokenizer.model"]
    for file in candidates:
        if any(file.match(name) for name in _TIKTOKEN_NAMES):
            return file
        if file.is_file():
            with open(file, "rb") as stream:
                if _TIKTOKEN_LINE.fullmatch(stream.readline(1024)):
                    return file
    return None


def _load_json(path: Path) -> tuple[Any, int | None] | None:
    """The Rust tokenizer and its eod id, or None if AutoTokenizer would change the tokenizer."""
    from tokenizers import Tokenizer as RustTokenizer

    file = path / "tokenizer.json" if path.is_dir() else path
    if not file.exists():
        return None
    tokenizer = RustTokenizer.from_file(str(file))
    config_file = file.parent / "tokenizer_config.json"
    config = json.loads(config_file.read_text("utf-8")) if config_file.exists() else {}
    if path.is_dir() and not _is_plain(file.parent, config, tokenizer):
        return None
    eos = config.get("eos_token") or config.get("sep_token")
    eos = eos["content"] if isinstance(eos, dict) else eos
    return tokenizer, tokenizer.token_to_id(eos) if eos else None


def _is_plain(folder: Path, config: dict[str, Any], tokenizer: Any) -> bool:
    """Whether AutoTokenizer would use the folder's tokenizer.json unchanged."""
    if config.get("tokenizer_class") not in ("PreTrainedTokenizerFast", "TokenizersBackend"):
        return False
    if (folder / "special_tokens_map.json").exists() or (folder / "added_tokens.json").exists():
        return False
    added = {token.content for token in tokenizer.get_added_tokens_decoder().values()}
    for name, value in config.items():
        if name in _SPECIAL_TOKENS:
            tokens = [value]
        elif name in _EXTRA_SPECIAL_TOKENS:
            tokens = list(value.values()) if isinstance(value, dict) else value
        elif name == "added_tokens_decoder":
            tokens = list(value.values())
        elif name in _NEUTRAL_SETTINGS:
            continue
        else:
            return False
        contents = {t["content"] if isinstance(t, dict) else t for t in tokens}
        if not contents - {None} <= added:
            return False
    return True


def _load_with_transformers(path: Path) -> tuple[Any, int | None]:
    from transformers import AutoTokenizer

    # If this were not set, transformers would ask on the terminal about a folder with its own code.
    tokenizer = AutoTokenizer.from_pretrained(
        str(path), local_files_only=True, trust_remote_code=False
    )
    if not getattr(tokenizer, "is_fast", False):
        raise ValueError("it has no fast (Rust) form: save it with a tokenizer.json")
    # If the sep or the cls token is missing, Megatron uses the end or the begin token for it, and
    # the other way round. That may make a special token of an ordinary one.
    special = {}
    for one, other in (("eos_token", "sep_token"), ("bos_token", "cls_token")):
        values = {name: getattr(tokenizer, name) for name in (one, other)}
        if None in values.values() and any(values.values()):
            missing = one if values[one] is None else other
            special[missing] = values[one] or values[other]
    tokenizer.add_special_tokens(special)
    eos = tokenizer.eos_token
    return tokenizer.backend_tokenizer, None if eos is None else tokenizer.eos_token_id
