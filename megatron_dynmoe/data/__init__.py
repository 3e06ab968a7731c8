"""Turns text into Megatron's token files without importing torch or Megatron.

Text files and a tokenizer enter; a ``.bin`` and an ``.idx`` file leave, whole or not at all.

In the order in which the data flows: `text` (files of JSON lines, plain text and Parquet),
`tokenizer` (SentencePiece and Hugging Face), `indexed` (the .bin/.idx pair), `preprocess` (the
pipeline over all of these), `train_tokenizer` (a SentencePiece model from the same text). `check`
examines token files that exist already.
"""
