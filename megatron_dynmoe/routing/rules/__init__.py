"""The mathematics of the rules beside top-p, and the quantiles that two of them use.

Logits or scores enter, weights and a routing map leave, or whole slots. The rules of ``moe/rules``
train with these functions, and those of ``layers/rules`` choose with them in exported models.
"""
