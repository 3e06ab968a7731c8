"""What folders of any format have: weights, words of config.json, a tokenizer and a card.

folder.py              reads and writes shards of weights and their index
words.py               keys of config.json that training has no use for
tokenizer.py           exports the training's tokenizer for transformers
sentencepiece_json.py  ... as a tokenizer.json with the same ids
card.py                writes the model card
"""
