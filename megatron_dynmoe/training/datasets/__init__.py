"""What a training reads: token files enter, checked and split; Megatron's datasets leave.

token_files.py  checks the files that the flags name, before anything is built
splits.py       which documents are for training, validation and test, and whether there are enough
data_order.py   whether a resumed run goes on with the data with which it stopped
index_cache.py  Megatron's cache of indexes, named by content
provider.py     builds the datasets
"""
