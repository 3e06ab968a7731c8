"""A trained model at work: text, thresholds after the fact, evaluation.

An exported folder and text enter; continuations, scores and experts per token leave.
"""
