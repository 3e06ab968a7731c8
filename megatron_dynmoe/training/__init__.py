"""From the command line into Megatron's own training loop.

The command line enters. Its flags are parsed, checked and settled (``checks``) before anything is
built. This room gives the loop its data (``datasets``), batches, loss and run folder, and ends the
process when the loop ends or a signal stops it.
"""
