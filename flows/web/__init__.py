"""The HTTP API and the studio page: routes only; `tasks.serving` has what they do."""
