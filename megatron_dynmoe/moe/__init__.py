"""The MoE layer and its dispatchers for a varying number of experts per token."""
