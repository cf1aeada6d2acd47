"""`stableqat bench`: time and memory of each method, beside the untouched model in the same run."""
