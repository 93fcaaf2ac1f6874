"""What an adapter does to its base, in numbers with intervals, in gates and in pictures.

`spec`, `catalogue`, `gates` and `report` are torch-free; `run` does the work.
"""
