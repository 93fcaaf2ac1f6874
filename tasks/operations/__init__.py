"""Implements use cases, one file each: import, export, diff, reproduce, promote, report, documents, and others.

Each takes a home and plain values and returns plain values, for the command line and for scripts.
"""
