"""The hub: finding what a name means, and uploading a folder by the hub's own HTTP interface.

A commit takes four requests: the repository is made, the hub says which files it wants stored beside git (LFS), those
are sent to where it says, and one commit names them all and carries the rest. The interface is that of huggingface_hub
2.4 (https://github.com/huggingface/huggingface_hub, `_commit_api.py` and `lfs.py`).
"""

from __future__ import annotations

import base64
import hashlib
import json
import os
import sys
import time
import urllib.error
import urllib.request
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import IO, Any, Final
from urllib.parse import quote

from rustune import _native
from rustune._native import ConfigError, HubError, __version__
from rustune.notices import tell_once

ARGUMENTS: Final = ("repo_id", "token", "private", "commit_message", "commit_description", "revision", "create_pr")
"""What every `push_to_hub` takes."""

_SAMPLE: Final = 512  # bytes of a file the hub looks at
_CHUNK: Final = 1 << 20
_ATTEMPTS: Final = 4
_FIRST_WAIT_S = 0.5
_TIMEOUT_S: Final = 60
_LFS: Final = {"Accept": "application/vnd.git-lfs+json", "Content-Type": "application/vnd.git-lfs+json"}


def resolve(
    name: str,
    *,
    token: str | None = None,
    revision: str | None = None,
    cache_dir: str | os.PathLike[str] | None = None,
    local_files_only: bool = False,
) -> str:
    """Finds the folder that a name means, downloading it if need be.

    Args:
        name: A folder, or `owner/name`.
        token: For private repositories.
        revision: A branch, tag or commit.
        cache_dir: Where downloads are kept.
        local_files_only: Whether to look at what was downloaded before only.

    Returns:
        The folder.

    Raises:
        HubError: If the repository cannot be had.
    """
    cache = None if cache_dir is None else os.fspath(cache_dir)
    return os.fspath(_native.resolve_model(name, revision, token, cache, local_files_only, _tell_download))


def warn_of_literal(token: Any) -> None:
    """Warns of a secret that stands in the notebook.

    Args:
        token: What was passed as `token`; never shown.
    """
    if isinstance(token, str) and token and token not in (_variable("HF_TOKEN"), _variable("HUGGING_FACE_HUB_TOKEN")):
        tell_once("token: a secret written in a notebook is easily published with it; set HF_TOKEN instead")


def upload_folder(
    folder: str | os.PathLike[str],
    repo_id: str,
    *,
    token: str | bool | None = None,
    private: bool | None = None,
    commit_message: str,
    commit_description: str = "",
    revision: str | None = None,
    create_pr: bool = False,
    folder_there: str = "",
) -> str:
    """Uploads the files of a folder in one commit.

    Args:
        folder: Whose files are uploaded, without those in folders below.
        repo_id: `owner/name`, or a name alone for the token's owner; made if it is not there.
        token: The access token; None or True for `HF_TOKEN` or the file that `hf auth login` writes.
        private: Whether a new repository is private; None leaves it to the hub.
        commit_message: The commit's title.
        commit_description: What else it says.
        revision: The branch; `main` if not given.
        create_pr: Whether to open a pull request instead of writing to the branch.
        folder_there: The folder of the repository they go to; its top if not given.

    Returns:
        The address of the commit (of the pull request, if one was asked for).

    Raises:
        ConfigError: If there is no token, or the name cannot be one.
        HubError: If the hub cannot be reached, or refuses.
        OSError: If a file cannot be read.
    """
    warn_of_literal(token)
    hub = _Hub(repo_id, token)
    hub.create(private)
    prefix = f"{folder_there}/" if folder_there else ""
    files = {f"{prefix}{path.name}": _File(path) for path in sorted(Path(folder).iterdir()) if path.is_file()}
    branch = quote(revision or "main", safe="")
    large = [files[name] for name in hub.stored_beside_git(files, branch, create_pr) if files[name].size]
    if large:
        hub.send(large)
    lines: list[dict[str, Any]] = [
        {"key": "header", "value": {"summary": commit_message, "description": commit_description}}
    ]
    for name, file in files.items():
        if file in large:
            entry = {"path": name, "algo": "sha256", "oid": file.sha256, "size": file.size}
            lines.append({"key": "lfsFile", "value": entry})
        else:
            content = base64.b64encode(file.path.read_bytes()).decode()
            lines.append({"key": "file", "value": {"content": content, "path": name, "encoding": "base64"}})
    return hub.commit(lines, branch, create_pr)


