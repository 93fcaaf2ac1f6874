"""x"""
def add_grids(studio):
    pass
