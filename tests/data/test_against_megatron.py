"""The files are those that Megatron's tokenizers and its dataset builder make, byte for byte."""

from importlib.util import find_spec
from pathlib import Path

import pytest

from megatron_dynmoe.cli import preprocess as command
from megatron_dynmoe.data.preprocess import preprocess
from megatron_dynmoe.data.tokenizer import build_tokenizer

from .conftest import ODD_TEXTS, outputs, save_hf, write_jsonl

pytestmark = pytest.mark.megatron


def megatron_tokenizer(library: str, path: Path, **settings: object):
    from megatron.core.tokenizers import MegatronTokenizer

    return MegatronTokenizer.from_pretrained(
        tokenizer_path=str(path), metadata_path={"library": library}, **settings
    )


def megatron_outputs(tokenizer, texts: list[str], prefix: Path, append_eod: bool):
    """What Megatron-LM's tools/preprocess_data.py makes of `texts`, by its own classes."""
    from megatron.core.datasets.indexed_dataset import DType, IndexedDatasetBuilder

    stem = f"{prefix}_text_document"
    dtype = DType.optimal_dtype(tokenizer.vocab_size)
    builder = IndexedDatasetBuilder(f"{stem}.bin", dtype=dtype)
    for text in texts:
        ids = list(tokenizer.tokenize(text))
        if ids and append_eod:
            ids.append(tokenizer.eod)
        builder.add_document(ids, [len(ids)] if ids else [])
    builder.finalize(f"{stem}.idx")
    return outputs(prefix)


def assert_same(ours, theirs, tmp_path: Path, append_eod: bool, texts=ODD_TEXTS) -> None:
    source = write_jsonl(tmp_path / "in.jsonl", texts)
    preprocess([str(source)], str(tmp_path / "ours"), ours, append_eod=append_eod)
    expected = megatron_outputs(theirs, texts, tmp_path / "theirs", append_eod)
    assert outputs(tmp_path / "ours") == expected


@pytest.mark.parametrize("append_eod", [False, True])
@pytest.mark.parametrize("kind", ["SentencePieceTokenizer", "Llama2Tokenizer"])
def test_sentencepiece(kind: str, append_eod: bool, sp_model: Path, tmp_path: Path) -> None:
    ours = build_tokenizer(kind, sp_model)
    assert_same(ours, megatron_tokenizer("sentencepiece", sp_model), tmp_path, append_eod)


@pytest.mark.skipif(find_spec("mistral_common") is None, reason="mistral-common is not installed")
def test_a_model_of_32000_pieces(tmp_path: Path) -> None:
    spec = find_spec("mistral_common")
    assert spec is not None and spec.submodule_search_locations is not None
    model = Path(spec.submodule_search_locations[0], "data", "tokenizer.model.v1")
    ours = build_tokenizer("Llama2Tokenizer", model)
    assert_same(ours, megatron_tokenizer("sentencepiece", model), tmp_path, append_eod=True)


@pytest.mark.parametrize("append_eod", [False, True])
@pytest.mark.parametrize("special", [True, False])
def test_hugging_face(special: bool, append_eod: bool, hf_folder: Path, tmp_path: Path) -> None:
    ours = build_tokenizer("HuggingFaceTokenizer", hf_folder, include_special_tokens=special)
    theirs = megatron_tokenizer("huggingface", hf_folder, include_special_tokens=special)
    assert_same(ours, theirs, tmp_path, append_eod)


@pytest.mark.parametrize("sides", ["lstrip", "rstrip"])
def test_an_added_token_that_strips_where_megatron_fails(
    sides: str, hf_folder: Path, tmp_path: Path
) -> None:
    from tokenizers import AddedToken, Tokenizer

    tokenizer = Tokenizer.from_file(str(hf_folder / "tokenizer.json"))
    tokenizer.add_special_tokens([AddedToken("<mask>", special=True, **{sides: True})])
    folder = save_hf(tokenizer, tmp_path)
    apart, stripped = ["the fox", "fox<mask>dog", "a </s> b"], ["fox <mask> dog"]
    for special in (True, False):
        out = tmp_path / str(special)
        out.mkdir()
        ours = build_tokenizer("HuggingFaceTokenizer", folder, include_special_tokens=special)
        theirs = megatron_tokenizer("huggingface", folder, include_special_tokens=special)
        assert_same(ours, theirs, out, True, apart + stripped * special)
        if not special:
            with pytest.raises(TypeError):
                megatron_outputs(theirs, stripped, out / "theirs", True)
        (ids,) = ours.encode_batch(stripped)
        assert tokenizer.token_to_id("<mask>") in ids


def test_hugging_face_settings_outside_tokenizer_json(hf_folder: Path, tmp_path: Path) -> None:
    # The end token is no part of tokenizer.json and the begin token is added by a setting:
    # both are transformers' doing.
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(hf_folder / "tokenizer.json"))
    folder = save_hf(tokenizer, tmp_path, eos_token="<|new|>", add_bos_token=True)
    ours = build_tokenizer("HuggingFaceTokenizer", folder)
    texts = [*ODD_TEXTS, "the fox <|new|> jumps"]
    assert_same(ours, megatron_tokenizer("huggingface", folder), tmp_path, True, texts)


@pytest.mark.parametrize("vocab_size", [65499, 65500])
def test_large_vocabularies_take_four_bytes(vocab_size: int, tmp_path: Path) -> None:
    from tokenizers import AddedToken, Tokenizer, models, pre_tokenizers

    words = {f"w{i}": i for i in range(vocab_size - 2)}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="w0"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.add_special_tokens([AddedToken(t, special=True) for t in ("<s>", "</s>")])
    folder = save_hf(tokenizer, tmp_path)
    ours = build_tokenizer("HuggingFaceTokenizer", folder)
    assert ours.vocab_size == vocab_size
    texts = ["w1 w65000 w65497", "", "w2"]
    assert_same(ours, megatron_tokenizer("huggingface", folder), tmp_path, True, texts)


def test_megatron_reads_it(sp_model: Path, tmp_path: Path) -> None:
    from megatron.core.datasets.indexed_dataset import IndexedDataset

    tokenizer = build_tokenizer("SentencePieceTokenizer", sp_model)
    source = write_jsonl(tmp_path / "in.jsonl", ODD_TEXTS)
    preprocess([str(source)], str(tmp_path / "out"), tokenizer)
    dataset = IndexedDataset(str(tmp_path / "out_text_document"))
    expected = [ids.tolist() for ids in tokenizer.encode_batch(ODD_TEXTS) if len(ids)]
    assert [dataset[i].tolist() for i in range(len(dataset))] == expected
    assert len(dataset.document_indices) == len(ODD_TEXTS) + 1


def test_every_tokenizer_flag_is_accepted_or_refused_with_a_reason() -> None:
    from argparse import ArgumentParser

    from megatron.training.arguments import _add_tokenizer_args

    def flags(parser: ArgumentParser) -> set[str]:
        return {flag for action in parser._actions for flag in action.option_strings}

    theirs = flags(_add_tokenizer_args(ArgumentParser()))
    assert theirs <= flags(command._parser())
