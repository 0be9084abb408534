"""Ray core, Train and Jobs: where work is done, and how models and results travel."""
