"""Maintains a home: fsck, repair, garbage collection, backup, restore, and probes of the environment."""
