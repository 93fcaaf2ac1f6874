"""Versions of adapters: numbers, aliases, promotion, deletion, revocation, and the sync to MLflow."""
