"""Merging adapters: pure functions over deltas, never over factors of different adapters.

`spec` (what a person may set), `weights` and `report` are torch-free; `merge`, `resize` and `files` do the work.
"""
