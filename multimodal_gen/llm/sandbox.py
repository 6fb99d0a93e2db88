"""Where chat templates run: jinja's immutable sandbox with transformers' names in it, and limits on time and size.

The sandbox keeps a template from Python's insides and from changing what it was given. It does not bound loops and
products; that is done here: every call, lookup and product of a template looks at the clock or at the size it asks for.
"""

from __future__ import annotations

import contextlib
import json
import math
import re
import time
from collections.abc import Callable, Iterator, Sequence
from contextvars import ContextVar
from datetime import datetime
from functools import cache
from types import BuiltinMethodType
from typing import Any

import jinja2
from jinja2 import nodes
from jinja2.compiler import CodeGenerator, Frame
from jinja2.exceptions import SecurityError
from jinja2.ext import Extension
from jinja2.filters import do_format
from jinja2.parser import Parser
from jinja2.runtime import Context
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.utils import Namespace

MAX_RANGE = 10_000
MAX_PRODUCT = 1 << 20  # characters or items of a repeated text or list
MAX_POWER = 64
MAX_SUM = 16 << 20  # characters or items of texts or lists put together
_WIDE = re.compile(r"%[^a-zA-Z%]*([0-9]{5}|\*)")
_WIDE_FIELD = re.compile(r"[0-9]{5}|\{[^{}]*\{")
# They make long texts of short ones.
PADDING = {"ljust", "rjust", "center", "zfill", "expandtabs"}

_until: ContextVar[float] = ContextVar("until", default=math.inf)


def _check_size(size: int) -> None:
    if size > MAX_SUM:
        raise SecurityError(f"no sums of more than {MAX_SUM:,} characters or items")


def _check_widths(text: object, wide: re.Pattern[str]) -> None:
    if isinstance(text, str) and wide.search(text):
        raise SecurityError("no formats with widths of five digits, or from values")


class TemplateRefused(jinja2.TemplateError):
    """The template said `raise_exception`: the conversation is not one that its model can have."""


class TemplateTooSlow(jinja2.TemplateError):
    """It did not end in the time that it has."""


@contextlib.contextmanager
def time_limit(seconds: float) -> Iterator[None]:
    """What templates do inside raises TemplateTooSlow once so much time has gone."""
    token = _until.set(time.monotonic() + seconds)
    try:
        yield
    finally:
        _until.reset(token)


def check_time() -> None:
    """Raises: TemplateTooSlow."""
    if time.monotonic() > _until.get():
        raise TemplateTooSlow("it takes too long")


class Joining(CodeGenerator):
    """`a ~ b` by way of the environment, as other operators go."""

    def visit_Concat(self, node: nodes.Concat, frame: Frame) -> None:  # noqa: N802 jinja's name
        """Writes the call."""
        self.write("environment.joined((")
        for part in node.nodes:
            self.visit(part, frame)
            self.write(", ")
        self.write("))")


class Sandbox(ImmutableSandboxedEnvironment):
    """Chat templates' environment."""

    intercepted_binops = frozenset({"*", "**", "+", "%"})
    code_generator_class = Joining

    def call_binop(self, context: Context, operator: str, left: Any, right: Any) -> Any:
        """Products, powers, sums and formatted texts, up to a size."""
        if operator == "**":
            if isinstance(right, (int, float)) and right > MAX_POWER:
                raise SecurityError(f"no powers above {MAX_POWER}")
        elif operator == "+":
            if isinstance(left, (str, list, tuple)) and isinstance(right, (str, list, tuple)):
                _check_size(len(left) + len(right))
        elif operator == "%":
            _check_widths(left, _WIDE)
        else:
            for many, count in ((left, right), (right, left)):
                if isinstance(many, (str, list, tuple)) and isinstance(count, int) and len(many) * count > MAX_PRODUCT:
                    raise SecurityError(f"no products of more than {MAX_PRODUCT:,} characters or items")
        return super().call_binop(context, operator, left, right)

    def joined(self, parts: Sequence[Any]) -> str:
        """`~`, up to a size."""
        texts = [str(part) for part in parts]
        _check_size(sum(map(len, texts)))
        return "".join(texts)

    def wrap_str_format(self, value: Any) -> Callable[..., str] | None:
        """`format` of a text, up to a size."""
        if isinstance(value, BuiltinMethodType) and value.__name__ in ("format", "format_map"):
            _check_widths(value.__self__, _WIDE_FIELD)
        return super().wrap_str_format(value)

    def is_safe_attribute(self, obj: Any, attr: str, value: Any) -> bool:
        """Without methods that make long texts of short ones."""
        return attr not in PADDING and super().is_safe_attribute(obj, attr, value)

    def call(__self, __context: Context, __obj: Any, *args: Any, **kwargs: Any) -> Any:  # noqa: N805 jinja's names
        """A call, where there is time left."""
        check_time()
        return super().call(__context, __obj, *args, **kwargs)

    def getattr(self, obj: Any, attribute: str) -> Any:
        """A lookup, where there is time left."""
        check_time()
        return super().getattr(obj, attribute)

    def getitem(self, obj: Any, argument: Any) -> Any:
        """A lookup, where there is time left."""
        check_time()
        return super().getitem(obj, argument)


class Generation(Extension):
    """`{% generation %}`, which marks answers for training: its inside is written as it is."""

    tags = {"generation"}  # noqa: RUF012 jinja's class attribute

    def parse(self, parser: Parser) -> nodes.Node | list[nodes.Node]:
        """The statements between the tags."""
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


class PlainNamespace(Namespace):
    """`namespace()` that keeps no names with an underscore before them: those are Python's insides."""

    def __init__(*args: Any, **kwargs: Any) -> None:
        """jinja's way of leaving `self` free as a name."""
        self, args = args[0], args[1:]
        names = dict(*args, **kwargs)
        for name in names:
            _check_name(name)
        Namespace.__init__(self, names)

    def __setitem__(self, name: str, value: Any) -> None:
        _check_name(name)
        super().__setitem__(name, value)


def _check_name(name: object) -> None:
    if isinstance(name, str) and name.startswith("_"):
        raise SecurityError(f"no names like {name!r} in a namespace")


def _refuse(message: object) -> None:
    raise TemplateRefused(str(message)[:500])


def _range(*args: int) -> range:
    numbers = range(*args)
    if len(numbers) > MAX_RANGE:
        raise SecurityError(f"no ranges of more than {MAX_RANGE:,} numbers")
    return numbers


def _tojson(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """As transformers': nothing is escaped for HTML."""
    if isinstance(indent, int) and indent > 16:
        raise SecurityError("no indents of more than 16 spaces")
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _format(value: object, *args: Any, **kwargs: Any) -> str:
    _check_widths(value, _WIDE)
    return do_format(str(value), *args, **kwargs)


@cache
def environment() -> Sandbox:
    """One for all templates."""
    made = Sandbox(trim_blocks=True, lstrip_blocks=True, extensions=[Generation, "jinja2.ext.loopcontrols"])
    made.filters = {name: use for name, use in made.filters.items() if name not in {"center", "wordwrap"}}
    made.filters["tojson"] = _tojson
    made.filters["format"] = _format
    made.globals.update(
        raise_exception=_refuse,
        strftime_now=lambda form: datetime.now().strftime(form),
        range=_range,
        dict=lambda *args, **kwargs: dict(*args, **kwargs),
        namespace=PlainNamespace,
    )
    for name in ("lipsum", "cycler", "joiner"):
        made.globals.pop(name, None)
    return made
