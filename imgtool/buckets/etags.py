"""ETags that look like MD5s, and are none where a store encrypts with a key of the user (SSE-KMS, SSE-C)."""

from __future__ import annotations

import threading
from collections.abc import Collection, Mapping
from enum import Enum

from imgtool.buckets import Found
from imgtool.errors import ImgtoolError

ENOUGH = 3
"""Files whose ETag is not their MD5 after which, while none was, no more are fetched twice for it."""


class Verdict(Enum):
    """What to do with a content that came."""

    RIGHT = "it is what the store tells"
    AGAIN = "fetch it once more"
    DOUBTFUL = "keep it, though its ETag is not its MD5"


class Etags:
    """Judges what comes from one place; may be asked from many threads at once.

    A content that contradicts its ETag is fetched once more. Where the same comes again, the file is
    encrypted or damaged, and nobody can tell which: it is kept, and counts as doubtful. It tells nothing of
    other files. Only while none has matched its ETag, and some have not, are they doubtful at once.
    """

    def __init__(self) -> None:
        """Know nothing yet."""
        self._lock = threading.Lock()
        self._matched = False
        self._doubtful: set[str] = set()

    def judge(
        self, found: Found, made: Mapping[str, str], before: Mapping[str, str] | None = None
    ) -> Verdict:
        """Judge a content that came.

        Args:
            found: What was told of the file.
            made: What ``manifest.hashes`` makes of the content and ``found.digests``.
            before: The same of the content that was to be fetched once more; None of the first one.

        Raises:
            ImgtoolError: It is the second one, and not what the store tells.
        """
        told = dict(found.digests)
        wrong = [
            name for name, value in told.items() if name != "etag-parts" and made.get(name, value) != value
        ]
        with self._lock:
            if not wrong:
                self._matched |= "etag-md5" in told
                return Verdict.RIGHT
            same = before["sha256"] == made["sha256"] if before else self._encrypted()
            if wrong == ["etag-md5"] and same:
                self._doubtful.add(found.path)
                return Verdict.DOUBTFUL
        if before is None:
            return Verdict.AGAIN
        hint = "run it again; where that does not help, what is stored or the way to it is damaged"
        raise ImgtoolError(f"its {wrong[0].upper()} is not what the store tells, twice", hint)

    def _encrypted(self) -> bool:
        return not self._matched and len(self._doubtful) >= ENOUGH


def warning(paths: Collection[str]) -> str:
    """Return what is to be said of files that were kept whose ETag is not their MD5.

    >>> warning({"b.jpg", "a.jpg"})
    '2 files are kept whose ETag is not their MD5 (encrypted by the store, or damaged): a.jpg, ...'
    """
    count, its, more = "1 file is", "its", ""
    if len(paths) > 1:
        count, its, more = f"{len(paths)} files are", "their", ", ..."
    why = "encrypted by the store, or damaged"
    return f"{count} kept whose ETag is not {its} MD5 ({why}): {min(paths)}{more}"
