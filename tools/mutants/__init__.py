"""Mutation check: a fixed sample of small changes to ten central modules, each of which a test should notice."""
