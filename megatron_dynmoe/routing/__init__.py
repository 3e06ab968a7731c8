"""The method in plain PyTorch: gate logits enter, weights, a routing map and sums leave.

``route.py`` takes the steps of top-p: ``normalize.py``, ``select.py`` and ``losses.py``. What other
rules compute instead is in ``rules/``. ``counters.py`` holds what a router counts. Nothing in this
room imports Megatron.

Dimension letters, used throughout the package as suffixes of names (``probs_TE``):
    T  tokens of a micro-batch on this rank, ``sequence position * B + sequence``
    B  sequences of a micro-batch
    E  experts
    D  hidden size
    L  transformer layers
"""
