"""Where the experts go: from an exported model and text to a report that people can look at.

windows.py     text files -> named groups -> windows of tokens
vocabulary.py  whether a tokenizer is the model's
collect.py     windows -> the model -> counts.py, exact integers that add up
measure.py     the whole measurement of a model, with a sweep over thresholds
statistics.py  counts -> the numbers of the report
tokens.py      what a token looks like, and whether it is a word
figures.py     numbers -> PNG and SVG
page.py        numbers and figures -> one HTML file, from page.html
write_report.py  all of it -> a folder
"""
