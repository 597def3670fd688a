"""Write ``docs/cli.md`` from the declarations that the command line is built from."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import groupby
from pathlib import Path

from imgtool.flags import Command, Flag, commands, flags, general

INTRODUCTION = """\
# The command line

Made by `make docs` from the settings of each command; do not edit it by hand.

Every command is `imgtool VERB ENGINE`, with an action between them where the verb is `data`;
`imgtool data inspect` and `imgtool data fetch` take no engine. Results go to standard output,
everything else to standard error. Exit codes: 0 done, 1 the work failed, 2 asked wrongly, 130
interrupted.

Settings come from, in rising order: the defaults below, `--preset NAME`, `./imgtool.toml`,
`--config FILE` (or the file that `IMGTOOL_CONFIG` names), the environment (`IMGTOOL_DEVICE`,
`IMGTOOL_THREADS`), flags. A settings file holds one table for each command, named like its words,
and the keys are the flags with `_` for `-`:

```toml
[train.deblur]
photos = ["~/Pictures"]
batch = 8
epoch_steps = 250
```

`imgtool --install-completion` teaches the shell to complete all of it.
"""


def cell(text: str) -> str:
    """Return text that a Markdown table takes literally."""
    return text.replace("|", "\\|").replace("<", "&lt;").replace("*", "\\*")


def row(flag: Flag) -> str:
    """Return the row of a flag: how it is typed, and what it does."""
    typed = ", ".join([flag.metavar] if flag.argument else flag.words)
    value = "" if flag.argument or not flag.metavar else f" {flag.metavar}"
    notes = f" [{'; '.join(flag.notes)}]" if flag.notes else ""
    typed += value.replace("|", "\\|")
    return f"| `{typed}` | {cell(flag.help + notes)} |"


def section(command: Command) -> Iterator[str]:
    """Yield the lines of one command."""
    doc = command.settings.__doc__ or ""
    yield from (f"## imgtool {command.words}", "", doc, "")
    yield from ("```console", f"$ {command.settings.example}", "```", "")
    everything = [*flags(command.settings), *general(command)]
    for panel, group in groupby(everything, key=lambda flag: "Arguments" if flag.argument else flag.panel):
        yield from (f"| {panel} | |", "|---|---|", *map(row, group), "")


def reference() -> str:
    """Return the whole page."""
    body = [line for command in commands() for line in section(command)]
    return "\n".join([INTRODUCTION, *body]).rstrip() + "\n"


if __name__ == "__main__":
    Path(__file__).with_name("cli.md").write_text(reference(), encoding="utf-8")
