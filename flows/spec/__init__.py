"""Loads pipeline files: overlays, parameters, matrices, validation; errors name file and line."""

from __future__ import annotations

from flows.spec.document import PipelineDocument
from flows.spec.head import INHERITED, Head, PipelineSpec
from flows.spec.load import load_pipelines, load_spec, pipeline_names, read_file, read_pipeline_file, set_value
from flows.spec.parameters import parse_parameters
from flows.spec.validate import check_document

__all__ = [
    "INHERITED",
    "Head",
    "PipelineDocument",
    "PipelineSpec",
    "check_document",
    "load_pipelines",
    "load_spec",
    "parse_parameters",
    "pipeline_names",
    "read_file",
    "read_pipeline_file",
    "set_value",
]
