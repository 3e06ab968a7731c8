"""Text enters, Megatron's token files leave, without importing torch or Megatron.

In the order in which the data flows: `inputs` (the files that are named), `records` and `readers`
(JSON lines, plain text and Parquet), `tokenizer` (SentencePiece and Hugging Face), `indexed` (the
.bin/.idx pair), `preprocess` (the pipeline over all these), `train_tokenizer` (a SentencePiece
model from the same inputs). `check` looks at token files that are there already.
"""
