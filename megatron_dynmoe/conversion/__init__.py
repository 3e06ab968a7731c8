"""Converts checkpoints to Hugging Face folders and back.

A checkpoint of either kind enters, as files that nobody has vouched for. A whole folder of the
other kind leaves, or an error that names what is wrong. ``use`` opens checkpoints here, too.

formats/              the layouts of Hugging Face folders, one file each
names.py              the parameters of a model, and their names in Megatron's checkpoints
shapes.py             their shapes, and how entries are cut and put together
model_settings.py     the config of a model, to and from which every format is converted
megatron_settings.py  the same settings among Megatron's arguments
routing_settings.py   the settings and the state of the routers
words.py              keys of config.json that training has no use for
megatron.py           reads Megatron's checkpoints; storage/unpickle.py keeps that safe
megatron_writer.py    writes Megatron's checkpoints
folder.py             reads and writes Hugging Face folders: shards and their index
tokenizer.py          exports the training's tokenizer for transformers
card.py               writes the model card
sources.py            opens and checks a checkpoint of either kind
convert.py            converts one kind into the other
"""
