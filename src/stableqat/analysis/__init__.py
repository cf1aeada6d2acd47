"""Studies: many runs from one file (`study`, `sweep`), and what they show (`events`, `arms`, `compare`).

A sweep only starts ordinary `stableqat` commands and a comparison only reads event files, so
nothing here knows a method, a model or a dataset, and nothing here is needed to train.
"""
