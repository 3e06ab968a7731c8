"""Writes a SentencePiece model as a tokenizer.json: the same pieces, scores, and normalization.

A tokenizer.json cannot express everything that SentencePiece does, so rare texts get other ids:
- If two BPE merges to the same piece overlap, SentencePiece takes the left one, tokenizer.json the
  one that comes first in its list of merges.
- Character maps (nmt_nfkc and the like) are applied to the longest match by SentencePiece, and to
  whole graphemes by tokenizers: they differ on some sequences of combining characters.
- Unigram scores are summed over the text in 32 bits by SentencePiece and in 64 by tokenizers. The
  two may decide differently between segmentations that are equally likely (runs of one character),
  or almost so, far into a long text, because few digits of SentencePiece's sum are left there.
- A text that consists of a single user-defined piece gets no space in front.
"""

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

# SentencePiece's numbers for the types of pieces and of models.
NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = range(1, 7)
UNIGRAM, BPE = 1, 2

SPACE = "▁"


def read_model(path: Path) -> Any:
    """The ModelProto in the file `path`."""
    from sentencepiece import sentencepiece_model_pb2

    proto = sentencepiece_model_pb2.ModelProto()
    proto.ParseFromString(path.read_bytes())
    return proto


def to_rust_tokenizer(proto: Any) -> Any:
    """The `tokenizers.Tokenizer` that encodes as the SentencePiece model `proto` does.

    Unknown and control pieces are special tokens. SentencePiece never reads them from a text, so
    they need `encode_special_tokens`, which tokenizer.json does not store.

    Raises:
        ValueError: it is a model of characters or words.
    """
    from tokenizers import AddedToken, Tokenizer, decoders, normalizers

    tokenizer = Tokenizer(_model(proto))
    rules = [*_normalizers(proto)]
    if rules:
        tokenizer.normalizer = normalizers.Sequence(rules)
    if proto.trainer_spec.model_type == UNIGRAM:
        tokenizer.pre_tokenizer = _split_special_names(proto)

    spec = proto.normalizer_spec
    steps = [decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
    if spec.add_dummy_prefix or spec.remove_extra_whitespaces:
        spaces = 1000 if spec.remove_extra_whitespaces else 1  # all of them, or the added one
        steps.append(decoders.Strip(" ", spaces, 0))
    tokenizer.decoder = decoders.Sequence(steps)

    special = [p.piece for p in proto.pieces if p.type in (UNKNOWN, CONTROL)]
    tokenizer.add_special_tokens([AddedToken(t, normalized=False, special=True) for t in special])
    if proto.trainer_spec.model_type == BPE:
        # These are cut out of the normalized text, which never contains a piece with a space.
        found = [t for t in _user_defined(proto) if " " not in t or not spec.escape_whitespaces]
        tokenizer.add_tokens([AddedToken(t, normalized=True, special=False) for t in found])
    return tokenizer


def _model(proto: Any) -> Any:
    from tokenizers import models

    kind = proto.trainer_spec.model_type
    byte_fallback = proto.trainer_spec.byte_fallback
    unknown = next(i for i, piece in enumerate(proto.pieces) if piece.type == UNKNOWN)
    if kind == UNIGRAM:
        # -0.1 is what SentencePiece gives a user-defined piece, so that it nearly always wins.
        scores = [(p.piece, -0.1 if p.type == USER_DEFINED else p.score) for p in proto.pieces]
        return models.Unigram(scores, unk_id=unknown, byte_fallback=byte_fallback)
    if kind == BPE:
        return models.BPE(
            {piece.piece: i for i, piece in enumerate(proto.pieces)},
            _merges(proto),
            unk_token=proto.pieces[unknown].piece,
            fuse_unk=True,
            byte_fallback=byte_fallback,
        )
    raise ValueError(
        f"SentencePiece model_type {kind}: only unigram ({UNIGRAM}) and BPE ({BPE}) models can be "
        "written as a tokenizer.json"
    )


def _merges(proto: Any) -> list[tuple[str, str]]:
    """Every way to make a piece of two others, best score first."""
    normal = {piece.piece for piece in proto.pieces if piece.type == NORMAL}
    by_score = sorted(
        (piece for piece in proto.pieces if piece.type == NORMAL), key=lambda p: -p.score
    )
    return [
        (piece.piece[:cut], piece.piece[cut:])
        for piece in by_score
        # Longer left parts first: in a run of one character, the pieces on the left are longer.
        for cut in range(len(piece.piece) - 1, 0, -1)
        if piece.piece[:cut] in normal and piece.piece[cut:] in normal
    ]


def _normalizers(proto: Any) -> Iterator[Any]:
    """The steps of normalization in SentencePiece's order: characters, spaces, prefix, escape."""
    from tokenizers import Regex, normalizers

    spec = proto.normalizer_spec
    if spec.precompiled_charsmap:
        yield normalizers.Precompiled(spec.precompiled_charsmap)
    if spec.remove_extra_whitespaces:
        yield normalizers.Replace(Regex(rf"\A +|[ {SPACE}]+\z"), "")
        yield normalizers.Replace(Regex(" {2,}"), " ")
    if spec.escape_whitespaces:
        yield normalizers.Replace(" ", SPACE)
    if spec.add_dummy_prefix:
        # An empty text gets no prefix. User-defined pieces also pass through here once, so that
        # they can be found in normalized text, and must not change.
        bare = "|".join([r"\z", *(re.escape(piece) + r"\z" for piece in _user_defined(proto))])
        edge = r"(?<!\A)\z" if proto.trainer_spec.treat_whitespace_as_suffix else rf"\A(?!{bare})"
        yield normalizers.Replace(Regex(edge), SPACE if spec.escape_whitespaces else " ")


def _user_defined(proto: Any) -> list[str]:
    return [piece.piece for piece in proto.pieces if piece.type == USER_DEFINED]


def _split_special_names(proto: Any) -> Any:
    """Break names of special pieces after their first character.

    Unigram would find them in a text like any other piece; SentencePiece never does.
    """
    from tokenizers import Regex, pre_tokenizers

    names = [p.piece for p in proto.pieces if p.type in (UNKNOWN, CONTROL, BYTE)]
    breaks = "|".join(f"{re.escape(name[0])}(?={re.escape(name[1:])})" for name in names)
    return pre_tokenizers.Split(Regex(breaks), "merged_with_previous")
