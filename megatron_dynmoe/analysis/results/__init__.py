"""From counts to the results: a folder with numbers, figures and one page.

statistics.py     computes the numbers from the counts
partial.py        computes rank correlations with the other quantities held
figures.py        draws the numbers as PNG and SVG
page.py           puts numbers and figures into one HTML file, from page.html
write_results.py  writes all of this into a folder
"""
