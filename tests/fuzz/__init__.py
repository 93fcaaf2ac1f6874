"""Fuzzing: mutated files, texts and rows for each reader, with guards on errors, time, memory, writes and round trips.

`python -m tests.fuzz` runs it for a time, `test_fuzz.py` with fixed inputs. An input follows from target, seed and
number alone, so each finding can be repeated. Past findings are built in `findings.py`.
"""
