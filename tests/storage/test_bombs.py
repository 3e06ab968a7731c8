"""A record of a checkpoint that would become much more than it is."""

import io
import pickle
import zipfile
from pathlib import Path

import pytest
import torch
from torch.distributed.checkpoint.metadata import MetadataIndex

from megatron_dynmoe.conversion.megatron.checkpoint import MegatronCheckpoint
from tests.conversion.checkpoints import DTOP_P, model_config, write_megatron

ROUTER = "decoder.layers.mlp.router.weight"


def compressed(record: bytes, padding: int) -> bytes:
    """The same archive, its members compressed, the last followed by zeros."""
    packed = io.BytesIO()
    with (
        zipfile.ZipFile(io.BytesIO(record)) as source,
        zipfile.ZipFile(packed, "w", zipfile.ZIP_DEFLATED) as target,
    ):
        for name in source.namelist():
            target.writestr(name, source.read(name) + b"\0" * padding)
    return packed.getvalue()


def test_a_compressed_record_is_refused(tmp_path: Path) -> None:
    load = write_megatron(tmp_path / "load", model_config(**DTOP_P))
    path = load / "release" / ".metadata"
    metadata = pickle.loads(path.read_bytes())
    offsets = metadata.state_dict_metadata[ROUTER].chunks[0].offsets
    info = metadata.storage_data[MetadataIndex(ROUTER, torch.Size(offsets))]
    shard = load / "release" / info.relative_path
    content = shard.read_bytes()
    bomb = compressed(content[info.offset : info.offset + info.length], 50_000_000)
    assert len(bomb) < 2e6
    info.offset, info.length = len(content), len(bomb)
    shard.write_bytes(content + bomb)
    path.write_bytes(pickle.dumps(metadata))
    with pytest.raises(ValueError, match=r"\.distcp: decoder.*which would become"):
        MegatronCheckpoint(load).read(ROUTER)
