"""What a command line has to satisfy: Megatron's arguments enter, and a refusal or nothing leaves.

settle_arguments.py   all checks in their order, and what follows from our settings
argument_checks.py    what Megatron would stop at in an assertion
intervals.py          how often a run logs, evaluates and saves
upstream_refusals.py  words what Megatron itself refuses, in terms of flags
"""
