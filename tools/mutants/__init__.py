"""Checks that tests notice small changes to ten central modules (mutation testing with a fixed sample)."""
