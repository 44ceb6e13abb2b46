"""Knows a URL that carries a password: those end in files, logs and messages, wherever URLs go."""

from __future__ import annotations

import re

# Before the first slash behind `//`: a name, a colon, a password, an @.
_WITH_PASSWORD = re.compile(r"[a-z][a-z0-9+.-]*://[^/?#@]*:[^/?#]*@", re.IGNORECASE)

ADVICE = "credentials come from the environment or from the role of the machine"


def has_password(location: str) -> bool:
    """Whether a location is a URL with a password in it."""
    return _WITH_PASSWORD.match(location) is not None
