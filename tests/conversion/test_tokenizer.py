"""The exported tokenizer against SentencePiece itself, on real models and real text."""

import gzip
import io
import json
import re
import shutil
from collections.abc import Callable
from importlib import resources
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sentencepiece import SentencePieceProcessor, SentencePieceTrainer
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from transformers import AutoTokenizer, DataCollatorForLanguageModeling

from megatron_dynmoe.conversion.hugging_face.tokenizer import (
    HARD_TEXTS,
    ORDINARY_TEXTS,
    export_tokenizer,
    special_token_ids,
)
from megatron_dynmoe.data.tokenizer import build_tokenizer
from megatron_dynmoe.data.train_tokenizer import train_tokenizer

DATA = Path(__file__).resolve().parents[2] / "examples" / "data"
KINDS = ("book", "code", "dictionary", "reference")

IDENTITY = {"normalization_rule_name": "identity", "remove_extra_whitespaces": False}
# What each has of its own: normalizer, prefix, fallback, special pieces, where their ids are.
MODELS = {
    "bpe": {"model_type": "bpe"},
    "bpe-llama": {"model_type": "bpe", "byte_fallback": True, **IDENTITY},
    "bpe-ids": {
        **{"model_type": "bpe", "pad_id": 0, "unk_id": 3, "bos_id": -1, "eos_id": 1},
        **{"unk_piece": "[UNK]", "pad_piece": "[PAD]", "control_symbols": ["<sep>", "<cls>"]},
    },
    "bpe-own": {
        **{"model_type": "bpe", "byte_fallback": True, **IDENTITY},
        "user_defined_symbols": ["<b>", "the", "▁▁▁", "  ", "==="],
    },
    "bpe-suffix": {"model_type": "bpe", "treat_whitespace_as_suffix": True},
    "bpe-casefold": {"model_type": "bpe", "normalization_rule_name": "nfkc_cf"},
    "unigram": {"model_type": "unigram"},
    "unigram-t5": {
        **{"model_type": "unigram", "pad_id": 0, "unk_id": 2, "bos_id": -1, "eos_id": 1},
        **{"control_symbols": ["<sep>"], "user_defined_symbols": ["the", "==="]},
    },
    "unigram-bytes": {"model_type": "unigram", "byte_fallback": True, **IDENTITY},
}
RULER = re.compile(r"(.)\1{5}")
# Combining characters, which tokenizers maps by the grapheme and SentencePiece does not.
COMBINING = next(text for text in HARD_TEXTS if "\u0323" in text)


def texts(kind: str, count: int = 12) -> list[str]:
    with gzip.open(DATA / f"{kind}.jsonl.gz", "rt", encoding="utf-8") as lines:
        return [json.loads(line)["text"] for line, _ in zip(lines, range(count), strict=False)]


