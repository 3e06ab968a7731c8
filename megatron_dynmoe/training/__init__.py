"""What Megatron's training loop asks a script for: datasets, batches and the loss."""
