"""Trains adapters. `spec` (the user's settings) and `spawn` (child processes) are torch-free; `run` trains.

`loop.fit` is the only loop. A method is a list of phases. A phase names parameters, batches and loss terms.
"""
