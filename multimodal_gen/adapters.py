"""What is said about adapters (LoRA and its kin) between users, front and worker: plain data and checks, no torch.

A wish (`AdapterUse`: nickname, strength, target) becomes pins: one `Pin` per module tree that the adapter changes,
naming the adapter by the digest of its file. Requests carry pins, so a name that is loaded anew or unloaded while they
run does not change what they get. The order of pins within a tree is the order in which deltas are added.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Literal, TypeVar, get_args

import msgspec

from multimodal_gen.errors import AdapterMismatch, AdapterNotFound, InvalidValue, UnknownParameter, did_you_mean

Target = Literal["all", "transformer", "transformer_2", "text_encoder"]
MergeMode = Literal["auto", "merge", "dynamic"]
Side = Literal["pictures", "text"]
"""which model of a worker: that of pictures and videos, or the language model"""
TARGETS: tuple[Target, ...] = get_args(Target)
MERGE_MODES: tuple[MergeMode, ...] = get_args(MergeMode)

MAX_STRENGTH = 100.0
MAX_ALPHA = 1e6
MAX_ACTIVE = 32
"""adapters in one list"""
NICKNAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._+@-]{0,127}")


class AdapterSource(msgspec.Struct, frozen=True, kw_only=True):
    """A file to load under a nickname."""

    nickname: str
    path: str
    """absolute, links resolved; checked against the allowed roots by whoever made it"""
    alpha: float | None = None
    """replaces the alpha of every low-rank module of the file: its scale becomes alpha / rank"""
    allow_partial: bool = False
    """load a file of which some modules have no place in the model, and list those"""


class AdapterUse(msgspec.Struct, frozen=True, kw_only=True):
    """One entry of an ordered list of adapters, as a user writes it."""

    nickname: str
    strength: float = 1.0
    target: Target = "all"


class Pin(msgspec.Struct, frozen=True):
    """One adapter on one module tree."""

    tree: str
    nickname: str
    digest: str
    """of what the adapter is: file, configuration, alpha"""
    strength: float
    sha256: str = ""
    """of the file alone, so that people can find it"""
    alpha: float | None = None
    allow_partial: bool = False


class AdapterInfo(msgspec.Struct, frozen=True, kw_only=True):
    """A loaded adapter; filled by the worker."""

    nickname: str
    path: str
    digest: str
    """SHA-256 of the file and of what changes its meaning (configuration, alpha), hexadecimal"""
    sha256: str
    """of the file alone"""
    format: str
    """naming and kinds of update, such as `comfyui: lora` or `kohya: lokr, diff`"""
    rank: int
    """largest rank of its low-rank modules; 0 where it has none"""
    bytes: int
    """memory held by its tensors"""
    modules: dict[str, int]
    """tree → matched modules"""
    skipped: tuple[str, ...] = ()
    """modules of the file without a place in the model; only with allow_partial"""
    merge_only: str = ""
    """why it cannot run unmerged, such as `DoRA`; empty where it can"""
    source: AdapterSource


class LoraState(msgspec.Struct, frozen=True, kw_only=True):
    """All that a worker knows of adapters; the front keeps the last one to restore it in the next worker."""

    loaded: tuple[AdapterInfo, ...] = ()
    missing: dict[str, str] = {}
    """digest of an active adapter that the worker could not load again → why"""
    remembered: tuple[Pin, ...] = ()
    """the list of the last set_lora: what merge_lora_weights switches on again"""
    active: tuple[Pin, ...] = ()
    """what requests without a list of their own get"""
    modes: dict[str, MergeMode] = {}
    """tree → what was asked for"""
    merged: dict[str, bool] = {}
    """tree → whether requests of the active list find it merged into the weights"""
    reasons: dict[str, str] = {}
    """tree → why `auto` chose as it did"""


class LoraStates(msgspec.Struct, frozen=True):
    """Of both models of a worker."""

    pictures: LoraState = LoraState()
    text: LoraState = LoraState()

    def of(self, side: Side) -> LoraState:
        """That of one of them."""
        return self.text if side == "text" else self.pictures

    def changed(self, side: Side, state: LoraState) -> LoraStates:
        """The same with another state of one of them."""
        return LoraStates(self.pictures, state) if side == "text" else LoraStates(state, self.text)


# --- changes: what a worker is asked to do, each a transaction ------------------------------------------------------


class SetLora(msgspec.Struct, frozen=True, tag=True, kw_only=True):
    """Load `sources` (where new), then make `uses` the active list; () is the base model."""

    sources: tuple[AdapterSource, ...] = ()
    uses: tuple[AdapterUse, ...]
    mode: MergeMode = "auto"


class LoadLora(msgspec.Struct, frozen=True, tag=True, kw_only=True):
    """Load a file without using it."""

    source: AdapterSource


class SwapLoras(msgspec.Struct, frozen=True, tag=True, kw_only=True):
    """Forget these nicknames and load these files, together; of the language model, where requests name adapters."""

    sources: tuple[AdapterSource, ...] = ()
    unload: tuple[str, ...] = ()


class UnloadLora(msgspec.Struct, frozen=True, tag=True, kw_only=True):
    """Forget a nickname; it must not be active."""

    nickname: str


class MergeLora(msgspec.Struct, frozen=True, tag=True, kw_only=True):
    """Switch the remembered list on again, merged, its strengths multiplied by `strength`."""

    target: Target = "all"
    strength: float = 1.0


class UnmergeLora(msgspec.Struct, frozen=True, tag=True, kw_only=True):
    """Bring the base weights of a target back: nothing is active there any more."""

    target: Target = "all"


class RestoreLora(msgspec.Struct, frozen=True, tag=True, kw_only=True):
    """Bring a new worker to the state of the one before it."""

    state: LoraState


Change = SetLora | LoadLora | SwapLoras | UnloadLora | MergeLora | UnmergeLora | RestoreLora


# --- checks ---------------------------------------------------------------------------------------------------------


def check_nickname(nickname: Any, param: str = "lora_nickname") -> str:
    """Raises: InvalidValue."""
    if not isinstance(nickname, str) or not NICKNAME.fullmatch(nickname):
        raise InvalidValue(
            f"{param!r} must be 1 to 128 letters, digits or ._+@- and begin with a letter or digit, got "
            f"{str(nickname)[:40]!a}.",
            param=param,
        )
    return nickname


def check_strength(strength: Any, param: str = "strength") -> float:
    """Raises: InvalidValue."""
    if isinstance(strength, bool) or not isinstance(strength, (int, float)):
        raise InvalidValue(f"{param!r} must be a number, got {str(strength)[:40]!a}.", param=param)
    if not -MAX_STRENGTH <= strength <= MAX_STRENGTH:  # NaN fails too
        raise InvalidValue(f"{param!r} must be between {-MAX_STRENGTH:g} and {MAX_STRENGTH:g}.", param=param)
    return float(strength)


def check_alpha(alpha: Any, param: str = "lora_alpha") -> float | None:
    """Raises: InvalidValue."""
    if alpha is None:
        return None
    # Whole numbers too large for a float, and for str(), compare all the same; NaN does not.
    if isinstance(alpha, bool) or not isinstance(alpha, (int, float)) or not 0 < alpha <= MAX_ALPHA:
        raise InvalidValue(f"{param!r} must be a number above 0 and up to {MAX_ALPHA:g}.", param=param)
    return float(alpha)


Word = TypeVar("Word", bound=str)


def check_word(value: Any, words: tuple[Word, ...], param: str) -> Word:
    """Raises: InvalidValue unless `value` is one of `words`."""
    for word in words:
        if value == word:
            return word
    raise InvalidValue(
        f"{param!r} must be one of {', '.join(words)}, got {str(value)[:40]!a}.{did_you_mean(str(value)[:40], words)}",
        param=param,
    )


def broadcast(
    nickname: Any, path: Any = None, target: Any = "all", strength: Any = 1.0, alpha: Any = None
) -> tuple[tuple[AdapterUse, ...], dict[str, tuple[str, float | None]]]:
    """The uses of a set_lora call, and what is to be loaded: nickname → (path, alpha).

    Arguments are scalars or lists of one length.
    Raises: InvalidValue naming the field, with both lengths where they differ.
    """
    nicknames = nickname if isinstance(nickname, (list, tuple)) else [nickname]
    count = len(nicknames)
    if count > MAX_ACTIVE:
        raise InvalidValue(f"'lora_nickname' lists {count} adapters; the limit is {MAX_ACTIVE}.", param="lora_nickname")
    paths, targets, strengths, alphas = (
        _column(value, count, param)
        for value, param in (
            (path, "lora_path"),
            (target, "target"),
            (strength, "strength"),
            (alpha, "lora_alpha"),
        )
    )
    uses = tuple(
        AdapterUse(nickname=check_nickname(n), strength=check_strength(s), target=check_word(t, TARGETS, "target"))
        for n, t, s in zip(nicknames, targets, strengths, strict=True)
    )
    if not nicknames:  # nothing pairs up with them, but they must not be anything
        check_word(target if isinstance(target, str) else "all", TARGETS, "target")
        check_strength(0.0 if isinstance(strength, (list, tuple)) else strength)
        if path not in (None, [], ()) or alpha not in (None, [], ()):
            raise InvalidValue(
                "'lora_path' and 'lora_alpha' name nothing: 'lora_nickname' is empty.", param="lora_path"
            )
    files: dict[str, tuple[str, float | None]] = {}
    for use, where, number in zip(uses, paths, alphas, strict=True):
        own = check_alpha(number)
        if where is None:
            if own is not None and files.get(use.nickname, ("", None))[1] != own:
                raise InvalidValue(
                    "'lora_alpha' is read when a file is loaded; give 'lora_path' with it.", param="lora_alpha"
                )
            continue
        if not isinstance(where, str):
            raise InvalidValue(f"'lora_path' must be a string or null, got {str(where)[:40]!a}.", param="lora_path")
        if files.get(use.nickname, (where, own)) != (where, own):
            raise InvalidValue(f"{use.nickname!r} is listed twice with different files.", param="lora_path")
        files[use.nickname] = (where, own)
    return uses, files


def read_uses(value: Any, param: str = "loras") -> tuple[AdapterUse, ...]:
    """A request's own list: objects with `nickname` and, if need be, `strength` and `target`.

    Raises: InvalidValue, UnknownParameter.
    """
    if not isinstance(value, (list, tuple)) or len(value) > MAX_ACTIVE:
        raise InvalidValue(f"{param!r} must be a list of at most {MAX_ACTIVE} adapters.", param=param)
    return tuple(
        item if isinstance(item, AdapterUse) else _read_use(item, f"{param}[{i}]") for i, item in enumerate(value)
    )


def _read_use(item: Any, param: str) -> AdapterUse:
    fields = AdapterUse.__struct_fields__
    if not isinstance(item, dict) or "nickname" not in item:
        raise InvalidValue(
            f'{param!r} must be an object such as {{"nickname": "sepia", "strength": 0.8}}.', param=param
        )
    for name in item:
        if name not in fields:
            raise UnknownParameter(
                f"{param!r} has no field {str(name)[:40]!a}.{did_you_mean(str(name)[:40], fields)}", param=param
            )
    return AdapterUse(
        nickname=check_nickname(item["nickname"], f"{param}.nickname"),
        strength=check_strength(item.get("strength", 1.0), f"{param}.strength"),
        target=check_word(item.get("target", "all"), TARGETS, f"{param}.target"),
    )


def _column(value: Any, count: int, param: str) -> Sequence[Any]:
    if not isinstance(value, (list, tuple)):
        return [value] * count
    if len(value) != count:
        raise InvalidValue(
            f"{param!r} lists {len(value)} values for {count} adapters; give one for all, or one for each.", param=param
        )
    return value


def merge_change(target: Any = "all", strength: Any = 1.0) -> MergeLora:
    """Raises: InvalidValue."""
    return MergeLora(target=check_word(target, TARGETS, "target"), strength=check_strength(strength))


def unmerge_change(target: Any = "all") -> UnmergeLora:
    """Raises: InvalidValue."""
    return UnmergeLora(target=check_word(target, TARGETS, "target"))


def pins_of(uses: Iterable[AdapterUse], state: LoraState, targets: Iterable[str]) -> tuple[Pin, ...]:
    """The pins of a request's own list. Raises as `expand`."""
    return expand(uses, {info.nickname: info for info in state.loaded}, tuple(targets), "loras", "loras")


