"""Builds, draws and measures the embedded base: a small Stable Diffusion of a synthetic world, its CLIP and its judge.

Run `python -m tools.tiny_base` in the root of the repository; the product contains only the finished weights.
"""
