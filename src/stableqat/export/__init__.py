"""Quantized weights of a trained model in the formats of other runtimes.

A format is one module, named as on the command line, with four functions: `check` refuses what the format
cannot hold, `write` writes a folder, `read` returns the weights and logits of the format's own reader,
`notes` says what a user of the file should know.
"""
