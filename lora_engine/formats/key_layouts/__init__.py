"""Factor keys of kinds whose tensor names depend on more than the factor; entries of `KINDS` name these modules."""
