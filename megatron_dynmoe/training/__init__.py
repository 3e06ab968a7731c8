"""From the command line into Megatron's own training loop.

Flags enter; they are parsed, checked and settled before anything is built. Datasets, batches, the
loss and the run's folder are what the loop is given; signals and endings are what it leaves.
"""
