"""Measures the effect of an adapter on its base: metrics with intervals, gates and sample images.

`spec`, `metrics`, `gates` and `report` are torch-free; `run` runs an evaluation.
"""
