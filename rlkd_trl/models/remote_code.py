"""Python code that checkpoints bring along: run for those that the user has named and trusts, and for no others."""

import json
from pathlib import Path

from rlkd_trl.errors import InputError
from rlkd_trl.settings.trusted_code import trusted_checkpoints

# What may name code: by `auto_map`, or by the checkpoint that adapters belong to.
_FILES = ("config.json", "tokenizer_config.json", "adapter_config.json")


def may_run_code(name_or_path: str, revision: str | None = None) -> bool:
    """Whether a checkpoint's code may run while it is loaded.

    Raises:
        InputError: The checkpoint is trusted, and names code in another one that is not.
    """
    trusted = trusted_checkpoints()
    if name_or_path not in trusted:
        return False
    others = _named_in(name_or_path, revision) - trusted
    if others:
        raise InputError(
            f"{name_or_path!r} names code in {', '.join(map(repr, sorted(others)))}, and --trust_remote_code is for "
            "checkpoints that flags name: copy that code into a directory with the checkpoint, and name this."
        )
    return True


def brings_model(config, auto_class: str) -> bool:
    """Whether a config that was loaded names a model of its own for one of transformers' auto classes."""
    return auto_class in (getattr(config, "auto_map", None) or {})


def _named_in(name_or_path: str, revision: str | None) -> set[str]:
    """The other checkpoints whose code would run with this one's: "other/repository--module.Class"."""
    from rlkd_trl.models.private_apis import checkpoint_file

    checkpoints = set()
    for name in _FILES:
        file = checkpoint_file(name_or_path, name, revision)
        content = {} if file is None else json.loads(Path(file).read_text(encoding="utf-8"))
        references = (content.get("auto_map") or {}).values()
        classes = [c for r in references for c in (r if isinstance(r, list | tuple) else [r]) if c]
        checkpoints |= {reference.partition("--")[0] for reference in classes if "--" in reference}
        checkpoints |= {base for base in [content.get("base_model_name_or_path")] if base}
    return checkpoints - {name_or_path}
