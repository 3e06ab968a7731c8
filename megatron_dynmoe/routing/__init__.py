"""The method in plain PyTorch: gate logits enter, weights, a routing map and sums leave.

What a router counts (``counters.py``) is here, too. Nothing here knows Megatron.

Dimension letters, here and wherever a name carries them as a suffix (``probs_TE``):
    T  tokens of a micro-batch on this rank, ``sequence position * B + sequence``
    B  sequences of a micro-batch
    E  experts
    D  hidden size
    L  transformer layers
"""
