"""Parts of a batch: which photos are of part i of n, whenever and wherever they are listed."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from zlib import crc32

from imgtool.errors import USAGE, ImgtoolError


@dataclass(frozen=True)
class Shard:
    """Part ``part``, counted from 0, of ``parts``."""

    part: int
    parts: int

    def holds(self, relative: Path) -> bool:
        """Tell whether a photo is of this part.

        Args:
            relative: Its path below the folder that it was found in: a photo stays in its part when others
                are added, or when outputs appear beside it.
        """
        return crc32(relative.as_posix().encode("utf-8", "surrogateescape")) % self.parts == self.part

    def __str__(self) -> str:
        """Return it as --shard has it."""
        return f"{self.part}/{self.parts}"

    def named(self, path: Path) -> Path:
        """Return a path for this part alone: ``table.csv`` becomes ``table-3-of-16.csv``."""
        return path.with_name(f"{path.stem}-{self.part}-of-{self.parts}{path.suffix}")


def shard(text: str) -> Shard:
    """Read what --shard says.

    Raises:
        ImgtoolError: Code 2: it is no "i/n" with 0 <= i < n.
    """
    if not text:
        hint = "give i/n, such as 0/4; or is the variable that it comes from not set?"
        raise ImgtoolError("--shard is empty", hint, USAGE)
    found = re.fullmatch(r"(\d{1,9})/(\d{1,9})", text, re.ASCII)
    if not found or int(found[1]) >= int(found[2]):
        hint = "give i/n with i from 0 to n - 1, such as 0/4, 1/4, 2/4 and 3/4"
        raise ImgtoolError(f"--shard {text!r} is no part of a whole", hint, USAGE)
    return Shard(int(found[1]), int(found[2]))
