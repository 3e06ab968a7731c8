"""Where kernel tests run: on CUDA, or under Triton's interpreter (see tests/conftest.py)."""

import torch

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
