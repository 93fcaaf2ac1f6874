"""The documents of a version: model card, provenance (SLSA), bill of materials (CycloneDX), signature.

`gather` collects the facts of a version once; each document is a pure function of them (`card`, `provenance`, `mlbom`);
`storage` stores and finds them. No tensors, no MLflow.
"""
