"""Inventories on the Hugging Face hub: finding one by its name, fetching it, sending one.

Only the files of an inventory and of its run are fetched or sent: JSON, safetensors and the model
card. None of them is ever unpickled.
"""

import json
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from fnmatch import fnmatch
from pathlib import Path, PurePath
from typing import Any

from polyroute.errors import InputError, reason
from polyroute.host.files import read_json
from polyroute.host.paths import check_link, expanded
from polyroute.saved.digests import SHA256, described_digest

__all__ = [
    "CARD",
    "DESCRIPTION",
    "FILES",
    "HUB_ID",
    "MODULES",
    "P3",
    "SHARDS",
    "SKILLS",
    "Repository",
    "Snapshot",
    "locate",
    "public",
    "push",
]

DESCRIPTION = "polyroute.json"
SKILLS = "inventory.safetensors"
MODULES = "modules.safetensors"
"""The parameters of a rule, and whole modules of the base model that trained; if there are any."""
SHARDS = "routes-*-of-*.safetensors"
CARD = "README.md"
FILES = (DESCRIPTION, SKILLS, MODULES, SHARDS, "run.json", "metrics.json", "evaluate-*.json", CARD)
"""What a repository holds, as patterns."""
HUB_ID = re.compile(r"[\w-][\w.-]*/[\w-][\w.-]*", re.ASCII)
P3 = "bigscience/P3"
"""The data set of prompts that T0 was trained on."""
LOG_IN = "log in with `hf auth login`, or set HF_TOKEN"


@dataclass(frozen=True)
class Snapshot(os.PathLike[str]):
    """One version of a repository on the hub, in the cache; it can be used as a path.

    Attributes:
        name: the id of the repository, as the user gave it.
        folder: the folder in the cache that holds the files fetched so far.
        options: `token`, `cache_dir` and `local_files_only`, as the hub takes them.
    """

    name: str
    folder: Path
    options: Mapping[str, Any] = field(repr=False)

    def __fspath__(self) -> str:
        return str(self.folder)

    def __str__(self) -> str:
        return self.name

    def fetch(self, *files: str) -> None:
        """Fetch more files of this version; files in the cache need no network.

        Raises:
            InputError: they cannot be fetched.
        """
        _download(self.name, files, revision=self.folder.name, **self.options)


def locate(
    name: str | os.PathLike[str],
    files: tuple[str, ...] = FILES,
    *,
    revision: str | None = None,
    token: str | bool | None = None,
    cache_dir: str | os.PathLike[str] | None = None,
    local_files_only: bool = False,
) -> Path | Snapshot:
    """Find the folder that a name stands for: a local folder, or a hub id, which is fetched.

    Args:
        name: a folder, or an id such as `user/inventory` or `user/inventory@revision`. A snapshot
            is returned as it is.
        files: patterns of the files to fetch. The first is the name of the one that describes the
            others, without which they are nothing.
        revision: a branch, a tag or a commit on the hub; by default the main branch.
        token: a token for the hub, instead of the stored one; False for no token.
        cache_dir: the cache of the hub, instead of the usual one.
        local_files_only: use only what is in the cache, without network.

    Returns:
        A snapshot for a hub id. Any other name is returned as a path, whether it exists or not.

    Raises:
        InputError: there is neither such a folder nor such a repository or revision, the repository
            cannot be read or has no description, or a revision is given for a local folder.
    """
    if isinstance(name, Snapshot):
        return name
    path = expanded(name)
    text = name.as_posix() if isinstance(name, PurePath) else os.fspath(name)
    base, at, version = text.partition("@")
    if path.exists() or not HUB_ID.fullmatch(base):
        if revision is not None:
            raise InputError(
                f"revision={revision!r} is for the hub, but {path} is no hub id such as "
                "user/inventory: leave the revision out"
                if not path.exists()
                else f"revision={revision!r} is for the hub, but {path} is a local folder: leave "
                "the revision out, or work in another directory"
            )
        return path
    if (at and not version) or revision == "":
        raise InputError(f"the revision of {base} is empty: name a branch, a tag or a commit")
    if at and revision is not None:
        raise InputError(f"{os.fspath(name)!r} and revision={revision!r} both name a version")
    options = {"token": token, "cache_dir": cache_dir, "local_files_only": local_files_only}
    folder = _download(base, files, revision=version or revision, **options)
    if not (folder / files[0]).is_file():
        what = "inventory" if files[0] == DESCRIPTION else "adapter"
        raise InputError(f"{base} on the hub holds no {what}: there is no {files[0]} in it")
    return Snapshot(base, folder, options)


