"""What a row remembers of the steps that it has computed, to extrapolate others from. No torch here."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

PREFIX = "cache."  # of its tensors' names, among those of a row
_CLEAN = re.compile(r"cache\.clean\.(\d+)")


@dataclass(frozen=True)
class Known:
    """One computed step."""

    step: int
    clean: Tensor  # float32, shaped like the latents: the guided estimate of the clean latents


@dataclass(frozen=True)
class History:
    """Filled by `stages.step_cache` and replaced, never changed, with every step; empty for rows without a cache."""

    known: tuple[Known, ...] = ()  # the last computed steps, newest last
    head: Tensor | None = None  # float32 [branches, tokens, D]: what the first block added at the newest, in part
    skipped: int = 0  # steps that were extrapolated

    @property
    def nbytes(self) -> int:
        """Bytes held."""
        return sum(known.clean.nbytes for known in self.known) + (0 if self.head is None else self.head.nbytes)

    def counted(self) -> History:
        """What is left of it when the steps are done: nothing but the number."""
        return History(skipped=self.skipped)

    def tensors(self) -> dict[str, Tensor]:
        """What `of` needs; all names begin with `PREFIX`."""
        if not self.known:
            return {}
        found = {f"{PREFIX}clean.{known.step}": known.clean for known in self.known}
        found[f"{PREFIX}skipped"] = self.known[-1].clean.new_tensor([self.skipped])
        return found if self.head is None else {**found, f"{PREFIX}head": self.head}

    @classmethod
    def of(cls, tensors: Mapping[str, Tensor]) -> History:
        """The history that these tensors of a row were taken from."""
        steps = sorted(int(match[1]) for match in map(_CLEAN.fullmatch, tensors) if match)
        if not steps:
            return cls()
        known = tuple(Known(step, tensors[f"{PREFIX}clean.{step}"]) for step in steps)
        return cls(known, tensors.get(f"{PREFIX}head"), int(tensors[f"{PREFIX}skipped"]))
