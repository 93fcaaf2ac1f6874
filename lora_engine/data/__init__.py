"""Images and captions: from a folder of a person's files to a manifest that training can rely on.

`manifest` and `spec` are torch-free; `ingest`, `preprocess` and `caption` do the work, one picture in memory at a time.
"""
