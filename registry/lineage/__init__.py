"""Records runs and steps, walks the graph of artifacts, and exports it."""
