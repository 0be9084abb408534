"""A model in memory: loading it, running it, reading it."""
