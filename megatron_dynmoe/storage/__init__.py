"""Files that are whole or not there, with manifests, and pickles that execute nothing.

Whoever writes or reads files of a run, a checkpoint or a model folder enters; nothing here knows
what the files mean.
"""
