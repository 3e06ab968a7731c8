"""A run's folder and what is reported in it: names of files, metrics, the summary, the figures.

Counts and event files enter; console lines, ``summary.json`` and ``curves.png`` leave.
"""
