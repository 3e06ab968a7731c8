"""From settings to a model that can be trained.

Settings enter and are settled once; what follows reads one value. Out come upstream's layer spec
with our modules in it, and a training that counts, steers and reports.
"""
