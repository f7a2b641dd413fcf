"""Sends the student of a run to the Hub. What would fail is said before training; what fails later loses nothing."""

import shlex
from pathlib import Path
from typing import TYPE_CHECKING

from rlkd_trl.commands.launched import say
from rlkd_trl.errors import InputError, PushError, is_first_process, one_line

if TYPE_CHECKING:
    from huggingface_hub import RepoUrl
    from transformers import TrainingArguments

_PATIENCE = 5.0  # seconds to connect, and again to answer
_CURVES = "runs"  # TensorBoard's; other directories there are checkpoints, earlier stages, a demo's models


def check_push(args: "TrainingArguments") -> None:
    """Checks that the student may be pushed, if it is to be, and makes the repository and branch where there are none.

    Raises:
        InputError: In offline mode, or the Hub cannot be reached, does not know the account, or does not let it write.
    """
    if not args.push_to_hub or not is_first_process():
        return
    from huggingface_hub import HfApi, constants, get_session, get_token
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError
    from huggingface_hub.utils import build_hf_headers, hf_raise_for_status

    name = _repository_name(args)
    later = f"Or leave push_to_hub out, and send the student later: {_by_hand(name, args)}."
    if constants.is_offline_mode():
        raise InputError(
            "push_to_hub cannot be done in offline mode (HF_HUB_OFFLINE, or the Hub could not be reached just now): "
            f"leave that. {later}"
        )
    token = args.hub_token or get_token()
    try:
        # HfApi.whoami waits for a network that does not answer as long as the system does.
        headers = build_hf_headers(token=token)
        hf_raise_for_status(
            get_session().get(f"{constants.ENDPOINT}/api/whoami-v2", headers=headers, timeout=_PATIENCE)
        )
        api = HfApi(token=token)
        repository = _make_repository(args)
        api.auth_check(repository.repo_id, write=True)
        if args.hub_revision is not None:
            api.create_branch(repository.repo_id, branch=args.hub_revision, exist_ok=True)
    except HFValidationError as error:
        raise InputError(f"hub_model_id {name} is no possible Hub id: {one_line(error, at_most=200)}.") from error
    except HfHubHTTPError as error:
        status = error.response.status_code
        if status == 401:
            of = "of hub_token" if args.hub_token else "of HF_TOKEN or `hf auth login`"
            raise InputError(
                f"push_to_hub: the Hub ({constants.ENDPOINT}) does not know the token {of}: log in again with "
                f"`hf auth login`. {later}"
            ) from error
        if status in (403, 404):
            raise InputError(
                f"push_to_hub: this account may not write to {name} on the Hub ({constants.ENDPOINT}): name one of "
                f"its own with --hub_model_id, or take a token that may write. {later}"
            ) from error
        raise InputError(
            f"push_to_hub: the Hub ({constants.ENDPOINT}) answers {one_line(error, at_most=200)}. {later}"
        ) from error
    except Exception as error:  # from the HTTP library, which differs between versions of huggingface_hub
        raise InputError(
            f"push_to_hub: the Hub ({constants.ENDPOINT}) cannot be reached ({type(error).__name__}: "
            f"{one_line(error, at_most=200)}): look at the connection. {later}"
        ) from error


def push(args: "TrainingArguments") -> None:
    """Sends the output directory's files to the Hub, if they are to be pushed; not the directories in it.

    Raises:
        PushError: It failed. The message says where the student is, and how to send it.
    """
    if not args.push_to_hub or not is_first_process():
        return
    from huggingface_hub import HfApi

    name, output_dir = _repository_name(args), Path(args.output_dir)
    others = [path.name for path in output_dir.iterdir() if path.is_dir() and path.name != _CURVES]
    say(f"Sending {output_dir} to {name} on the Hub.")
    try:
        repository = _make_repository(args)
        HfApi(token=args.hub_token).upload_folder(
            repo_id=repository.repo_id,
            folder_path=output_dir,
            commit_message="Student and report of a finished run",
            revision=args.hub_revision,
            ignore_patterns=["_*", *(f"{other}/*" for other in others)],
            # Trainer has sent the whole directory with a checkpoint.
            delete_patterns=[f"{other}/*" for other in others if not other.startswith("checkpoint-")],
        )
    except Exception as error:  # whatever the client or the HTTP library raises: the student is safe
        raise PushError(
            f"The student is in {output_dir}, but could not be sent to {name} on the Hub ({type(error).__name__}: "
            f"{one_line(error, at_most=200)}). To send it: {_by_hand(name, args)}"
        ) from error
    at = f"@{args.hub_revision}" if args.hub_revision else ""
    say(f"The student is on the Hub: {repository.repo_id}{at} ({repository}).")


def _repository_name(args: "TrainingArguments") -> str:
    """As Trainer: the last part of the output directory, where none is named."""
    return args.hub_model_id or Path(args.output_dir).absolute().name


def _make_repository(args: "TrainingArguments") -> "RepoUrl":
    """The repository, which is made if there is none."""
    from huggingface_hub import HfApi

    api = HfApi(token=args.hub_token)
    return api.create_repo(_repository_name(args), private=args.hub_private_repo, exist_ok=True)


def _by_hand(name: str, args: "TrainingArguments") -> str:
    options = " --private" if args.hub_private_repo else ""
    options += f" --revision {args.hub_revision}" if args.hub_revision else ""
    return f'hf upload {name} {shlex.quote(args.output_dir)} . --exclude "*/*"{options}'
