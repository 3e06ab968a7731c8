"""Text as it lies on disk: names of files enter, and documents leave, one after another.

inputs.py   the files that are named
readers.py  JSON lines, plain text and Parquet
records.py  documents, and what happens to those that cannot be read
"""