class _File:
    """A file to be uploaded.

    Args:
        path: Where it is.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.size = path.stat().st_size
        self._sha256 = ""

    @property
    def sha256(self) -> str:
        """The hash of the contents, in hexadecimal."""
        if not self._sha256:
            digest = hashlib.sha256()
            with self.path.open("rb") as stream:
                while chunk := stream.read(_CHUNK):
                    digest.update(chunk)
            self._sha256 = digest.hexdigest()
        return self._sha256

    def sample(self) -> str:
        """The beginning, in base64."""
        with self.path.open("rb") as stream:
            return base64.b64encode(stream.read(_SAMPLE)).decode()


class _NoRedirect(urllib.request.HTTPRedirectHandler):
    """Follows no redirect: the token must not travel to another host."""

    def redirect_request(self, *_: Any) -> None:
        """Refuses."""


class _Hub:
    """A repository on the hub, with the token for it.

    Args:
        repo_id: `owner/name` or a name.
        token: As of `upload_folder`.
    """

    def __init__(self, repo_id: str, token: str | bool | None) -> None:
        parts = repo_id.split("/")
        if len(parts) > 2 or not all(part.strip("-.") == part != "" and not set(part) - _NAME for part in parts):
            raise ConfigError(f"repo_id = {repo_id!r}: expected owner/name, of letters, digits, - _ and .")
        for switch in ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE"):
            if _variable(switch).upper() in ("1", "ON", "YES", "TRUE"):
                raise HubError(f"{repo_id}: {switch} is set: nothing is uploaded; save_pretrained writes a folder")
        self.repo_id = repo_id
        self.endpoint = (_variable("HF_ENDPOINT") or "https://huggingface.co").rstrip("/")
        self._token = token if isinstance(token, str) and token else "" if token is False else _stored_token()
        if not self._token:
            raise ConfigError(f"token: uploading to {repo_id} needs one; set HF_TOKEN or run hf auth login")
        self._opener = urllib.request.build_opener(_NoRedirect)

    def create(self, private: bool | None) -> None:
        """Makes the repository unless it is there, and learns its owner."""
        owner, _, name = self.repo_id.rpartition("/")
        wanted: dict[str, Any] = {"name": name, "organization": owner or None, "type": "model"}
        if private is not None:
            wanted["private"] = private
        made = self._json("POST", f"{self.endpoint}/api/repos/create", wanted, accept=(409,))
        if not owner:
            # Both the answer to a new repository and the complaint about one that is there carry its address.
            address = str(made.get("url", ""))
            self.repo_id = str(made.get("name") or "/".join(address.rstrip("/").split("/")[-2:]))
            if self.repo_id.count("/") != 1:
                raise HubError(f"{name}: the hub did not say whose repository this is; write owner/{name}")

    def stored_beside_git(self, files: Mapping[str, _File], branch: str, create_pr: bool) -> list[str]:
        """Asks which files the hub wants by LFS."""
        listed = [{"path": name, "sample": file.sample(), "size": file.size} for name, file in files.items()]
        url = f"{self.endpoint}/api/models/{self.repo_id}/preupload/{branch}" + ("?create_pr=1" if create_pr else "")
        answer = self._json("POST", url, {"files": listed})
        try:
            return [entry["path"] for entry in answer["files"] if entry["uploadMode"] == "lfs"]
        except (KeyError, TypeError):
            raise self._nonsense(url) from None

    def send(self, files: list[_File]) -> None:
        """Sends files to where the hub says; those it has already are passed over."""
        url = f"{self.endpoint}/{self.repo_id}.git/info/lfs/objects/batch"
        wanted = {
            "operation": "upload",
            "transfers": ["basic", "multipart"],
            "objects": [{"oid": file.sha256, "size": file.size} for file in files],
            "hash_algo": "sha256",
        }
        answer = self._json("POST", url, wanted, headers=_LFS)
        by_hash = {file.sha256: file for file in files}
        try:
            if by_hash.keys() != {entry["oid"] for entry in answer["objects"]}:
                raise self._nonsense(url)
            for entry in answer["objects"]:
                if "error" in entry:
                    raise HubError(f"{self.repo_id}: the hub refused a file: {entry['error'].get('message')}")
                if actions := entry.get("actions"):
                    self._send_one(by_hash[entry["oid"]], actions["upload"])
                    if check := actions.get("verify"):
                        self._json("POST", check["href"], {"oid": entry["oid"], "size": entry["size"]})
        except (KeyError, TypeError, AttributeError):
            raise self._nonsense(url) from None

    def commit(self, lines: list[dict[str, Any]], branch: str, create_pr: bool) -> str:
        """Makes the commit and returns its address."""
        url = f"{self.endpoint}/api/models/{self.repo_id}/commit/{branch}" + ("?create_pr=1" if create_pr else "")
        body = b"".join(json.dumps(line).encode() + b"\n" for line in lines)
        # Not tried again: the answer may be lost after the commit was made.
        reply = self._request("POST", url, body, {"Content-Type": "application/x-ndjson"}, attempts=1)
        answer = self._read_json(reply[0], url)
        return str(answer.get("pullRequestUrl" if create_pr else "commitUrl") or f"{self.endpoint}/{self.repo_id}")

    def _send_one(self, file: _File, action: Mapping[str, Any]) -> None:
        """Sends one file, in parts if the hub asks for them."""
        header = dict(action.get("header") or {})
        chunk_size = int(header.pop("chunk_size", 0))
        if not chunk_size:
            sent = {**header, "Content-Length": str(file.size)}
            for attempt in range(_ATTEMPTS):
                with file.path.open("rb") as stream:
                    if self._try("PUT", action["href"], stream, sent, attempt, _ATTEMPTS) is not None:
                        break
            return
        parts = []
        urls = [url for _, url in sorted((int(key), url) for key, url in header.items() if key.isdigit())]
        if len(urls) != -(-file.size // chunk_size):
            raise self._nonsense(action["href"])
        with file.path.open("rb") as stream:
            for number, url in enumerate(urls, start=1):
                _, headers = self._request("PUT", url, stream.read(chunk_size), {})
                parts.append({"partNumber": number, "etag": headers["etag"]})
        self._json("POST", action["href"], {"oid": file.sha256, "parts": parts}, headers=_LFS)

    def _json(
        self,
        method: str,
        url: str,
        body: Any,
        *,
        headers: Mapping[str, str] | None = None,
        accept: tuple[int, ...] = (),
    ) -> dict[str, Any]:
        """A request of JSON, answered with JSON."""
        sent = {"Content-Type": "application/json", **(headers or {})}
        return self._read_json(self._request(method, url, json.dumps(body).encode(), sent, accept=accept)[0], url)

    def _read_json(self, answer: bytes, url: str) -> dict[str, Any]:
        try:
            read = json.loads(answer or b"{}")
        except ValueError:
            raise self._nonsense(url) from None
        return read if isinstance(read, dict) else {}

    def _request(
        self,
        method: str,
        url: str,
        body: bytes,
        headers: Mapping[str, str],
        *,
        accept: tuple[int, ...] = (),
        attempts: int = _ATTEMPTS,
    ) -> tuple[bytes, Mapping[str, str]]:
        """A request, tried again when the hub or the way to it fails."""
        for attempt in range(attempts):
            if (reply := self._try(method, url, body, headers, attempt, attempts, accept)) is not None:
                return reply
        raise AssertionError("the last attempt answers or raises")

    def _try(
        self,
        method: str,
        url: str,
        body: bytes | IO[bytes],
        headers: Mapping[str, str],
        attempt: int,
        attempts: int,
        accept: tuple[int, ...] = (),
    ) -> tuple[bytes, Mapping[str, str]] | None:
        """One attempt: the answer, None if another should be made, or the error."""
        sent = {"User-Agent": f"rustune/{__version__}", **headers}
        if url == self.endpoint or url.startswith(f"{self.endpoint}/"):
            sent["Authorization"] = f"Bearer {self._token}"
        elif not url.startswith(("https://", "http://")):
            raise self._nonsense(url)
        request = urllib.request.Request(url, data=body, headers=sent, method=method)
        try:
            with self._opener.open(request, timeout=_TIMEOUT_S) as answer:
                return answer.read(), _lower(answer.headers)
        except urllib.error.HTTPError as error:
            with error:
                said = error.read()
                if error.code in accept:
                    return said, _lower(error.headers)
                failure, again = self._refusal(error.code, said), error.code in (429, 500, 502, 503, 504)
        except OSError as error:  # URLError, timeouts, broken connections
            reason = getattr(error, "reason", error)
            failure, again = HubError(f"{self.repo_id}: {self.endpoint} cannot be reached ({reason})"), True
        if not again or attempt + 1 >= attempts:
            raise failure from None
        time.sleep(_FIRST_WAIT_S * 2**attempt)
        return None

    def _refusal(self, status: int, said: bytes) -> HubError:
        """What went wrong and what to do about it; never the token."""
        try:
            reason = str(json.loads(said)["error"])
        except (ValueError, KeyError, TypeError):
            reason = ""
        advice = {
            401: "the token was refused; make a new one on the hub and set HF_TOKEN",
            403: "the token may not write there; it needs the right to write, and the owner must be its user",
            404: "no such repository, or the token may not see it; check the owner's name",
        }.get(status, "the hub refused the upload")
        told = f": {reason.replace(self._token, '(token)')}" if reason else ""
        return HubError(f"{self.repo_id}: {advice} (HTTP {status}{told})")

    def _nonsense(self, url: str) -> HubError:
        return HubError(f"{self.repo_id}: {url.partition('?')[0]} did not answer as a hub does; check HF_ENDPOINT")


_NAME: Final = frozenset("abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789-_.")


def _tell_download(kind: str, text: str, done: int, total: int | None) -> None:
    """Shows what a download does: a line that moves on a terminal, and warnings everywhere."""
    if kind == "warning":
        warnings.warn(text, stacklevel=2)
    elif sys.stderr.isatty():
        share = f"{done / total:4.0%} of {total / 1e6:,.0f} MB" if total else f"{done / 1e6:,.0f} MB"
        sys.stderr.write(f"\r{text}: {share}" + ("\n" if done == total else ""))
        sys.stderr.flush()


def _lower(headers: Any) -> dict[str, str]:
    """Headers by their names in lower case."""
    return {str(name).lower(): str(value) for name, value in headers.items()}


def _variable(name: str) -> str:
    return os.environ.get(name, "").strip()


def _stored_token() -> str:
    """The token of the environment, else of the file that `hf auth login` writes; empty if there is none."""
    if token := _variable("HF_TOKEN") or _variable("HUGGING_FACE_HUB_TOKEN"):
        return token
    home = _variable("HF_HOME") or os.path.join(_variable("XDG_CACHE_HOME") or "~/.cache", "huggingface")
    path = Path(_variable("HF_TOKEN_PATH") or os.path.join(home, "token")).expanduser()
    return path.read_text(encoding="utf-8").strip() if path.is_file() else ""