@pytest.fixture(scope="module")
def train(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    corpus = [line for kind in KINDS for text in texts(kind, 5) for line in text.split("\n")]

    def train(vocab_size: int = 600, **settings: object) -> Path:
        model = io.BytesIO()
        SentencePieceTrainer.train(
            sentence_iterator=iter(line for line in corpus if line.strip()),
            model_writer=model,
            vocab_size=vocab_size,
            num_threads=1,
            minloglevel=2,
            **settings,
        )
        path = tmp_path_factory.mktemp("model") / "any name.model"
        path.write_bytes(model.getvalue())
        return path

    return train


@pytest.fixture(scope="module")
def quickstart_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """As tools/train_tokenizer.py makes it."""
    prefix = tmp_path_factory.mktemp("quickstart") / "tokenizer"
    return train_tokenizer([str(DATA / "code.jsonl.gz")], str(prefix), 1000)


def mistral(name: str) -> Path:
    return Path(str(resources.files("mistral_common") / "data" / name))


def encode(tokenizer: Any, text: str) -> list[int]:
    return tokenizer.encode(text, add_special_tokens=False)


def assert_same(model: Path, folder: Path, some: list[str]) -> None:
    trained = SentencePieceProcessor(model_file=str(model))
    exported = AutoTokenizer.from_pretrained(str(folder))
    for text in some:
        ids = trained.encode(text)
        assert encode(exported, text) == ids, text[:100]
        known = [i for i in ids if i != trained.unk_id()]
        assert exported.decode(known, skip_special_tokens=True) == trained.decode(known)


@pytest.mark.parametrize(
    "name", ["tokenizer.model.v1", "mistral_instruct_tokenizer_240323.model.v3"]
)
def test_published_models_of_32000_pieces(name: str, tmp_path: Path) -> None:
    assert export_tokenizer(mistral(name), tmp_path) == []
    assert_same(mistral(name), tmp_path, [t for kind in KINDS for t in texts(kind)])


def test_the_quickstarts_tokenizer(quickstart_model: Path, tmp_path: Path) -> None:
    samples = [text for kind in KINDS for text in texts(kind)]
    assert export_tokenizer(quickstart_model, tmp_path, samples) == []
    assert_same(quickstart_model, tmp_path, samples)
    assert special_token_ids(tmp_path) == {
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": 0,  # it has none of its own, and no text has the unknown piece
    }
    assert (tmp_path / "tokenizer.model").read_bytes() == quickstart_model.read_bytes()


@pytest.mark.parametrize("name", MODELS)
def test_every_kind_of_model(name: str, train: Callable[..., Path], tmp_path: Path) -> None:
    model = train(**MODELS[name])
    odd = set(export_tokenizer(model, tmp_path))
    may_differ = {COMBINING}
    if MODELS[name].items() >= IDENTITY.items():
        # One of its own pieces is three spaces, and a text of nothing else gets no prefix.
        may_differ = {"   "} if name == "bpe-own" else set()
    assert odd <= may_differ
    # By the line: over a whole book, Unigram's sums in 32 bits decide near ties by rounding, and
    # in rulers of one character ties.
    lines = [line for kind in KINDS for text in texts(kind, 3) for line in text.split("\n")]
    assert_same(model, tmp_path, [line for line in lines[::3] if not RULER.search(line)])


def test_ids_of_special_tokens(train: Callable[..., Path], tmp_path: Path) -> None:
    export_tokenizer(train(**MODELS["bpe-ids"]), tmp_path)
    assert special_token_ids(tmp_path) == {"eos_token_id": 1, "pad_token_id": 0}
    tokenizer = AutoTokenizer.from_pretrained(str(tmp_path))
    assert (tokenizer.unk_token, tokenizer.unk_token_id) == ("[UNK]", 3)
    assert tokenizer.bos_token is None
    assert len(tokenizer) == 600
    assert tokenizer.decode([1, *encode(tokenizer, "text"), 1], skip_special_tokens=True) == "text"


def test_chat_templates_have_their_tokens_if_they_are_asked_for(
    quickstart_model: Path, tmp_path: Path
) -> None:
    """Otherwise the names of tokens are text, as in the training, in templates, too."""
    export_tokenizer(quickstart_model, tmp_path)
    for splits in (True, False):
        given = {} if splits else {"split_special_tokens": False}
        tokenizer = AutoTokenizer.from_pretrained(str(tmp_path), **given)
        tokenizer.chat_template = "{{ messages[0].content }}{{ eos_token }}"
        ids = tokenizer.apply_chat_template([{"role": "user", "content": "if x"}])["input_ids"]
        assert (ids[-1] == tokenizer.eos_token_id) is not splits
        assert tokenizer.decode(ids) == "if x</s>"


def test_collators_leave_the_end_of_a_text_to_be_learned(
    quickstart_model: Path, tmp_path: Path
) -> None:
    export_tokenizer(quickstart_model, tmp_path)
    collate = DataCollatorForLanguageModeling(AutoTokenizer.from_pretrained(tmp_path), mlm=False)
    batch = collate([{"input_ids": [5, 6, 2]}, {"input_ids": [5, 2]}])
    assert batch["labels"].tolist() == [[5, 6, 2], [-100, 5, 2]]


def test_nothing_is_added_and_names_of_tokens_stay_text(
    quickstart_model: Path, tmp_path: Path
) -> None:
    export_tokenizer(quickstart_model, tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(str(tmp_path))
    ids = tokenizer("a </s>")["input_ids"]
    assert ids == SentencePieceProcessor(model_file=str(quickstart_model)).encode("a </s>")
    assert not {1, 2} & set(ids)
    assert tokenizer.padding_side == "left"


@pytest.mark.parametrize("model_type", ["dynmoe", "mixtral", "llama"])
def test_config_json_of_every_format_leaves_it_alone(
    model_type: str, train: Callable[..., Path], tmp_path: Path
) -> None:
    # AutoTokenizer looks there for a class; Llama's would put a space before each text.
    config = {"model_type": model_type, "auto_map": {"AutoConfig": "nothing.Nothing"}}
    (tmp_path / "config.json").write_text(json.dumps(config))
    model = train(model_type="bpe", add_dummy_prefix=False, **IDENTITY)
    assert export_tokenizer(model, tmp_path) == []
    assert_same(model, tmp_path, list(ORDINARY_TEXTS))


@pytest.fixture(scope="module")
def pair(quickstart_model: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Any]:
    folder = tmp_path_factory.mktemp("exported")
    export_tokenizer(quickstart_model, folder)
    return (
        SentencePieceProcessor(model_file=str(quickstart_model)),
        AutoTokenizer.from_pretrained(str(folder)),
    )


PARTS = ["  ", "\n", "return", "self.", "▁", "</s>", "<0x0A>", "é", "e\u0301", "🙂", "\x00", "=="]


@settings(max_examples=150)
@given(text=st.text() | st.lists(st.sampled_from(PARTS) | st.text(max_size=3)).map("".join))
def test_any_text(pair: tuple[Any, Any], text: str) -> None:
    trained, exported = pair
    assert encode(exported, text) == trained.encode(text)


def test_a_difference_is_returned_or_refused(
    train: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = train(**MODELS["bpe"])
    assert export_tokenizer(model, tmp_path, ["fine", "e\u0301\u0323\u0302 is not"]) == [
        COMBINING,
        "e\u0301\u0323\u0302 is not",
    ]
    monkeypatch.setattr(
        "megatron_dynmoe.conversion.hugging_face.tokenizer.ORDINARY_TEXTS", (COMBINING,)
    )
    with pytest.raises(ValueError, match=r"any name\.model: its export gives 'e"):
        export_tokenizer(model, tmp_path)


@pytest.fixture(scope="module")
def hf_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A byte-level tokenizer beside files of another kind."""
    folder = tmp_path_factory.mktemp("hugging face")
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    trainer = trainers.BpeTrainer(
        vocab_size=500,
        special_tokens=["<s>", "</s>", "<pad>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts("reference", 3), trainer)
    tokenizer.save(str(folder / "tokenizer.json"))
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "</s>"}
    config |= {"pad_token": "<pad>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    (folder / "model.safetensors").write_bytes(b"weights")
    (folder / "tokenization_own.py").write_text("raise SystemExit")
    return folder


def test_a_hugging_face_folder(hf_folder: Path, tmp_path: Path) -> None:
    samples = [text for kind in KINDS for text in texts(kind, 5)]
    assert export_tokenizer(hf_folder, tmp_path, samples) == []
    written = sorted(path.name for path in tmp_path.iterdir())
    assert written == ["tokenizer.json", "tokenizer_config.json"]
    trained = build_tokenizer("HuggingFaceTokenizer", hf_folder, include_special_tokens=False)
    exported = AutoTokenizer.from_pretrained(str(tmp_path))
    for text in samples:
        assert encode(exported, text) == trained.encode_batch([text])[0].tolist()
    assert special_token_ids(tmp_path) == {"eos_token_id": 1, "pad_token_id": 2}


def test_a_tokenizer_json_alone(hf_folder: Path, tmp_path: Path) -> None:
    source = tmp_path / "source.json"
    shutil.copyfile(hf_folder / "tokenizer.json", source)
    output = tmp_path / "output"
    output.mkdir()
    assert export_tokenizer(source, output) == []
    assert special_token_ids(output) == {}


def test_what_is_no_tokenizer(train: Callable[..., Path], tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no such file"):
        export_tokenizer(tmp_path / "absent.model", tmp_path)
    (tmp_path / "noise.model").write_bytes(b"noise")
    with pytest.raises(ValueError, match="no SentencePiece model"):
        export_tokenizer(tmp_path / "noise.model", tmp_path)
    with pytest.raises(ValueError, match="model_type 4: only unigram"):
        export_tokenizer(train(model_type="char", vocab_size=80), tmp_path)
