"""Megatron's checkpoints: reads their tensors and settings, and writes new ones.

checkpoint.py  reads a checkpoint; storage/unpickle.py keeps that safe
writer.py      writes one
settings.py    a model's settings among Megatron's arguments
"""
