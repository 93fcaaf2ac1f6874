"""Merges adapters: pure functions over deltas, never over factors of different adapters.

`spec`, `methods`, `weights` and `report` must not import torch. `merge`, `resize` and `files` do the work.
"""
