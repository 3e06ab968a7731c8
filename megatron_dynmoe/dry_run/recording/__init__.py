"""Watches a training on fake tensors: operations, memory, what is sent, and where each comes from.

Every operation enters; what happened in two steps leaves, as raw records.
"""
