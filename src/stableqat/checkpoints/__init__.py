"""Checkpoints: their names, how they are written, found, verified, read, and merged."""