def expand(
    uses: Iterable[AdapterUse],
    loaded: Mapping[str, AdapterInfo],
    targets: Sequence[str],
    param: str,
    target_param: str,
) -> tuple[Pin, ...]:
    """One pin per tree that each use changes, in order; a use that changes nothing is an error.

    Args:
        loaded: by nickname.
        targets: the trees of the model that can be adapted.
        param: the request field of the nicknames, for errors; `target_param`: that of the targets.

    Raises: AdapterNotFound, AdapterMismatch, InvalidValue.
    """
    pins = []
    for use in uses:
        info = loaded.get(use.nickname)
        if info is None:
            raise AdapterNotFound(
                f"No adapter {use.nickname!r} is loaded.{did_you_mean(use.nickname, loaded)} Load it with set_lora "
                "and a path; list_loras shows what is loaded.",
                param=param,
            )
        if use.target != "all" and use.target not in targets:
            raise InvalidValue(
                f"This model has no target {use.target!r}; it has {', '.join(['all', *targets])}.",
                param=target_param,
            )
        trees = [tree for tree in targets if info.modules.get(tree) and use.target in ("all", tree)]
        if not trees:
            raise AdapterMismatch(
                f"Adapter {use.nickname!r} changes nothing in target {use.target!r}: it has modules for "
                f"{', '.join(info.modules) or 'nothing'}.",
                param=param,
            )
        source = info.source
        pins += [
            Pin(tree, use.nickname, info.digest, use.strength, info.sha256, source.alpha, source.allow_partial)
            for tree in trees
        ]
    return tuple(pins)
