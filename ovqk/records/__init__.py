"""A cell's files: its identity, its record and tables, written and read back, and comparisons of cells."""
