"""Shows which text uses which experts: a page for a browser, and the numbers behind it.

A model and text files enter. A folder with ``routing.json``, figures and one HTML page leaves.

counting/  runs the model on text and counts its routing
results/   computes numbers from the counts, and draws and writes them
"""
