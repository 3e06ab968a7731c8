"""What is set before Megatron is imported."""

import os
import subprocess
import sys

import pytest

from megatron_dynmoe import run

EXPAND = {"PYTORCH_CUDA_ALLOC_CONF": "expandable_segments:True"}


@pytest.mark.parametrize(
    ("given", "want"),
    [
        ({}, EXPAND),
        ({"PYTORCH_ALLOC_CONF": "backend:cudaMallocAsync"},) * 2,
        ({"PYTORCH_CUDA_ALLOC_CONF": ""},) * 2,
    ],
    ids=str,
)
def test_segments_expand_unless_the_environment_has_settings(monkeypatch, given, want):
    monkeypatch.setattr(os, "environ", dict(given))
    run.expand_segments()
    assert os.environ == want


def test_only_a_gpus_allocator_is_set(monkeypatch):
    code = (
        "import os, sys, torch\n"
        "from types import SimpleNamespace\n"
        "from megatron_dynmoe import run\n"
        "from megatron_dynmoe.backends import cpu\n"
        "patches = SimpleNamespace(install=lambda: None)\n"
        "sys.modules['megatron_dynmoe.upstream.patches'] = patches\n"  # it imports Megatron
        "cpu.install = lambda: None\n"
        "for wanted in (True, False):\n"
        "    cpu.wanted = lambda: wanted\n"
        "    run.prepare()\n"
        "    print(os.environ.get('PYTORCH_CUDA_ALLOC_CONF'))\n"
    )
    environment = {k: v for k, v in os.environ.items() if k not in run._ALLOCATOR_VARIABLES}
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True
    )
    assert done.stdout.split() == ["None", "expandable_segments:True"]
