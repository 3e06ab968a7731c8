"""A run's folder and the reports in it: file names, metrics, the summary and the figures.

Counts and event files enter; console lines, ``summary.json`` and ``curves.png`` leave.
"""
