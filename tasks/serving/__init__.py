"""Serves images: accepts requests that name registered adapters, queues them and has an engine draw them."""
