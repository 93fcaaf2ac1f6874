"""A plug-in of Loraline with one entry of each kind."""
