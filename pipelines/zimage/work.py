"""What one denoising step of Z-Image computes, as a list of calls: for rooflines. No torch here."""

from __future__ import annotations

from dataclasses import dataclass

from multimodal_gen.kernels.costs import Call

MULTIPLE = 32  # sequences are padded to it


@dataclass(frozen=True)
class Sizes:
    """Of the transformer (`transformer/config.json`)."""

    dim: int
    layers: int
    refiners: int
    heads: int
    patch: int  # numbers in one patch

    @property
    def hidden(self) -> int:
        """Width of the feed-forward network, aligned as its weights are."""
        return -(-int(self.dim / 3 * 8) // 16) * 16


SIX_BILLION = Sizes(dim=3840, layers=30, refiners=2, heads=30, patch=64)


def step(sizes: Sizes, width: int, height: int, caption: int, branches: int = 1) -> list[Call]:
    """A picture of width x height pixels under a caption of so many tokens; `branches`: 2 under guidance.

    Refiners of the caption and the timestep's layers are not in it: they run once per prompt and timestep.
    """
    image = _padded(width // 16 * (height // 16))
    joint = image + _padded(caption)
    refiner = _blocks(sizes, sizes.refiners, image, 1, "refiner")  # branches share their picture
    layers = _blocks(sizes, sizes.layers, joint, branches, "layers")
    patches = width // 16 * (height // 16)
    return [
        Call("linear", "patches in", 1, {"tokens": patches, "inputs": sizes.patch, "outputs": sizes.dim}),
        *refiner,
        *layers,
        Call("norm_modulate", "final norm", 1, {"tokens": joint * branches, "dim": sizes.dim}),
        Call("linear", "patches out", 1, {"tokens": joint * branches, "inputs": sizes.dim, "outputs": sizes.patch}),
    ]


def _padded(tokens: int) -> int:
    return -(-tokens // MULTIPLE) * MULTIPLE


def _blocks(sizes: Sizes, times: int, length: int, segments: int, where: str) -> list[Call]:
    dim, heads, hidden, tokens = sizes.dim, sizes.heads, sizes.hidden, length * segments
    rows, head = {"tokens": tokens, "dim": dim}, dim // heads

    def linear(what: str, inputs: int, outputs: int) -> Call:
        return Call("linear", f"{where}: {what}", times, {"tokens": tokens, "inputs": inputs, "outputs": outputs})

    turned = {"tokens": tokens, "parts": 2, "heads": heads, "dim": head, "turned": 1}
    attended = {"segments": segments, "tokens": length, "keys": length, "heads": heads, "dim": head}
    return [
        Call("norm_modulate", f"{where}: norm before attention", times, rows),
        linear("queries, keys, values", dim, 3 * dim),
        Call("qk_norm_rope", f"{where}: norms and positions", times, turned),
        Call("attention", f"{where}: attention", times, attended),
        linear("out of attention", dim, dim),
        Call("gated_residual_norm", f"{where}: residual, next norm", times, rows),
        linear("gate and up", dim, 2 * hidden),
        Call("gated_product", f"{where}: SwiGLU", times, {"tokens": tokens, "hidden": hidden}),
        linear("down", hidden, dim),
        Call("gated_residual", f"{where}: residual", times, rows),
    ]
