"""From a model and text files to counts: which tokens used which experts.

windows.py  cuts text files into windows of tokens, by named groups
tokens.py   says what a token looks like, and whether it is a word
collect.py  runs the model on windows and counts its routing (counts.py: exact integers)
measure.py  measures a whole model, with a sweep over thresholds
"""
