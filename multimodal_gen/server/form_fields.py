"""The fields of a form as JSON would have them: forms carry only text, and nested values by names such as
`loras[][nickname]`, as the `openai` client writes them."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from typing import Any

from multimodal_gen.errors import InvalidValue
from multimodal_gen.server.multipart import Form

_WHOLE = re.compile(r"-?[0-9]{1,30}")
_DECIMAL = re.compile(r"-?[0-9]{1,30}(\.[0-9]{1,30})?([eE][+-]?[0-9]{1,3})?")
# `name[]` is one of a list, `name[key]` and `name[][key]` are parts of objects.
_NESTED = re.compile(r"(?P<base>[a-z0-9_]{1,64})(?:\[[0-9]{0,4}\])?\[(?P<key>[a-z0-9_]{0,64})\]")
PICTURE = "input_reference"


def _whole(text: str) -> Any:
    return int(text) if _WHOLE.fullmatch(text) else text


def _decimal(text: str) -> Any:
    return float(text) if _DECIMAL.fullmatch(text) else text


def _truth(text: str) -> Any:
    return {"true": True, "false": False}.get(text, text)


# Field → how its text is read. What cannot be read so stays text, and the schema says what is wrong with it.
_READERS: dict[str, Callable[[str], Any]] = {
    **dict.fromkeys(
        ("n", "fps", "num_frames", "num_inference_steps", "seed", "width", "height", "priority", "max_sequence_length"),
        _whole,
    ),
    **dict.fromkeys(("guidance_scale", "guidance_scale_2", "flow_shift"), _decimal),
    "enhance_prompt": _truth,
}
_LISTS = ("seed", "loras")


def fields_of(form: Form) -> dict[str, Any]:
    """The fields of a form; the pictures among them as a list of bytes.

    Raises: InvalidValue.
    """
    found: dict[str, Any] = {}
    nested: dict[str, dict[str, list[str]]] = {}
    for name, text in form.texts:
        match = _NESTED.fullmatch(name)
        base, key = (match["base"], match["key"]) if match else (name, None)
        if key:
            nested.setdefault(base, {}).setdefault(key, []).append(text)
        elif key == "" and base in _LISTS:
            found[base] = [*_as_list(found.get(base, [])), _value(base, text)]
        elif base in found:
            raise InvalidValue(f"{base[:64]!a} is there twice; which value is meant?", param=base[:64])
        else:
            found[base] = _value(base, text)
    for base, columns in nested.items():
        found[base] = _objects(base, columns)
    return {**_without_empty(found), **_pictures(form)}


def _as_list(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [value]


def _value(name: str, text: str) -> Any:
    if name == "loras" and text.lstrip().startswith(("[", "{")):
        try:
            return json.loads(text)
        except (ValueError, RecursionError):
            raise InvalidValue("'loras' is not valid JSON.", param="loras") from None
    return _READERS.get(name, str)(text)


def _objects(base: str, columns: dict[str, list[str]]) -> Any:
    """`loras[][nickname]` and `loras[][strength]` → a list of objects; other names → one object."""
    if base != "loras":
        return {name: texts[0] for name, texts in columns.items()}
    lengths = {len(texts) for texts in columns.values()}
    if len(lengths) > 1:
        raise InvalidValue(
            "Not every adapter of 'loras' has the same fields, and a form cannot tell which has which; send 'loras' as "
            "one JSON text.",
            param="loras",
        )
    return [
        {name: _decimal(texts[i]) if name == "strength" else texts[i] for name, texts in columns.items()}
        for i in range(lengths.pop())
    ]


def _without_empty(found: dict[str, Any]) -> dict[str, Any]:
    """An empty text is how clients write `null`; an empty prompt is a prompt."""
    return {name: value for name, value in found.items() if value != "" or name == "prompt"}


def _pictures(form: Form) -> dict[str, Any]:
    for name, _ in form.files:
        if name.removesuffix("[]") != PICTURE:
            raise InvalidValue(f"{name[:64]!a} cannot be a file; the picture is {PICTURE!r}.", param=name[:64])
    # A page's form sends an empty file where none was chosen.
    pictures = [data for _, data in form.files if data] or [data for _, data in form.files[:1]]
    return {PICTURE: pictures} if pictures else {}
