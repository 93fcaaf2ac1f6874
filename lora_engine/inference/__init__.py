"""Images from a base model, with or without attached adapters."""
