"""From a recipe and a machine to a job: checks before it, attempts at it, what it will cost.

Flags enter and never need a GPU; a checked command line, a plan or a next attempt leaves.
"""
