"""Checkpoints to Hugging Face and back.

formats/              layouts of Hugging Face folders, one file each
names.py              which tensor is called what where
shapes.py             how large it is, and how entries are cut and put together
model_settings.py     a model's config, in the middle between the config.json of each format and
megatron_settings.py  Megatron's arguments; and
routing_settings.py   the settings and the state of its routers
words.py              words of config.json that training has no use for
megatron.py           reads Megatron's checkpoints; storage/unpickle.py keeps that safe
megatron_writer.py    writes them
folder.py             Hugging Face folders: shards and their index
tokenizer.py          the training's tokenizer for transformers
card.py               the model card
sources.py            a checkpoint of either kind, opened and checked
convert.py            from one to the other
"""
