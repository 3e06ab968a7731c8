"""The same as ``dynmoe preprocess``: see --help and docs/data.md."""

import sys
from pathlib import Path

# A clone works without being installed.
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from megatron_dynmoe.cli.preprocess import main

if __name__ == "__main__":
    sys.exit(main())
