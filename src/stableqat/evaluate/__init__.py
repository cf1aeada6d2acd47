"""Perplexity, accuracy and lm-evaluation-harness tasks of runs, checkpoints and exported folders."""
