"""Measurements: each a ratio against a peer or a limit, in one run. Results are kept in README.md beside this file."""
