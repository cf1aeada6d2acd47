"""What a model answers: text from prompts, losses of tokens, classes of images."""
