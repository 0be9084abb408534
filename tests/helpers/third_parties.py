"""A process that meets third parties and is left as it was."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager

from ray_unlearn import plugins
from ray_unlearn.tables import additions, take_back


@contextmanager
def guests() -> Iterator[None]:
    """Whatever is loaded, added to a table, or put on sys.path inside is gone afterwards; modules are `third_...`."""
    mark, known, path = additions(), dict(plugins._loaded), list(sys.path)
    try:
        yield
    finally:
        take_back(mark)
        plugins._loaded.clear()
        plugins._loaded.update(known)
        sys.path[:] = path
        for name in [name for name in sys.modules if name.startswith("third_")]:
            del sys.modules[name]
