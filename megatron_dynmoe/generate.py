"""The door of ``python -m megatron_dynmoe.generate``; see :mod:`megatron_dynmoe.use.generate`."""

from megatron_dynmoe.use.generate import main

if __name__ == "__main__":
    main()
