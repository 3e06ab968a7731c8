"""The settings of dynamic routing, their flags, and the messages that refuse a bad setting.

A command line or a YAML file enters. A :class:`~.config.DynMoEConfig` or an error message leaves.
Nothing in this room imports torch.
"""
