"""From counts to the report: a folder with numbers, figures and one page.

statistics.py    computes the numbers of the report from the counts
figures.py       draws the numbers as PNG and SVG
page.py          puts numbers and figures into one HTML file, from page.html
write_report.py  writes all of this into a folder
"""
