"""Names of what is on the Hugging Face Hub, with revisions; asks for it, and fails within seconds.

The libraries would retry for a minute.
"""

import os
import re
from functools import cache
from pathlib import Path
from typing import Literal

from rlkd_trl.errors import InputError, is_command, is_first_process, one_line

_PATIENCE = 5.0  # seconds to connect, and again to answer
# A file that nearly every repository has. If it is missing, the Hub's answer still tells whether there is a
# repository.
_PROBED = {"model": "config.json", "dataset": "README.md"}
_ADAPTERS = "adapter_config.json"  # which a model's repository has instead where it holds adapters alone
_NAME = r"\w[\w.-]*"
HUB_ID = re.compile(f"{_NAME}(?:/{_NAME})?", re.ASCII)
WITH_OWNER = re.compile(f"{_NAME}/{_NAME}", re.ASCII)
_AT_REVISION = re.compile(rf"({HUB_ID.pattern})@(\w[\w./-]*)", re.ASCII)
_COMMIT = re.compile(r"[0-9a-f]{40}")
_URI = "hf://"
_REVISION = r"refs/[\w.-]+/[\w.-]+|(?!refs/)[\w.-]+"  # such as refs/pr/1
_FILE_URI = re.compile(
    _URI + r"(?P<dataset>datasets/)?(?!datasets/)"
    rf"(?P<repository>{WITH_OWNER.pattern})(?:@(?P<revision>{_REVISION}))?/(?P<file>.+)",
    re.ASCII,
)
Kind = Literal["model", "dataset"]


def split_revision(name: str, revision: str | None = None) -> tuple[str, str | None]:
    """The Hub id and the revision of "owner/name@revision"; any other name is returned as it is.

    What exists locally under the whole name is local. revision: one that is given elsewhere, as by a flag.

    Raises:
        InputError: There are two revisions.
    """
    parts = _AT_REVISION.fullmatch(name)
    if parts is None or Path(name).exists():
        return name, revision
    if revision not in (None, parts[2]):
        raise InputError(f"{name} has two revisions, {parts[2]} and {revision}: give one of them.")
    return parts[1], parts[2]


def file_on_hub(flag: str, name: str, usual: str) -> Path | None:
    """The file that a name means on the Hub, downloaded unless it is in the cache; None if the name can mean none.

    name: "hf://[datasets/]owner/name[@revision]/path"; or "owner/name[@revision]", a dataset, of which the file
    `usual` is meant.

    Raises:
        InputError: The URI is malformed; or the file cannot be had, and the message says why.
    """
    from huggingface_hub import hf_hub_download

    (repository, revision), kind, file = split_revision(name), "dataset", usual
    if name.startswith(_URI):
        parts = _FILE_URI.fullmatch(name)
        if parts is None:
            raise InputError(
                f"{flag} {name} names no file on the Hub: write hf://datasets/owner/name@revision/path/file, or of a "
                "model hf://owner/name@revision/path/file; @revision can be left out."
            )
        kind = "dataset" if parts["dataset"] else "model"
        repository, revision, file = parts["repository"], parts["revision"], parts["file"]
    elif not WITH_OWNER.fullmatch(repository):
        return None
    require_on_hub(flag, f"{repository}@{revision}" if revision else repository, kind, file)
    try:
        return Path(hf_hub_download(repository, file, repo_type=kind, revision=revision))
    except Exception as error:  # from the HTTP library, which differs between versions of huggingface_hub
        if cached := _cached(repository, revision, file, kind):
            return Path(cached)
        raise InputError(
            f"{flag} {name} is not here, and {file} of the {kind} {repository} is neither in the Hub's cache nor can "
            f"it be fetched ({type(error).__name__}): check the spelling, or the connection (HF_HUB_OFFLINE forbids "
            "it)."
        ) from error


@cache
def require_on_hub(flag: str, name: str, kind: Kind = "model", file: str | None = None) -> None:
    """Asks the Hub once, without retries, whether it has a repository, unless in offline mode (HF_HUB_OFFLINE).

    If it cannot be reached and the cache has the repository, this process is in offline mode from here on: otherwise
    the libraries would try again for minutes. name: a Hub id, or "id@revision". file: one that it must have.

    Raises:
        InputError: There is no such repository, revision or file, it is gated or private, or the Hub cannot be
            reached; and it is not in the cache.
    """
    from huggingface_hub import constants, get_hf_file_metadata, hf_hub_url
    from huggingface_hub.errors import EntryNotFoundError, HFValidationError, RepositoryNotFoundError

    if constants.is_offline_mode():
        return
    probed, (repo_id, revision) = file or _PROBED[kind], split_revision(name)
    try:
        get_hf_file_metadata(hf_hub_url(repo_id, probed, repo_type=kind, revision=revision), timeout=_PATIENCE)
    except Exception as error:  # that of a lost connection is from the HTTP library
        if isinstance(error, EntryNotFoundError) and file is None:
            return
        if isinstance(error, HFValidationError) or not _is_cached(repo_id, revision, probed, kind):
            reason = _why_not_there(error, kind, repo_id, revision, file)
            raise InputError(f"{flag} {name} {reason}") from error
        if not isinstance(error, RepositoryNotFoundError | EntryNotFoundError):
            _use_cache_only(f"{constants.ENDPOINT} cannot be reached ({one_line(error, at_most=200)})")


