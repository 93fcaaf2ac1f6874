"""Checks that tests notice small changes to central modules (mutation testing with a fixed sample)."""
