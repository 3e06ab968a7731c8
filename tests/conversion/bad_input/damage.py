"""Ways to damage a folder, and a command that has to refuse it and leave everything as it was."""

from __future__ import annotations

import json
import struct
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from megatron_dynmoe.cli import convert as convert_command
from megatron_dynmoe.conversion.hugging_face import folder
from megatron_dynmoe.storage.manifest import MANIFEST, write_manifest
from tests.helpers.commands import exit_code_of

main = partial(exit_code_of, convert_command.main)

Damage = Callable[[Path], Any]


class Refused:
    """Runs a command that must fail with one line and leave everything as it was."""

    def __init__(self, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        self.output = tmp_path / "out" / "new"
        self.output.parent.mkdir()
        self._capsys = capsys

    def __call__(self, *command: Any, says: tuple[str, ...], code: int = 1) -> str:
        before = listing(self.output.parent)
        self._capsys.readouterr()
        assert main([*map(str, command), "--quiet"]) == code
        message = self._capsys.readouterr().err
        assert message.count("\n") == 1, message
        for part in says:
            assert part in message
        assert listing(self.output.parent) == before
        return message

    def to_hf(self, load: Path, *says: str, flags: tuple[str, ...] = (), code: int = 1) -> str:
        command = ("to-hf", "--load", load, "--output", self.output, *flags)
        return self(*command, says=says, code=code)

    def from_hf(self, model: Path, *says: str, flags: tuple[str, ...] = (), code: int = 1) -> str:
        command = ("from-hf", "--model", model, "--save", self.output, *flags)
        return self(*command, says=says, code=code)


def listing(parent: Path) -> dict[str, bytes]:
    """Every file below a folder, hidden ones too, with its content."""
    return {
        str(path.relative_to(parent)): path.read_bytes() if path.is_file() else b""
        for path in parent.rglob("*")
    }


def cut(path: Path, size: int = -100) -> None:
    """Shorten a file, by 100 bytes if nothing else is said."""
    data = path.read_bytes()
    path.write_bytes(data[:size])


def edit_json(path: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    """Change a file, and the manifest to fit."""
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))
    if path.name != MANIFEST:
        write_manifest(path.parent)


def edit_shard(path: Path, change: Callable[[dict[str, torch.Tensor]], Any]) -> None:
    """Change the tensors of a shard, and index and manifest to fit."""
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path)
    index = path.parent / folder.INDEX

    def relist(content: dict[str, Any]) -> None:
        where = {key: name for key, name in content["weight_map"].items() if name != path.name}
        content["weight_map"] = where | dict.fromkeys(tensors, path.name)

    edit_json(index, relist)


SHARD = "model-00002-of-00004.safetensors"


def shard_header(path: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    """Change the header of a safetensors file."""
    data = path.read_bytes()
    (length,) = struct.unpack("<Q", data[:8])
    header = json.loads(data[8 : 8 + length])
    change(header)
    text = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + data[8 + length :])
    write_manifest(path.parent)
