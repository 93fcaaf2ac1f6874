"""Lineage: the record of runs and steps, the walk over it, and the forms in which it is shown."""
