"""Text prepared on disk: documents drawn from a corpus, and documents turned into rows of tokens."""
