"""Loads pipeline files: overlays, parameters, matrices, validation; errors name file and line."""

from __future__ import annotations

from flows.spec.head import INHERITED, Head, PipelineSpec
from flows.spec.load import load_pipelines, load_spec, read_pipeline_file, set_value
from flows.spec.validate import check_document

__all__ = [
    "INHERITED",
    "Head",
    "PipelineSpec",
    "check_document",
    "load_pipelines",
    "load_spec",
    "read_pipeline_file",
    "set_value",
]
