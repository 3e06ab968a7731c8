"""Encode text files to Megatron's .bin/.idx; see docs/data.md."""

import sys
from pathlib import Path

# A clone works without being installed.
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from megatron_dynmoe.cli.data import preprocess_data

if __name__ == "__main__":
    preprocess_data()
