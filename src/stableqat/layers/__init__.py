"""Layers that compute with quantized weights, and what surgery has to know of the ones it finds."""
