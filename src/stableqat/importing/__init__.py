"""Checkpoints of other QAT codes become runs of this suite."""
