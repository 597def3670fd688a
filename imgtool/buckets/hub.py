"""The Hugging Face Hub, to read from: ``hf://datasets/USER/NAME[@REVISION]/PATH``, ``hf://USER/MODEL/PATH``.

What is there is told by huggingface_hub (extra ``hf``), which also knows the token (HF_TOKEN, or what
``hf auth login`` left) and the server (HF_ENDPOINT); the files are read as those of any web server.
"""

from __future__ import annotations

import importlib
import importlib.util
import os
from collections.abc import Sequence
from functools import cached_property
from typing import Any
from urllib.parse import quote

from imgtool.buckets import Found, Interrupted
from imgtool.buckets.client import TIMEOUT
from imgtool.buckets.patience import patiently
from imgtool.buckets.web import Remote
from imgtool.errors import USAGE, ImgtoolError

_FORM = "write hf://datasets/USER/NAME[@REVISION]/PATH, or hf://USER/MODEL/PATH"

_SIGN_IN = "set HF_TOKEN, or run hf auth login"


class Hub(Remote):
    """A repository, a folder of one, or a single file. Once it was listed, one commit of it is read."""

    def __init__(self, text: str) -> None:
        """Take the address apart, as huggingface_hub does.

        Raises:
            ImgtoolError: Code 2: no repository can have that name, or huggingface_hub is not installed.
        """
        super().__init__()
        if importlib.util.find_spec("huggingface_hub") is None:
            raise ImgtoolError(f"{text} needs huggingface_hub", "pip install 'imgtool[hf]'", USAGE)
        self._library: Any = importlib.import_module("huggingface_hub")
        self._errors: Any = importlib.import_module("huggingface_hub.errors")
        try:
            named = self._library.parse_hf_uri(text.rstrip("/"))
        except ValueError as fault:
            raise ImgtoolError(f"{text} names no repository: {fault}", _FORM, USAGE) from None
        if named.is_bucket:
            raise ImgtoolError(f"{text} is a bucket of the Hub, which is not read", _FORM, USAGE)
        self._kind, self._id, self._path = named.type, named.id, named.path_in_repo
        self._folder = text.endswith("/") or not self._path
        self._text, self._revision = text.rstrip("/"), named.revision or "main"
        self._single = False
        token = self._library.get_token()
        self.headers = {"Authorization": f"Bearer {token}"} if token else {}

    @cached_property
    def _server(self) -> str:
        # The library reads the variable when it is imported.
        return (os.environ.get("HF_ENDPOINT") or self._library.constants.ENDPOINT).rstrip("/")

    @cached_property
    def _ask(self) -> Any:
        self._library.get_session().timeout = TIMEOUT  # the library itself sets none
        return self._library.HfApi(endpoint=self._server)

    def _inside(self, path: str) -> str:
        """Return the path in the repository of a path below."""
        single = self._single or (not self._folder and path == self._path.rpartition("/")[2])
        return self._path if single else "/".join(filter(None, (self._path, path)))

    def url(self, path: str) -> str:
        """Return the hf:// address of a path below; of a single file, its own."""
        return (
            self._text + self._inside(path).removeprefix(self._path) if self._path else f"{self._text}/{path}"
        )

    def address(self, path: str) -> str:
        """Return the address from which the Hub gives a file, or leads on to where it lies."""
        kind = "" if self._kind == "model" else f"{self._kind}s/"
        revision = quote(self._revision, safe="")
        return f"{self._server}/{kind}{self._id}/resolve/{revision}/{quote(self._inside(path))}"

    def tells(self, found: Found) -> bool:
        """Tell that a tag is no ETag: it is the content's hash, and a commit never changes."""
        return False

    def list(self) -> list[Found]:
        """Return every file below, by path, with its hash: SHA-256 of large ones, git's SHA-1 of others.

        Raises:
            Offline: Nobody answers.
            ImgtoolError: There is no such repository or revision, or it wants another token.
        """
        return sorted(patiently(self._listed), key=lambda found: found.path)

    def _listed(self) -> Sequence[Found]:
        try:
            return self._rows()
        except (self._errors.HTTPError, OSError) as fault:
            raise self._explained(fault) from None

    def _rows(self) -> Sequence[Found]:
        about = {"repo_type": self._kind, "revision": self._revision}
        self._revision = self._ask.repo_info(self._id, **about).sha or self._revision
        about["revision"] = self._revision
        if not self._folder:
            rows = self._ask.get_paths_info(self._id, [self._path], **about)
            if not rows:
                return []
            if hasattr(rows[0], "blob_id"):
                self._single = True
                return [_found(rows[0], self._path.rpartition("/")[2])]
        self._folder = True
        cut = len(self._path) + 1 if self._path else 0
        try:
            rows = list(self._ask.list_repo_tree(self._id, self._path or None, recursive=True, **about))
        except self._errors.EntryNotFoundError:
            return []
        return [_found(row, row.path[cut:]) for row in rows if hasattr(row, "blob_id")]

    def _explained(self, fault: Exception) -> Interrupted | ImgtoolError:
        """Say in plain words what the library says otherwise."""
        errors, where = self._errors, self._text
        if isinstance(fault, errors.GatedRepoError):
            kind = "" if self._kind == "model" else f"{self._kind}s/"
            hint = f"accept its conditions at {self._server}/{kind}{self._id}, then {_SIGN_IN}"
            return ImgtoolError(f"{where} is given only to who asked for it", hint)
        if isinstance(fault, errors.RepositoryNotFoundError):
            hint = f"check the name; if it is private, {_SIGN_IN}"
            return ImgtoolError(f"no such repository: {where}", hint, USAGE)
        if isinstance(fault, errors.RevisionNotFoundError):
            what = f"{where}: no branch, tag or commit {self._revision}"
            return ImgtoolError(what, "write @REVISION behind the name", USAGE)
        if isinstance(fault, errors.OfflineModeIsEnabled):
            return ImgtoolError(f"cannot read {where}: HF_HUB_OFFLINE is set", "unset it")
        if not isinstance(fault, errors.HfHubHTTPError):
            return Interrupted(f"no answer from {self._server}: {fault}")
        status = getattr(fault.response, "status_code", 0)
        if status in (401, 403):
            return ImgtoolError(f"no permission to read {where} ({status})", _SIGN_IN)
        if status in (408, 429) or status >= 500:
            return Interrupted(f"{where}: the server is too busy ({status})")
        return ImgtoolError(f"cannot read {where}: the server says {status}", "check the address")


def _found(row: Any, path: str) -> Found:
    name, value = ("sha256", row.lfs.sha256) if row.lfs else ("git-sha1", row.blob_id)
    return Found(path, row.size, value, ((name, value),))
