"""Data sets that the project knows or makes."""
