"""Post-training quantization: starts without training, on the grids of the training methods."""
