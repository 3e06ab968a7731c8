"""What a user may say: the settings, their flags, and the words in which one is refused.

A command line or a YAML file enters; a :class:`~.config.DynMoEConfig` or a plain refusal leaves.
Nothing here imports torch.
"""