def _download(name: str, files: tuple[str, ...], *, revision: str | None, **options: Any) -> Path:
    from huggingface_hub import constants, errors, snapshot_download

    try:
        return Path(
            snapshot_download(name, revision=revision, allow_patterns=list(files), **options)
        )
    except errors.GatedRepoError as error:
        raise InputError(
            f"{name} on the hub is gated: ask for access on its page, then {LOG_IN}"
        ) from error
    except errors.RepositoryNotFoundError as error:
        raise InputError(
            f"there is no folder {name} here, and no repository {name} on the hub that can be "
            f"read: check the name; if it is private, {LOG_IN}"
        ) from error
    except errors.RevisionNotFoundError as error:
        raise InputError(
            f"{name} on the hub has no revision {revision!r}: name a branch, a tag or a commit"
        ) from error
    except errors.LocalEntryNotFoundError as error:
        at = "" if revision is None else f" at {revision}"
        missing = f"there is no folder {name} here, and {name}{at} is not whole in the hub's cache"
        if options["local_files_only"]:
            fix = "fetch it once without local_files_only"
        elif constants.HF_HUB_OFFLINE:
            fix = "fetch it once without HF_HUB_OFFLINE"
        else:
            fix = "the hub cannot be reached, so check the network"
        raise InputError(f"{missing}: {fix}") from error
    except Exception as error:  # the network, the disk, a wrong token
        raise InputError(f"{name} cannot be fetched from the hub: {reason(error)}") from error


@dataclass(frozen=True)
class Repository:
    """Where on the hub an inventory is sent."""

    repo_id: str
    """The id, such as `user/inventory`."""
    revision: str | None = None
    """The branch, created if it is missing; None for the main branch."""
    token: str | bool | None = field(default=None, repr=False)
    """A token for the hub; None for the stored one."""


def push(
    folder: str | os.PathLike[str],
    repository: Repository,
    card: str,
    *,
    private: bool | None = None,
    message: str | None = None,
) -> str:
    """Send the inventory in a folder to the hub, as one commit.

    The repository is created if it is missing. Shards of an earlier, larger table are deleted
    there; files that do not belong to an inventory or a run stay. In JSON files, paths of this
    machine are cut to their last part, and the command line of the run is left out.

    Args:
        folder: the folder of the inventory or of the run.
        repository: where it is sent.
        card: the text of its README.md.
        private: make a new repository private.
        message: the message of the commit.

    Returns:
        The address of the commit.

    Raises:
        InputError: the folder holds no inventory, the name is no hub id, or the hub refuses.
    """
    from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi, errors

    path, repo_id, revision = Path(folder), repository.repo_id, repository.revision
    if not (path / DESCRIPTION).is_file():
        raise InputError(f"{path} holds no inventory: there is no {DESCRIPTION} in it")
    if not HUB_ID.fullmatch(repo_id):
        raise InputError(f"{repo_id!r} is no hub id: write it as user/inventory")
    ours = [each for each in sorted(path.iterdir()) if _is_ours(each.name)]
    for each in ours:
        check_link(each)
    contents = {each.name: _content(each) for each in ours}
    contents[CARD] = card.encode()
    api = HfApi(token=repository.token)
    try:
        api.create_repo(repo_id, private=private, exist_ok=True)
        if revision is not None:
            api.create_branch(repo_id, branch=revision, exist_ok=True)
        former = api.list_repo_files(repo_id, revision=revision)
        commit = api.create_commit(
            repo_id,
            [
                *(CommitOperationAdd(name, content) for name, content in contents.items()),
                *(CommitOperationDelete(n) for n in former if _is_ours(n) and n not in contents),
            ],
            commit_message=message or "Upload a polyroute inventory",
            revision=revision,
        )
    except errors.OfflineModeIsEnabled as error:
        raise InputError(f"{repo_id} cannot be sent: HF_HUB_OFFLINE is set") from error
    except errors.HfHubHTTPError as error:
        status = error.response.status_code
        fix = f": check the name and your rights, and {LOG_IN}" if status in (401, 403, 404) else ""
        raise InputError(
            f"the hub refused {repo_id} (status {status}, {reason(error)}){fix}"
        ) from error
    except Exception as error:  # the network
        raise InputError(f"{repo_id} cannot be sent to the hub: {reason(error)}") from error
    return commit.commit_url


def _is_ours(name: str) -> bool:
    return any(fnmatch(name, pattern) for pattern in FILES)


def _content(path: Path) -> Path | bytes:
    """What is sent for a file: tensors unchanged, JSON without the paths of this machine."""
    if path.suffix != ".json":
        return path
    value = read_json(path)
    cleaned = public(value)
    if cleaned == value:
        return path
    if isinstance(cleaned, dict) and SHA256 in cleaned:
        cleaned[SHA256] = described_digest(cleaned)
    return json.dumps(cleaned, indent=1, ensure_ascii=False).encode()


_LOCAL = re.compile(r"(^|=|file://)(/|~|[A-Za-z]:[\\/])")
"""Matches a path of this machine, also inside an option of a reader (`dir=/data`)."""


def public(value: Any) -> Any:
    """A JSON value with paths of this machine cut to their last part.

    Names of tasks are kept. The command line (`argv`) is left out; the options made from it stay.
    """
    if isinstance(value, dict):
        kept = {k: v for k, v in value.items() if k != "argv"}
        return {k: v if k in ("tasks", "task") else public(v) for k, v in kept.items()}
    if isinstance(value, list):
        return [public(each) for each in value]
    if isinstance(value, str) and _LOCAL.search(value):
        return re.split(r"[\\/]", value.rstrip("\\/"))[-1]
    return value
