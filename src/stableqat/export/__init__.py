"""Packed weights for other runtimes, each file read back and compared with the model that was trained."""
