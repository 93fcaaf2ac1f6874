"""Runs pipelines: specs, plans, Prefect flows, scheduled retraining, the command line."""
