"""The content-addressed store: artifacts as trees of files, and where their bytes are kept."""
