"""Makes docs/contact_sheet.png: sixteen prompts through the bundled model, fixed seeds, shown at their own size.

python docs/make_contact_sheet.py [OUTPUT]. Run it again when the bundled weights change, and look at the result.
"""

from __future__ import annotations

import argparse
import os
import textwrap
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

from multimodal_gen import DiffGenerator

PICTURES = (
    # prompt, seed
    ("red heart", 7),
    ("grinning face", 7),
    ("a red apple on a blue background", 7),
    ("police car", 7),
    ("crying face on a green background", 7),
    ("purple heart", 7),
    ("birthday cake", 7),
    ("fried egg on a gray background", 42),
    ("a small red heart at the top right on a blue background", 7),
    ("a red heart on a light blue background", 7),
    ("smiling face with sunglasses", 5),
    ("bus and taxi", 7),
    ("racing car", 42),
    ("orange circle on a purple background", 7),
    ("a small turtle at the top left on a yellow background", 7),
    ("grinning face on a light blue background", 7),
)
COLUMNS = 4
SIDE, MARGIN, CAPTION = 128, 10, 48  # pixels
FONT_SIZE, LINE_CHARS = 11, 26


def main() -> None:
    """Generate, lay out, write."""
    flags = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    flags.add_argument("output", nargs="?", type=Path, default=Path(__file__).with_name("contact_sheet.png"))
    flags.add_argument("--threads", type=int)
    given = flags.parse_args()
    # float32 on the CPU: the same sheet on every machine, within rounding.
    with DiffGenerator.from_pretrained("emoji-image", device="cpu", dtype="float32", threads=given.threads) as gen:
        images = [gen.generate(prompt, seed=seed, width=SIDE, height=SIDE).images[0] for prompt, seed in PICTURES]
    write(sheet(images, [prompt for prompt, _ in PICTURES]), given.output)
    print(given.output)


def sheet(images: list[Image.Image], captions: list[str]) -> Image.Image:
    """The pictures in rows of four, each over its caption of at most three lines."""
    cell_width, cell_height = SIDE + 2 * MARGIN, MARGIN + SIDE + CAPTION
    rows = -(-len(images) // COLUMNS)
    page = Image.new("RGB", (COLUMNS * cell_width, rows * cell_height + MARGIN), "white")
    draw = ImageDraw.Draw(page)
    font = ImageFont.load_default(FONT_SIZE)
    for index, (image, caption) in enumerate(zip(images, captions, strict=True)):
        left, top = index % COLUMNS * cell_width + MARGIN, index // COLUMNS * cell_height + MARGIN
        page.paste(image, (left, top))
        draw.rectangle((left - 1, top - 1, left + SIDE, top + SIDE), outline="#dddddd")
        lines = textwrap.wrap(caption, LINE_CHARS, max_lines=3, placeholder=" …")
        middle = (left + SIDE // 2, top + SIDE + 4)
        draw.multiline_text(middle, "\n".join(lines), fill="#333333", font=font, anchor="ma", align="center", spacing=2)
    return page


def write(page: Image.Image, output: Path) -> None:
    """Write under a temporary name, then rename: a reader never sees half a file."""
    partial = output.with_name(f".{output.name}.partial")
    with partial.open("wb") as file:
        page.save(file, "PNG", optimize=True)
        file.flush()
        os.fsync(file.fileno())
    partial.replace(output)


if __name__ == "__main__":
    main()
