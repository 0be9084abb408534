"""A model and examples to scores. Knows no Ray, and does not train."""
