"""Passwords in a job's URLs: what is written shows a variable's name or stars, never the password itself."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping

from ray_unlearn.config.job import Job
from ray_unlearn.errors import InputError
from ray_unlearn.schema import to_dict

PASSWORD = re.compile(r"(?<=://)(?P<user>[^:/@\s]*):(?P<password>[^/\s]*)@")
"""User and password of a URL; up to the last @ before the path, since a password may hold one."""
STARS = "***"
VARIABLE = re.compile(r"\$(\w+|\{\w+\})")


def redacted(text: str) -> str:
    """A text without the passwords of its URLs; one that is an environment variable's name stays."""

    def hide(found: re.Match[str]) -> str:
        shown = found["password"] if VARIABLE.fullmatch(found["password"]) else STARS
        return f"{found['user']}:{shown}@"

    return PASSWORD.sub(hide, text)


def revealed(url: str) -> str:
    """The URL with its environment variables' values; raises InputError where one is not set."""
    expanded = os.path.expandvars(url)
    missing = VARIABLE.search(url) and VARIABLE.search(expanded)
    if missing:
        raise InputError(
            f"{redacted(url)!r} names the environment variable {missing[0]}, which is not set where the run is started."
        )
    return expanded


def without_secrets(message: object, url: str) -> str:
    """A message about a URL, such as a library's error, without the URL's password."""
    text, found = str(message), PASSWORD.search(revealed(url))
    return redacted(text.replace(found["password"], STARS) if found and found["password"] else text)


def written(job: Job) -> Mapping[str, object]:
    """A job as it is written into a run's directory and compared with what stands there: to_dict, redacted."""
    plain = to_dict(job)
    storage = plain["search"]["storage"]
    if storage is not None:
        plain["search"]["storage"] = redacted(storage)
    return plain
