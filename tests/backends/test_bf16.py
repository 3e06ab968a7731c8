"""A CPU that multiplies bf16 slowly is found out, quickly."""

import time

import torch

from megatron_dynmoe.backends import bf16


def test_it_is_measured_in_a_moment():
    start = time.process_time()
    assert bf16.slowdown() > 0
    assert time.process_time() - start < 10  # 0.2 s at the slowest CPU seen


def test_only_a_slow_one_is_warned_of(monkeypatch):
    seconds = {torch.bfloat16: 0.04, torch.float32: 0.0002}
    monkeypatch.setattr(bf16, "_seconds", seconds.get)
    assert bf16.warning(bf16.slowdown()).startswith("WARNING: --bf16 is given")
    assert "200 times slower" in bf16.warning(bf16.slowdown())
    seconds[torch.bfloat16] = 0.0001
    assert bf16.warning(bf16.slowdown()) is None
