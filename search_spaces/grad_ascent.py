"""Gradient ascent on the forget rows, bounded: unbounded it only collapses."""

from ray_unlearn.search.plain import plain


def space(trial):
    return plain(trial, "grad_ascent")
