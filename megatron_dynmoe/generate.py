"""The door of ``python -m megatron_dynmoe.generate``; see :mod:`megatron_dynmoe.cli.generate`."""

from megatron_dynmoe.cli.generate import main

if __name__ == "__main__":
    main()
