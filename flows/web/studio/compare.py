"""x"""
def add_compare(studio):
    pass
