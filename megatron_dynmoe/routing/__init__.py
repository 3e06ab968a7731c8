"""From gate logits to a routing map and weights: pure tensor maths, and the router that uses it.

Dimension letters, here and wherever a name carries them as a suffix (``probs_TE``):
    T  tokens of a micro-batch on this rank, ``sequence position * B + sequence``
    B  sequences of a micro-batch
    E  experts
    D  hidden size
    L  transformer layers
"""
