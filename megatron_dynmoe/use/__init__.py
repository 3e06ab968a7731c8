"""Uses a trained model: continues text, finds thresholds after the training, evaluates.

An exported folder and text enter; continuations, scores and experts per token leave.
"""
