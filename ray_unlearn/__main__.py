"""`python -m ray_unlearn` is the same as `ray-unlearn`."""

from ray_unlearn.cli import entry

if __name__ == "__main__":
    entry()
