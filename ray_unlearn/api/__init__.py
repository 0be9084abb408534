"""The commands as functions: typed results, InputError for bad input."""
