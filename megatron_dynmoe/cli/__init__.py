"""The commands of ``dynmoe``, one per file: their flags, and what they print.

The words of a command line enter. Other rooms do the work.
"""
