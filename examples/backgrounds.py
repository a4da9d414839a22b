"""Draw what --background and --weights make of transparent images: examples/backgrounds.png, in docs/images.md.

python examples/backgrounds.py [FILE]
"""

from pathlib import Path
from typing import Annotated

import typer
from PIL import Image, ImageDraw, ImageFilter, ImageFont

from latentprep.demo import draw_scene
from latentprep.prepare.images.alpha import fill_background, split_alpha

PICTURE = Path(__file__).with_suffix(".png")
SIDE, GAP, HEAD = 192, 12, 26  # pixels
COLUMNS = ("stored colour", "alpha: the weight", "auto (default)", "keep", "white", "auto, --weights none")


def draw_alpha(hidden: int) -> Image.Image:
    """A soft round alpha: 255 within, `hidden` without."""
    alpha = Image.new("L", (SIDE, SIDE), hidden)
    ImageDraw.Draw(alpha).ellipse((SIDE * 0.15, SIDE * 0.2, SIDE * 0.85, SIDE * 0.9), fill=255)
    return alpha.filter(ImageFilter.GaussianBlur(4))


def draw_examples() -> dict[str, Image.Image]:
    """Transparent images of three kinds, by what they are."""
    scene = draw_scene(2)[0].crop((0, 0, 320, 320)).resize((SIDE, SIDE), Image.Resampling.LANCZOS)
    painted, cutout, faded = scene.copy(), scene.copy(), scene.copy()
    painted.putalpha(draw_alpha(0))
    faded.putalpha(draw_alpha(80))
    cutout = Image.composite(scene, Image.new("RGB", scene.size), draw_alpha(0).point(lambda level: 255 * (level > 0)))
    cutout.putalpha(draw_alpha(0))
    return {
        "alpha painted into a photo: the picture goes on below it": painted,
        "alpha that fades the surroundings, and hides nothing": faded,
        "a cutout: black where it is fully transparent": cutout,
    }


def make_row(image: Image.Image) -> list[Image.Image]:
    color, alpha = split_alpha(image)
    assert alpha is not None
    ways = (("auto", True), ("keep", True), ("#ffffff", True), ("auto", False))
    return [color, alpha.convert("RGB"), *(fill_background(color, alpha, name, weighs, []) for name, weighs in ways)]


def main(file: Annotated[Path, typer.Argument()] = PICTURE) -> None:
    examples = draw_examples()
    width, height = len(COLUMNS) * (SIDE + GAP) + GAP, len(examples) * (SIDE + HEAD + GAP) + HEAD + GAP
    sheet = Image.new("RGB", (width, height), (235, 235, 235))
    draw = ImageDraw.Draw(sheet)
    font = ImageFont.load_default(15)
    for n, name in enumerate(COLUMNS):
        draw.text((GAP + n * (SIDE + GAP), 6), name, "black", font)
    for row, (name, image) in enumerate(examples.items()):
        top = HEAD + row * (SIDE + HEAD + GAP)
        draw.text((GAP, top + 4), name, (90, 90, 90), font)
        for n, made in enumerate(make_row(image)):
            sheet.paste(made, (GAP + n * (SIDE + GAP), top + HEAD))
    sheet.quantize(256).save(file, optimize=True)


if __name__ == "__main__":
    typer.run(main)
