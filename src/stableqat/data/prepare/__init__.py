"""Data that is prepared once, on disk: documents drawn from a corpus, and rows of tokens."""
