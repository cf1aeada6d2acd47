"""Studies: many runs from one file, on all GPUs, cores or nodes."""