def _why_not_there(error: Exception, kind: Kind, repo_id: str, revision: str | None, file: str | None) -> str:
    """What the Hub's answer, or the lack of one, means for a user, and what to do."""
    from huggingface_hub import constants
    from huggingface_hub.errors import (
        EntryNotFoundError,
        GatedRepoError,
        HFValidationError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    if isinstance(error, HFValidationError):
        return f"is neither a local path nor a possible Hub id: {error}"
    if isinstance(error, GatedRepoError):
        return (
            f"is gated on the Hub: accept its terms on {constants.ENDPOINT}/{repo_id}, and log in with hf auth login "
            "or HF_TOKEN."
        )
    if isinstance(error, RepositoryNotFoundError):
        return (
            f"is not here, and there is no {kind} of that name on the Hub ({constants.ENDPOINT}): check the spelling, "
            "or, if it is private, log in with hf auth login or HF_TOKEN."
        )
    if isinstance(error, RevisionNotFoundError):
        return f"is on the Hub ({constants.ENDPOINT}), but has no branch, tag or commit {revision or 'main'}."
    if isinstance(error, EntryNotFoundError):
        return f"is on the Hub ({constants.ENDPOINT}), but has no file {file}."
    return (
        f"is neither here nor in the Hub's cache, and the Hub ({constants.ENDPOINT}) cannot be reached "
        f"({type(error).__name__}: {one_line(error, at_most=200)}): check the spelling of the path, or the connection."
    )


def _use_cache_only(reason: str) -> None:
    """Sets the libraries to offline mode, within a command also the processes that it starts, and says so."""
    import datasets
    from huggingface_hub import constants

    if is_command():
        os.environ["HF_HUB_OFFLINE"] = "1"
    constants.HF_HUB_OFFLINE = datasets.config.HF_HUB_OFFLINE = True
    if is_first_process():
        print(f"{reason}: what is in the Hub's cache is used from here on, as with HF_HUB_OFFLINE=1.", flush=True)


def _is_cached(repo_id: str, revision: str | None, file: str, kind: Kind) -> bool:
    """Whether that revision of the repository, or where none is named any, is in the cache; of a dataset its rows."""
    from huggingface_hub import constants
    from huggingface_hub.file_download import repo_folder_name

    if kind == "dataset" and file == _PROBED[kind]:
        from datasets import config

        commit = commit_of(repo_id, revision, kind) if revision else "*"
        return any(Path(config.HF_DATASETS_CACHE).glob(f"{repo_id.replace('/', '___')}/*/*/{commit}"))
    files = [file, _ADAPTERS] if file == _PROBED["model"] else [file]
    if revision is not None:
        return any(_cached(repo_id, revision, name, kind) for name in files)
    snapshots = Path(constants.HF_HUB_CACHE) / repo_folder_name(repo_id=repo_id, repo_type=kind) / "snapshots"
    return any(any(snapshots.glob(f"*/{name}")) for name in files)


def _cached(repo_id: str, revision: str | None, file: str, kind: Kind) -> str | None:
    """The path of a file in the cache, at the revision or the main branch."""
    from huggingface_hub import constants, try_to_load_from_cache

    path = try_to_load_from_cache(repo_id, file, constants.HF_HUB_CACHE, revision, kind)
    return path if isinstance(path, str) else None


def commit_of(repo_id: str, revision: str, kind: Kind) -> str | None:
    """The commit that the Hub last said a revision to be, as the cache has noted it; None if it was not asked."""
    from huggingface_hub import constants
    from huggingface_hub.file_download import repo_folder_name

    noted = Path(constants.HF_HUB_CACHE) / repo_folder_name(repo_id=repo_id, repo_type=kind) / "refs" / revision
    if _COMMIT.fullmatch(revision):
        return revision
    return noted.read_text().strip() if noted.is_file() else None
