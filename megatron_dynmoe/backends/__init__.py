"""What the model runs on: the CPU layer and, on a GPU, the building blocks of a layer."""
