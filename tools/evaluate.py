"""The same as ``dynmoe evaluate``: see --help and docs/evaluate.md."""

import sys
from pathlib import Path

# A clone works without being installed.
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from megatron_dynmoe.cli.evaluate import main

if __name__ == "__main__":
    sys.exit(main())
