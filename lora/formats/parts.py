"""The tensors that a file holds for one module, by role, with checks that name the module."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from torch import Tensor

from multimodal_gen.errors import CorruptAdapter


@dataclass(frozen=True)
class Parts:
    """Filled by `registry.parse`."""

    module: str  # the file's own name
    tensors: Mapping[str, Tensor]  # role → tensor
    scale: Callable[[int], float]  # rank → scale, by the file's settings

    def matrix(self, role: str) -> Tensor:
        """A 2-D tensor; linear layers stored as 1x1 convolutions lose their last two axes.

        Raises: CorruptAdapter when it is missing or has another shape.
        """
        tensor = self.tensors.get(role)
        if tensor is None:
            raise CorruptAdapter(f"Module {self.module[:120]!a} of the adapter lacks its tensor {role!r}.")
        if tensor.dim() == 4 and tensor.shape[2:] == (1, 1):
            tensor = tensor[:, :, 0, 0]
        if tensor.dim() != 2 or not tensor.is_floating_point():
            raise CorruptAdapter(
                f"Module {self.module[:120]!a} of the adapter: {role!r} must be a matrix of floats, it is "
                f"{tensor.dtype} of shape {list(tensor.shape)}."
            )
        return tensor

    def product(self, role: str) -> tuple[Tensor, Tensor]:
        """The factors `<role>_a` [m, r] and `<role>_b` [r, n]. Raises: CorruptAdapter."""
        a, b = self.matrix(f"{role}_a"), self.matrix(f"{role}_b")
        self.check_rank(b, a)
        return a, b

    def check_rank(self, down: Tensor, up: Tensor) -> int:
        """The rank of down [r, n] and up [m, r]. Raises: CorruptAdapter when they differ."""
        if down.shape[0] != up.shape[1]:
            raise CorruptAdapter(
                f"Module {self.module[:120]!a} of the adapter: its factors have ranks {down.shape[0]} and "
                f"{up.shape[1]}."
            )
        return down.shape[0]
