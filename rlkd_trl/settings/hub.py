"""Asks the Hugging Face Hub for a repository, and fails within seconds; the libraries would retry for a minute."""

from functools import cache
from pathlib import Path
from typing import Literal

from rlkd_trl.errors import InputError

_PATIENCE = 5.0  # seconds to connect, and again to answer
# A file that nearly every repository has. If it is missing, the Hub's answer still tells whether there is a
# repository.
_PROBED = {"model": "config.json", "dataset": "README.md"}


@cache
def require_on_hub(flag: str, repo_id: str, kind: Literal["model", "dataset"] = "model") -> None:
    """Asks the Hub once, without retries, whether it has a repository, unless that is in the local cache.

    In offline mode (HF_HUB_OFFLINE) it does nothing.

    Raises:
        InputError: There is no such repository, it is gated or private, or the Hub cannot be reached.
    """
    from huggingface_hub import constants, get_hf_file_metadata, hf_hub_url
    from huggingface_hub.errors import (
        EntryNotFoundError,
        GatedRepoError,
        HFValidationError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    file = _PROBED[kind]
    what = f"{flag} {repo_id}"
    try:
        if constants.is_offline_mode() or _is_cached(repo_id, file, kind):
            return
        get_hf_file_metadata(hf_hub_url(repo_id, file, repo_type=kind), timeout=_PATIENCE)
    except (EntryNotFoundError, RevisionNotFoundError):
        return
    except HFValidationError as error:
        raise InputError(f"{what} is neither a local path nor a possible Hub id: {error}") from error
    except GatedRepoError as error:
        raise InputError(
            f"{what} is gated on the Hub: accept its terms on {constants.ENDPOINT}/{repo_id}, and log in with "
            "hf auth login or HF_TOKEN."
        ) from error
    except RepositoryNotFoundError as error:
        raise InputError(
            f"{what} is not here, and there is no {kind} of that name on the Hub ({constants.ENDPOINT}): check the "
            "spelling, or, if it is private, log in with hf auth login or HF_TOKEN."
        ) from error
    except Exception as error:  # from the HTTP library, which differs between versions of huggingface_hub
        raise InputError(
            f"{what} is neither here nor in the Hub's cache, and the Hub ({constants.ENDPOINT}) cannot be reached "
            f"({type(error).__name__}: {_one_line(error)}): check the spelling of the path, or the connection."
        ) from error


def _is_cached(repo_id: str, file: str, kind: str) -> bool:
    """Whether any revision of the repository is in the cache."""
    from huggingface_hub import constants
    from huggingface_hub.file_download import repo_folder_name

    snapshots = Path(constants.HF_HUB_CACHE) / repo_folder_name(repo_id=repo_id, repo_type=kind) / "snapshots"
    return any(snapshots.glob(f"*/{file}"))


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())[:200].rstrip(".")
