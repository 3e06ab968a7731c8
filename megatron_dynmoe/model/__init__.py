"""From settings to a model that can be trained.

Settings enter and are settled once; all code after that reads the one result. Upstream's layer spec
with our modules in it leaves, together with hooks that count, control and report.
"""
