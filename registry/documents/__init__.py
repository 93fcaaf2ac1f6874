"""Writes the documents of a version: model card, provenance (SLSA), bill of materials (CycloneDX), signature.

`gather` collects the facts of a version once. `card`, `provenance` and `mlbom` are pure functions of these facts.
`storage` stores and finds the documents. Must not import MLflow or torch.
"""
