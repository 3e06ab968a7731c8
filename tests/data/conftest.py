"""Texts, tokenizers and the command line for the tests of the data tools."""

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest

from megatron_dynmoe.cli import preprocess
from megatron_dynmoe.data.train_tokenizer import train_tokenizer

ROOT = Path(__file__).resolve().parents[2]
CORPUS = ROOT / "examples" / "data"

# Each is here for one thing that has gone wrong in some tokenizer or reader.
ODD_TEXTS = [
    "plain",
    "",
    " ",
    "\n",
    "  leading and trailing  ",
    "\t\tindented()\n\n\n\nlines\r\nof\rthree kinds",
    "\x00nul \x01 \x7f \x85 control",
    "</s> <s> <unk> <pad> [INST] special tokens' names",
    "日本語 漢字 مرحبا Ελληνικά",
    "emoji 👩‍👩‍👧 \U0010ffff",
    "é and e\u0301, ﬁ, ①, \u00a0, \u200b, \ufeff, \u2028",
    "▁▁ the separator itself ▁",
    "1234567890 3.14159",
    "x" * 5000,
    "a very long document " * 20000,
    "",
]


@dataclass
class Result:
    """How a command ended."""

    code: int
    out: str
    error: str


Run = Callable[..., Result]


@pytest.fixture(scope="session")
def sp_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A SentencePiece model of 600 pieces."""
    prefix = tmp_path_factory.mktemp("sentencepiece") / "small"
    return train_tokenizer([str(CORPUS / "code.jsonl.gz")], str(prefix), 600)


@pytest.fixture(scope="session")
def hf_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A byte-level BPE in Hugging Face's form, which puts <s> and </s> around each text."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=["<s>", "</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(["the quick brown fox jumps over the lazy dog"] * 9, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", special_tokens=[("<s>", 0), ("</s>", 1)]
    )
    return save_hf(tokenizer, tmp_path_factory.mktemp("byte-level"))


def save_hf(tokenizer: object, folder: Path, **settings: object) -> Path:
    """Write `tokenizer` to `folder` as transformers writes a tokenizer of no particular class."""
    tokenizer.save(str(folder / "tokenizer.json"))  # type: ignore[attr-defined]
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<s>"}
    config |= {"eos_token": "</s>"} | settings
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return folder


def write_jsonl(path: Path, texts: list[str], key: str = "text") -> Path:
    path.write_text("".join(json.dumps({key: text}) + "\n" for text in texts))
    return path


def outputs(prefix: Path, key: str = "text") -> tuple[bytes, bytes]:
    """The bytes of .bin and .idx."""
    stem = f"{prefix}_{key}_document"
    return Path(f"{stem}.bin").read_bytes(), Path(f"{stem}.idx").read_bytes()


@pytest.fixture
def run_preprocess(sp_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Run:
    """Run the command line in this process, with the small model and prefix tmp_path/out."""

    def run(*args: object) -> Result:
        argv = [str(arg) for arg in args]
        for flag, value in (
            ("--tokenizer-type", "SentencePieceTokenizer"),
            ("--tokenizer-model", str(sp_model)),
            ("--output-prefix", str(tmp_path / "out")),
        ):
            if flag not in argv:
                argv += [flag, value]
        try:
            preprocess.main(argv)
        except SystemExit as end:
            captured = capsys.readouterr()
            if isinstance(end.code, str):
                return Result(1, captured.out, end.code)
            return Result(int(end.code or 0), captured.out, captured.err)
        captured = capsys.readouterr()
        return Result(0, captured.out, captured.err)

    return run
