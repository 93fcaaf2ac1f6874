"""Injects faults (killed processes, full disks, changed bytes) and checks invariants."""
