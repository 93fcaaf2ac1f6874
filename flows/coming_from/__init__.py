"""Reads the settings of other trainers: their option names in errors, and `loraline init --from`."""
