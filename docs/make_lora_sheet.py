"""Makes docs/loras.png: the base model, two style adapters, and both in either order, side by side.

python docs/make_lora_sheet.py [OUTPUT]. Run it again when the bundled weights or the adapters change, and look.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from make_contact_sheet import FONT_SIZE, write
from PIL import Image, ImageDraw, ImageFont

from multimodal_gen import DiffGenerator

LORAS = Path(__file__).parents[1] / "examples" / "loras"
A, B = "blueprint", "pixel-art"
PROMPTS = ("grinning face", "a red apple on a blue background", "red heart", "birthday cake")
LISTS: tuple[tuple[str, list[tuple[str, float]]], ...] = (
    ("base", []),
    (A, [(A, 1.0)]),
    (B, [(B, 1.0)]),
    (f"{A} + {B}", [(A, 1.0), (B, 0.8)]),
    (f"{B} + {A}", [(B, 0.8), (A, 1.0)]),
)
SIDE, MARGIN, CAPTION = 128, 10, 20  # pixels
SEED = 7


def main() -> None:
    """One batch per prompt: five lists of adapters share every forward."""
    flags = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    flags.add_argument("output", nargs="?", type=Path, default=Path(__file__).with_name("loras.png"))
    given = flags.parse_args()
    with DiffGenerator.from_pretrained("emoji-image", device="cpu", dtype="float32") as gen:
        gen.set_lora([A, B], [LORAS / f"{name}.safetensors" for name in (A, B)], merge_mode="dynamic")
        rows = [[picture(gen, prompt, wanted) for _, wanted in LISTS] for prompt in PROMPTS]
    write(sheet(rows), given.output)
    print(given.output)


def picture(gen: DiffGenerator, prompt: str, wanted: list[tuple[str, float]]) -> Any:
    """One picture under a list of adapters."""
    loras = [{"nickname": name, "strength": strength} for name, strength in wanted]
    return gen.generate(prompt, seed=SEED, width=SIDE, height=SIDE, loras=loras).images[0]


def sheet(rows: list[list[Image.Image]]) -> Image.Image:
    """A column for each list, its name on top."""
    cell = SIDE + MARGIN
    page = Image.new("RGB", (len(LISTS) * cell + MARGIN, CAPTION + len(rows) * cell + MARGIN), "white")
    draw, font = ImageDraw.Draw(page), ImageFont.load_default(FONT_SIZE)
    for column, (name, _) in enumerate(LISTS):
        draw.text((MARGIN + column * cell + SIDE // 2, MARGIN), name, fill="#333333", font=font, anchor="ma")
        for row, pictures in enumerate(rows):
            page.paste(pictures[column], (MARGIN + column * cell, MARGIN + CAPTION + row * cell))
    return page


if __name__ == "__main__":
    main()
