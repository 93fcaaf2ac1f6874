"""Serves images: accepts requests that name registered adapters, queues them and has an engine draw them."""

from typing import Literal

EngineName = Literal["static", "dynamic", "compiled"]
"""How a server holds its adapters: fused at its start, by request, or by request in a compiled model."""
