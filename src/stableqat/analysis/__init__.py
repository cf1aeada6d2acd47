"""What event files show: `compare` and `publish`.

A comparison only reads event files and the study file that lies with them, so nothing here knows a method, a
model or a dataset, and nothing here is needed to train.
"""
