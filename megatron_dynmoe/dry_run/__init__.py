"""A training step on GPUs that do not exist: what it allocates, launches, sends and waits for.

A request enters (``launch.py``), and a child process (``__main__.py``) trains for two steps with
Megatron's own loop, on fake tensors (``rehearse.py``). A recorder watches every operation
(``recorder.py``), and a result leaves (``result.py``), which ``display.py`` shows.
"""
