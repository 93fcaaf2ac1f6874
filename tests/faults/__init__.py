"""Faults on purpose: killed processes, full disks, changed bytes; and what must hold afterwards."""
