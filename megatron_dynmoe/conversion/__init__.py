"""Converts checkpoints to Hugging Face folders and back.

A checkpoint of either kind enters, as files that nobody has vouched for. A whole folder of the
other kind leaves, or an error that names what is wrong. ``use`` opens checkpoints here, too.

formats/             the layouts of Hugging Face folders, one file each
hugging_face/        what folders of all formats have: shards, words, tokenizer, card
megatron/            reads and writes Megatron's checkpoints
names.py             the parameters of a model, and their names in Megatron's checkpoints
shapes.py            their shapes, and how entries are cut and put together
model_settings.py    the config of a model, to and from which every format is converted
routing_settings.py  the settings and the state of the routers
sources.py           opens and checks a checkpoint of either kind
upcycle.py           a dense folder, opened as if its layers had experts
convert.py           converts one kind into the other
"""
