"""Lists the adapter kinds and the file formats with their specs and titles; torch-free.

An entry names its implementation as `module:attribute`, which is imported on first use.
"""
