"""Use cases, one file each: import, export, diff, reproduce, promote, report, rights, documents, maintenance.

Each takes a home and plain values and returns plain values; the command line and scripts call them alike.
"""
