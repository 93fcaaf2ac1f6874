"""Generates images with a base model, with or without attached adapters."""
