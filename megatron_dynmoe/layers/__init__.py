"""A mixture-of-experts layer in plain PyTorch: no Megatron, one device.

Hidden states enter; hidden states, the experts of each token and the losses of the router leave.
The exported model is made of ``moe``, which ships with it.
"""
