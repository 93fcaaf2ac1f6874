"""Finds and loads base models behind one protocol.

`source`, `families`, `layout` and `hub` are torch-free; `base` and the modules of the families load and compute.
"""
