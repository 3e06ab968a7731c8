"""The only place that changes Megatron: every patch, with its reason and its end."""
