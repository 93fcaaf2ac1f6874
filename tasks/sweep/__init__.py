"""Searches settings of a pipeline: what is declared, the next trials, their records and the page that compares them."""
