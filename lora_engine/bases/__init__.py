"""Base models behind one protocol: where they lie (`source`), which families are known (`families`), how they compute.

`source`, `families`, `layout` and `hub` are torch-free; `base` and the family modules do the work.
"""
