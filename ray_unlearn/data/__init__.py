"""Files to checked rows, rows to tokens."""
