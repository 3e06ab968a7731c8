"""Megatron's MoE layer with a router that holds a rule, a dispatcher for any map, and experts.

Hidden states enter and leave. In between, the router counts what the controller and the log need.
"""
