"""Checks whether a tokenizer is the one with which a model was trained."""

from __future__ import annotations

import hashlib
import json
import tempfile
from pathlib import Path
from typing import Any

from megatron_dynmoe.conversion.convert import has_tokenizer
from megatron_dynmoe.settings.messages.command_line import UsageError
from megatron_dynmoe.storage.manifest import check_file, read_manifest
from megatron_dynmoe.use import load


def describe(tokenizer: Any, folder: Path) -> dict[str, Any]:
    """The number of tokens, a hash of which token has which id, and which files have changed.

    Args:
        folder: the tokenizer's folder; ``changed`` lists its files that, by the folder's manifest,
            were different when the model was exported.
    """
    pieces = sorted(tokenizer.get_vocab().items())
    digest = hashlib.sha256(json.dumps(pieces).encode()).hexdigest()
    changed = []
    for name, expected in (read_manifest(folder) or {}).items():
        if name in ("tokenizer.json", "tokenizer.model"):
            try:
                check_file(folder / name, expected)
            except ValueError:
                changed.append(name)
    return {"tokens": len(tokenizer), "sha256": digest[:16], "changed": changed}


def check_given(given: Path, tokenizer: Any, model: Path) -> None:
    """Refuse a tokenizer without the tokens of the model's own one, if that can be found.

    Args:
        given: the value of ``--tokenizer``.
        tokenizer: the tokenizer that was loaded from it.
        model: a Hugging Face folder, or the checkpoints of a Megatron run.

    Raises:
        UsageError: a token of the model's own tokenizer has another id, or is missing.
    """
    found = _own(model, given)
    if found is None:
        return
    where, own = found
    vocabulary = tokenizer.get_vocab()
    others = {piece: i for piece, i in own.get_vocab().items() if vocabulary.get(piece) != i}
    if others:
        piece, i = min(others.items(), key=lambda item: item[1])
        raise UsageError(
            f"--tokenizer {given} is not the model's: {len(others)} of {len(own)} tokens have "
            f"another id than in {where}, or none (the first is {piece!r}, {i} there): leave "
            "--tokenizer out"
        )


def _own(model: Path, given: Path) -> tuple[Path, Any] | None:
    """The tokenizer that the model names or contains, unless it is the given one."""
    if (model / "config.json").is_file():
        differs = has_tokenizer(model) and not model.samefile(given)
        return (model, load.load_tokenizer(model)) if differs else None
    from megatron_dynmoe.conversion.hugging_face.tokenizer import export_tokenizer
    from megatron_dynmoe.conversion.megatron.checkpoint import MegatronCheckpoint

    named = getattr(MegatronCheckpoint(model).args, "tokenizer_model", None)
    if not isinstance(named, str) or not Path(named).exists() or Path(named).samefile(given):
        return None
    with tempfile.TemporaryDirectory(prefix="dynmoe-tokenizer-") as scratch:
        (Path(scratch) / "config.json").write_text('{"model_type": "dynmoe"}')
        export_tokenizer(Path(named), Path(scratch))
        return Path(named), load.load_tokenizer(Path(scratch))
