"""Packed weights of a trained model in the formats of other runtimes.

A format is one module, named as the command line names it, with four functions: `check` refuses what the
format cannot hold, `write` writes a folder, `read` gives back the weights and logits of the format's own
reader, `notes` says what a user of the file should know.
"""
