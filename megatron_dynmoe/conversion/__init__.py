"""Checkpoints to Hugging Face and back.

names.py              which tensor is called what where: one table per format
settings.py           a model's settings, in the middle between
megatron_settings.py  Megatron's arguments, and
format_settings.py    the config.json of each format
megatron.py           reads Megatron's checkpoints; storage/unpickle.py keeps that safe
megatron_writer.py    writes them
folder.py             Hugging Face folders: shards and their index
tokenizer.py          the training's tokenizer for transformers
card.py               the model card
sources.py            a checkpoint of either kind, opened and checked
convert.py            from one to the other
"""
