"""What one denoising step of Wan computes, as a list of calls: for rooflines. No torch here."""

from __future__ import annotations

from dataclasses import dataclass

from multimodal_gen.kernels.costs import Call


@dataclass(frozen=True)
class Sizes:
    """Of one expert's transformer (`transformer/config.json`)."""

    dim: int
    layers: int
    heads: int
    hidden: int
    patch_in: int  # numbers in one patch
    patch_out: int


FOURTEEN_BILLION = Sizes(dim=5120, layers=40, heads=40, hidden=13824, patch_in=64, patch_out=64)


def step(sizes: Sizes, width: int, height: int, frames: int, text: int, branches: int = 2) -> list[Call]:
    """A video of width x height pixels under a text of so many keys; `branches`: 2 under guidance.

    The timestep's layers and the keys of the text are not in it: they are made once per timestep and prompt.
    """
    length = ((frames - 1) // 4 + 1) * (width // 16) * (height // 16)
    dim, heads, tokens, times = sizes.dim, sizes.heads, length * branches, sizes.layers
    rows, head = {"tokens": tokens, "dim": dim}, dim // heads

    def linear(what: str, inputs: int, outputs: int, times: int = times) -> Call:
        return Call("linear", what, times, {"tokens": tokens, "inputs": inputs, "outputs": outputs})

    def attention(what: str, keys: int) -> Call:
        sizes = {"segments": branches, "tokens": length, "keys": keys, "heads": heads, "dim": head}
        return Call("attention", what, times, sizes)

    def normed(what: str, parts: int, turned: int) -> Call:
        sizes = {"tokens": tokens, "parts": parts, "heads": heads, "dim": head, "turned": turned}
        return Call("qk_norm_rope", what, times, sizes)

    return [
        linear("patches in", sizes.patch_in, dim, 1),
        Call("norm_modulate", "norm before attention", times, rows),
        linear("queries, keys, values", dim, 3 * dim),
        normed("norms and positions", 2, 1),
        attention("attention", length),
        linear("out of attention", dim, dim),
        Call("gated_residual_norm", "residual, next norm", times, rows),
        linear("queries for the text", dim, dim),
        normed("norm of queries for the text", 1, 0),
        attention("attention to the text", text),
        linear("out of attention to the text", dim, dim),
        Call("gated_residual_norm", "residual, norm before feed-forward", times, rows),
        linear("up", dim, sizes.hidden),
        Call("gelu_tanh", "GELU", times, {"tokens": tokens, "hidden": sizes.hidden}),
        linear("down", sizes.hidden, dim),
        Call("gated_residual", "residual", times, rows),
        Call("norm_modulate", "final norm", 1, rows),
        linear("patches out", dim, sizes.patch_out, 1),
    ]
