"""From a recipe and a machine to a job: checks before it, its attempts, and what it will cost.

Flags enter, and none of this needs a GPU. A checked command line, a plan or a next attempt leaves.
"""
