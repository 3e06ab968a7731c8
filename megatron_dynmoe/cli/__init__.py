"""The commands of ``dynmoe``, one a file: their flags, and what they print.

Words of a command line enter; the work is done by other rooms.
"""
