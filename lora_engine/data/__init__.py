"""Turns a folder of the user's images and captions into a validated dataset.

`manifest` and `spec` are torch-free; `ingest`, `preprocess` and `caption` hold one image in memory at a time.
"""
