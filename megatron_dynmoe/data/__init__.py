"""From text to Megatron's token files, without importing torch or Megatron.

In the order in which the data flows: `readers` (JSON lines and Parquet), `tokenizer`
(SentencePiece and Hugging Face), `indexed` (the .bin/.idx pair), `preprocess` (the pipeline over
the three), `train_tokenizer` (a SentencePiece model from the same inputs), `commands` (the two
command lines).
"""
