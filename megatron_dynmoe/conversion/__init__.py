"""Checkpoints to Hugging Face and back.

names.py      which tensor is called what where: one table per format
settings.py   a model's settings in each format's words
megatron.py   Megatron's checkpoints, read and written; unpickle.py keeps that safe
folder.py     Hugging Face folders: shards, index, manifest
tokenizer.py  the training's tokenizer for transformers
card.py       the model card
convert.py    from one to the other
"""


def convert_folder(model, output, *, format="dynmoe", overwrite=False):  # type: ignore[no-untyped-def]
    from megatron_dynmoe.conversion.convert import convert_folder as convert

    convert(model, output, format=format, overwrite=overwrite)
