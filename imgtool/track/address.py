"""Addresses of stores and servers, and texts that quote them, without their passwords."""

from __future__ import annotations

import re

_PASSWORD = re.compile(r"://(?!/)[^@]*:[^@]*@")
_USER = re.compile(r"(?<=://)(?!/)\S*@")
_WORD = re.compile(
    r"((?:passw(?:or)?d|passphrase|pwd|token|secret)(?:=|%3D))"
    r"(?!%3B)[^&;\s'\"]+?(?=[&;\s'\"]|%3B|$)",
    re.IGNORECASE,
)
"""A password among the words of a query, as drivers of databases take it."""


def has_password(place: str) -> bool:
    """Tell whether an address holds a password.

    >>> [has_password(f"postgresql://{each}") for each in ("me:p@host/db", "me@host", "host/db?password=p")]
    [True, False, True]
    """
    return bool(_PASSWORD.search(place) or _WORD.search(place))


def public(place: str) -> str:
    """Return an address without user and password.

    >>> public("postgresql://me:secret@host/runs"), public("sqlite:///runs/mlflow.db")
    ('postgresql://host/runs', 'sqlite:///runs/mlflow.db')
    """
    scheme, mark, rest = place.partition("://")
    if not rest.startswith("/"):
        rest = rest.rpartition("@")[2]
    return _WORD.sub(r"\1***", scheme + mark + rest)


def redacted(text: str) -> str:
    """Return a text whose addresses have no user and no password.

    >>> redacted("API request to http://me:secret@host/api failed")
    'API request to http://host/api failed'
    """
    return _WORD.sub(r"\1***", _USER.sub("", text))
