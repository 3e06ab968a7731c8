"""The GPU that is not there: what PyTorch is told of it, and the few values that the host knows.

Fake tensors of a training enter, and run as they would on a GPU.
"""
