"""Letters of a sheet: Pillow's own font, and for what it lacks the fonts of this machine."""

from functools import cache, lru_cache
from itertools import groupby

from PIL import ImageDraw, ImageFont

from latentprep.human import printable

Font = ImageFont.ImageFont | ImageFont.FreeTypeFont
Color = tuple[int, int, int]
LINE = 1.35  # height of a line of text over the size of its letters
# Tried in this order, where systems keep their fonts: of Linux, of macOS, of Windows. Each knows more than Latin.
NAMES = (
    "DejaVuSans.ttf", "NotoSans-Regular.ttf", "LiberationSans-Regular.ttf", "NotoSansCJK-Regular.ttc",
    "wqy-microhei.ttc", "Arial Unicode.ttf", "Hiragino Sans GB.ttc", "arial.ttf", "msyh.ttc", "msgothic.ttc",
    "malgun.ttf",
)  # fmt: skip
NO_CHAR = "\U0010fffe"  # which no font has: what a font lacks is drawn like it
PROBE = 15  # size at which fonts are asked for a character


@cache
def list_fonts(size: int) -> tuple[Font, ...]:
    """Pillow's font, and those of NAMES that are there."""
    found: list[Font] = [ImageFont.load_default(size)]
    for name in NAMES:
        try:
            found.append(ImageFont.truetype(name, size))
        except OSError:
            continue
    return tuple(found)


@lru_cache(4096)
def find_font(char: str) -> int | None:
    """The number in list_fonts of the first font that has a character; None: none has."""
    if char == " ":
        return 0
    for number, font in enumerate(list_fonts(PROBE)):
        one, other = (font.getmask(text) for text in (char, NO_CHAR))
        if one.size != other.size or bytes(one) != bytes(other):
            return number
    return None


def readable(text: str) -> str:
    """A stranger's text, with what cannot be drawn escaped."""
    return "".join(char if find_font(char) is not None else ascii(char)[1:-1] for char in printable(text))


def line_height(size: int) -> int:
    return round(size * LINE)


def measure(text: str, size: int) -> float:
    """Pixels that a text is wide."""
    return float(sum(font.getlength(part) for part, font in _split(text, size)))


def draw_text(
    draw: ImageDraw.ImageDraw,
    at: tuple[int, int],
    text: str,
    ink: Color,
    size: int,
    anchor: str = "ls",
    edge: Color | None = None,
) -> None:
    """A line of text at a point, which `anchor` says as Pillow does: l, m or r, and s (the base line) or m.

    edge: the colour of an edge around its letters.
    """
    share, width = {"l": 0.0, "m": 0.5, "r": 1.0}[anchor[0]], 2 if edge is not None else 0
    left = at[0] - share * measure(text, size)
    for part, font in _split(text, size):
        draw.text((left, at[1]), part, ink, font, f"l{anchor[1]}", stroke_width=width, stroke_fill=edge)
        left += font.getlength(part)


def _split(text: str, size: int) -> list[tuple[str, Font]]:
    """Parts of a text, each with the font that has its characters."""
    fonts = list_fonts(size)
    return [("".join(part), fonts[number]) for number, part in groupby(text, key=lambda char: find_font(char) or 0)]
