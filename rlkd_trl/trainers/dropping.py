"""Which samples of a rollout can be used, and why the others cannot."""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

_READABLE = "its text in both vocabularies"


@dataclass(frozen=True)
class UsableSamples:
    """For each kind of number, by name, which samples have only finite ones, `[B]`; and which of them can be read."""

    by_kind: Mapping[str, Tensor]

    @classmethod
    def of(cls, is_usable_B: Mapping[str, Tensor], readable_B: Tensor | None, device: torch.device) -> "UsableSamples":
        """The samples on a device. readable_B: which have tokens in all teachers' vocabularies; None: all.

        Of a sample that cannot be read the numbers do not matter.
        """
        by_kind = {name: usable_B.to(device) for name, usable_B in is_usable_B.items()}
        if readable_B is not None:
            by_kind = {name: usable_B | ~readable_B for name, usable_B in by_kind.items()}
            by_kind[_READABLE] = readable_B
        return cls(by_kind)

    @property
    def kept_B(self) -> Tensor:
        """Which samples can be used, `[B]`."""
        return torch.stack(list(self.by_kind.values())).all(dim=0)

    def what_is_wrong_with(self, b: int) -> str:
        """Why sample `b` is dropped."""
        return _in_words(" and ".join(name for name, usable_B in self.by_kind.items() if not usable_B[b]))

    def what_is_wrong(self) -> str:
        """Why samples of this process, or of others, are dropped."""
        kinds = " or ".join(name for name, usable_B in self.by_kind.items() if not usable_B.all())
        return _in_words(kinds or "on other processes")


def _in_words(kinds: str) -> str:
    return "its text not in both vocabularies" if kinds == _READABLE else f"{kinds} not finite"
