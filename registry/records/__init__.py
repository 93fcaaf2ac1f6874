"""The documents that go with a version: its model card, where it comes from (SLSA), what it is made of (CycloneDX).

What is known of a version is gathered once (`facts`); each document is a pure function of it (`card`, `provenance`,
`mlbom`); `keep` stores them and finds them again. No tensors, no MLflow. Importing this package is cheap.
"""
