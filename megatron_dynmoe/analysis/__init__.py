"""Shows which text uses which experts: a page for a browser, and the numbers behind it.

A model and text files enter. A folder with ``routing.json``, figures and one HTML page leaves.

windows.py     cuts text files into windows of tokens, by named groups
collect.py     runs the model on windows and counts its routing (counts.py: exact integers)
measure.py     measures a whole model, with a sweep over thresholds
statistics.py  computes the numbers of the report from the counts
tokens.py      says what a token looks like, and whether it is a word
figures.py     draws the numbers as PNG and SVG
page.py        puts numbers and figures into one HTML file, from page.html
write_report.py  writes all of this into a folder
"""
