"""Benchmarks. Each compares with a reference or a limit in one run; README.md in this folder holds the results."""
