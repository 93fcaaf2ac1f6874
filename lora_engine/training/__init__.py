"""Training adapters: `spec` (what a person may set) and `spawn` (a child process) are torch-free; `run` does the work.

There is one loop, `loop.fit`. A method is a list of phases; a phase says what moves, on which batches, to lower what.
"""
