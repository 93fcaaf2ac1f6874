"""Versions of adapters: numbers, aliases, promotion, deletion, revocation, and their copy in MLflow."""
