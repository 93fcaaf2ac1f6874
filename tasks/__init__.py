"""Combines the engine and the registry: `steps` of pipelines, `operations` on adapters and versions, execution."""
