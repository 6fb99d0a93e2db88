"""docs/settings.md lists every setting as config.py defines it."""

from __future__ import annotations

from pathlib import Path

import pytest

from multimodal_gen.config import EngineConfig, ServerConfig
from multimodal_gen.settings import ENV_PREFIX, Option, options

PAGE = Path(__file__).parents[2] / "docs" / "settings.md"

pytestmark = [pytest.mark.golden]


def row(option: Option) -> str:
    """The option's line in the page's tables."""
    words = f" ({', '.join(option.choices)})" if option.choices else ""
    default = (
        ""
        if option.default in (None, [])
        else f"`{str(option.default).lower() if option.is_switch else option.default}`"
    )
    return f"| `{option.flag}` | `{ENV_PREFIX}{option.name.upper()}` | {default} | {option.help}{words} |"


@pytest.mark.parametrize("option", options(ServerConfig), ids=lambda option: option.name)
def test_every_setting_has_its_row(option: Option) -> None:
    assert row(option) in PAGE.read_text().splitlines(), f"docs/settings.md lacks this line:\n{row(option)}"


def test_no_row_is_left_of_a_setting_that_is_gone() -> None:
    rows = [line for line in PAGE.read_text().splitlines() if line.startswith("| `--")]
    assert rows == [row(option) for option in options(ServerConfig)]


def test_engine_settings_come_first() -> None:
    """The page has them under a heading of their own: they are DiffGenerator's keywords too."""
    engine, server = PAGE.read_text().split("## Server")
    names = {option.name for option in options(EngineConfig)}
    for option in options(ServerConfig):
        assert option.flag in (engine if option.name in names else server)
