"""Images, captions and alpha drawn on the spot: something to encode on a machine that has no photos."""

import random
from pathlib import Path
from typing import Any

from PIL import Image, ImageDraw, ImageFilter

from latentprep.errors import UserError

SIZES = ((384, 256), (256, 384), (320, 320), (512, 256))  # (width, height), as Pillow counts
SKIES = {"a morning": ((255, 214, 170), (120, 170, 220)), "a noon": ((190, 225, 250), (60, 130, 210)),
         "an evening": ((250, 150, 90), (90, 50, 110)), "a night": ((40, 50, 90), (10, 12, 35))}  # fmt: skip
HILLS = {"green": (70, 130, 60), "brown": (120, 90, 60), "snowy": (225, 230, 240)}
THINGS = {"red house": (190, 50, 40), "white tower": (235, 230, 215), "blue tent": (50, 90, 190)}
MARK = ".latentprep-demo"  # an empty file: the images of this folder are the demo's
OPTIONS: dict[str, Any] = {"model": "tiny", "resolution": 256, "flip": True}  # of encode, for these images
SCALE = 2  # drawn larger and shrunk, so that edges are smooth


def draw_scene(seed: int) -> tuple[Image.Image, str]:
    """A landscape and its caption; the same for the same seed."""
    rng = random.Random(seed)
    width, height = (side * SCALE for side in SIZES[seed % len(SIZES)])
    sky, hill, thing = rng.choice(sorted(SKIES)), rng.choice(sorted(HILLS)), rng.choice(sorted(THINGS))
    low, high = SKIES[sky]
    column = Image.new("RGB", (1, height))
    for y in range(height):
        column.putpixel((0, y), tuple(round(b + (a - b) * y / height) for a, b in zip(low, high, strict=True)))
    image = column.resize((width, height))
    draw = ImageDraw.Draw(image)

    sun_x, sun_y, radius = (
        rng.uniform(0.15, 0.85) * width,
        rng.uniform(0.1, 0.35) * height,
        rng.uniform(0.05, 0.1) * height,
    )
    draw.ellipse((sun_x - radius, sun_y - radius, sun_x + radius, sun_y + radius), fill=(255, 245, 200))
    for layer in range(3):
        shade = 0.55 + 0.2 * layer
        color = tuple(round(value * shade) for value in HILLS[hill])
        ridge, steps = height * (0.5 + 0.13 * layer), 9
        points = [(width * n / steps, ridge + rng.uniform(-0.08, 0.08) * height) for n in range(steps + 1)]
        draw.polygon([(0, height), *points, (width, height)], fill=color)
    left, base, size = rng.uniform(0.2, 0.7) * width, height * 0.85, rng.uniform(0.12, 0.2) * height
    draw.rectangle((left, base - size, left + size, base), fill=THINGS[thing])
    draw.polygon(
        [(left - size * 0.1, base - size), (left + size / 2, base - 1.6 * size), (left + size * 1.1, base - size)],
        fill=(60, 45, 45),
    )
    draw.rectangle((left + size * 0.4, base - size * 0.4, left + size * 0.6, base), fill=(250, 220, 130))
    return image.resize((width // SCALE, height // SCALE), Image.Resampling.LANCZOS), f"{sky}, {hill} hills, a {thing}"


def with_alpha(image: Image.Image, seed: int) -> Image.Image:
    """The image with a soft round alpha: what lies outside is to weigh less in the loss."""
    rng = random.Random(seed)
    width, height = image.size
    alpha = Image.new("L", image.size, 40)
    x, y, radius = rng.uniform(0.3, 0.7) * width, rng.uniform(0.4, 0.7) * height, 0.35 * min(image.size)
    ImageDraw.Draw(alpha).ellipse((x - radius, y - radius, x + radius, y + radius), fill=255)
    result = image.copy()
    result.putalpha(alpha.filter(ImageFilter.GaussianBlur(radius / 4)))
    return result


def draw_folder(folder: Path, count: int = 24) -> None:
    """Fill a folder with scenes and what real folders have: sidecars, subfolders, alpha, EXIF turns, a broken file.

    Files of an earlier demo are left as they are. Raises UserError if the folder holds other files.
    """
    try:
        if folder.exists() and not (folder / MARK).is_file() and any(folder.iterdir()):
            raise UserError(f"demo: {folder} holds files that are not the demo's. Give another DIR.")
        folder.mkdir(parents=True, exist_ok=True)
        (folder / MARK).touch()
        _draw_files(folder, count)
    except OSError as error:
        raise UserError(f"demo: {folder} cannot be written ({error.strerror or error}). Give another folder.") from None


def _draw_files(folder: Path, count: int) -> None:
    (folder / "turned").mkdir(parents=True, exist_ok=True)
    for seed in range(count):
        image, caption = draw_scene(seed)
        if seed % 6 == 5:  # as a phone writes it: lying on its side, with the orientation beside it
            exif = Image.Exif()
            exif[0x0112] = 6
            path = folder / "turned" / f"{seed:03d}.jpg"
            _save(image.transpose(Image.Transpose.ROTATE_90), path, quality=92, exif=exif)
        elif seed % 4 == 1:
            path = folder / f"{seed:03d}.png"
            _save(with_alpha(image, seed), path)
        elif seed % 4 == 2:  # no sidecar: the file name is the caption
            _save(image, folder / f"{seed:03d} {caption}.webp", quality=92)
            continue
        else:
            path = folder / f"{seed:03d}.jpg"
            _save(image, path, quality=92)
        if not path.with_suffix(".txt").exists():
            path.with_suffix(".txt").write_text(caption + "\n", encoding="utf-8")
    whole = (folder / "000.jpg").read_bytes()
    if not (folder / "broken.jpg").exists():
        (folder / "broken.jpg").write_bytes(whole[: len(whole) // 2])


def _save(image: Image.Image, path: Path, **options: Any) -> None:
    if not path.exists():
        image.save(path, **options)
