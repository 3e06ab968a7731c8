"""Tries this package on another Megatron: see --help and docs/upstream_versions.md."""

import sys
from pathlib import Path

# A clone works without being installed.
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from tests.upstream.contract.command import main

if __name__ == "__main__":
    sys.exit(main())
