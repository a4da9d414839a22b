"""A contact sheet: cards of pictures with a few words, drawn with Pillow alone. What they show is not known here."""

from collections.abc import Sequence
from dataclasses import dataclass

from PIL import Image, ImageDraw, ImageEnhance

from latentprep.records import Size
from latentprep.sheet_fonts import Color, draw_text, line_height, measure, readable

SIDE = 192  # pixels: no picture is wider or higher
GAP, MARGIN = 8, 24  # between the pictures of a card; around cards
WIDEST = 1680  # pixels of a sheet, as long as one card is not wider
BACKGROUND, GROUND, PADDING = (30, 31, 34), (56, 58, 64), (112, 80, 92)
INK, DIM, WARNING, BOX = (236, 236, 236), (160, 162, 168), (255, 186, 73), (255, 45, 120)
TITLE, SMALL, TEXT, LARGE = 12, 13, 15, 20  # sizes of letters: over pictures, captions, keys, the first line
MAX_LINES, MAX_CHARS = 2, 600  # of a caption
HEADING_LINES = 3  # of each line of a heading, once it is broken


@dataclass(frozen=True)
class CropBox:
    """A crop in a picture: edges as shares of its height and width, below 0 and above 1 where padding adds to it."""

    top: float
    left: float
    bottom: float
    right: float


@dataclass(frozen=True, eq=False)
class Picture:
    """One picture of a card."""

    title: str
    image: Image.Image | None  # RGB
    crop: CropBox | None = None
    says: str = ""  # text across it: why there is no image, or what is wrong with it
    is_marked: bool = False  # its title stands out


@dataclass(frozen=True, eq=False)
class Card:
    """One sample: its pictures, its name, and what is known of it."""

    key: str
    caption: str
    pictures: Sequence[Picture]
    note: str = ""
    warnings: Sequence[str] = ()


def draw_sheet(heading: Sequence[str], warnings: Sequence[str], cards: Sequence[Card]) -> Image.Image:
    """The cards below a heading, as an RGB image; as many beside each other as WIDEST allows."""
    num_pictures = max(len(card.pictures) for card in cards)
    width = num_pictures * (SIDE + GAP) - GAP
    columns = max(1, min(len(cards), (WIDEST - MARGIN) // (width + MARGIN)))
    total = MARGIN + columns * (width + MARGIN)
    head = draw_heading(heading, warnings, max(total, 480) - 2 * MARGIN)
    rows = [draw_row(cards[n : n + columns], width) for n in range(0, len(cards), columns)]
    heights = [max(card.height for card in row) for row in rows]
    sheet = Image.new("RGB", (max(total, 480), head.height + sum(heights) + MARGIN * (len(rows) + 2)), BACKGROUND)
    sheet.paste(head, (MARGIN, MARGIN))
    top = head.height + 2 * MARGIN
    for row, height in zip(rows, heights, strict=True):
        for n, card in enumerate(row):
            sheet.paste(card, (MARGIN + n * (width + MARGIN), top))
        top += height + MARGIN
    return sheet


def draw_heading(lines: Sequence[str], warnings: Sequence[str], width: int) -> Image.Image:
    """The first line is larger; warnings stand out."""
    texts = [(line, LARGE if n == 0 else TEXT, INK if n == 0 else DIM) for n, line in enumerate(lines)]
    texts += [(line, TEXT, WARNING) for line in warnings]
    parts = [(part, size, ink) for line, size, ink in texts for part in wrap(line, size, width, HEADING_LINES)]
    return stack_text(parts, width)


def draw_row(cards: Sequence[Card], width: int) -> list[Image.Image]:
    """Cards that stand beside each other: their pictures have one height, so that the text below is in line."""
    height = max(canvas_size(picture)[0] for card in cards for picture in card.pictures)
    return [draw_card(card, width, height) for card in cards]


def draw_card(card: Card, width: int, height: int) -> Image.Image:
    """Pictures with their titles, and below them the key, the note, warnings and the caption."""
    head = line_height(TITLE) + 3
    note = wrap(card.note, SMALL, width // 2, 1) if card.note else []
    room = width - (round(measure(note[0], SMALL)) + GAP if note else 0)
    texts = [(cut_start(card.key, TEXT, room), TEXT, INK)]
    texts += [(line, SMALL, WARNING) for warning in card.warnings for line in wrap(warning, SMALL, width, MAX_LINES)]
    texts += [(line, SMALL, DIM) for line in wrap(card.caption, SMALL, width, MAX_LINES)]
    foot = stack_text(texts, width)
    if note:
        draw_text(ImageDraw.Draw(foot), (width, line_height(TEXT) - 4), note[0], WARNING, SMALL, "rs")
    image = Image.new("RGB", (width, head + height + GAP + foot.height), BACKGROUND)
    draw = ImageDraw.Draw(image)
    for n, picture in enumerate(card.pictures):
        left = n * (SIDE + GAP)
        (title,) = wrap(picture.title, TITLE, SIDE, 1) or [""]
        draw_text(draw, (left, head - 6), title, WARNING if picture.is_marked else DIM, TITLE)
        if picture.image is not None or picture.says:
            image.paste(draw_picture(picture, height), (left, head))
    image.paste(foot, (0, head + height + GAP))
    return image


def canvas_size(picture: Picture) -> Size:
    """(height, width) that a picture takes, with the padding of its crop."""
    if picture.image is None:
        return SIDE // 3, SIDE
    crop = picture.crop or CropBox(0.0, 0.0, 1.0, 1.0)
    down, across = max(1.0, crop.bottom) - min(0.0, crop.top), max(1.0, crop.right) - min(0.0, crop.left)
    return fit((picture.image.height * down, picture.image.width * across))


def draw_picture(picture: Picture, height: int) -> Image.Image:
    """[height, SIDE] pixels: the picture in the middle, as large as it can be."""
    image = Image.new("RGB", (SIDE, height), GROUND)
    if picture.image is not None:
        canvas = draw_cropped(picture.image, picture.crop, canvas_size(picture))
        image.paste(canvas, ((SIDE - canvas.width) // 2, (height - canvas.height) // 2))
    if picture.says:
        lines = wrap(picture.says, SMALL, SIDE - 2 * GAP, 6)
        draw, step = ImageDraw.Draw(image), line_height(SMALL)
        for n, line in enumerate(lines):
            middle = height // 2 + step * n - step * len(lines) // 2 + step // 2
            draw_text(draw, (SIDE // 2, middle), line, WARNING, SMALL, "mm", edge=GROUND)
    return image


def draw_cropped(picture: Image.Image, crop: CropBox | None, size: Size) -> Image.Image:
    """A picture at (height, width); with a crop, what lies outside is dark, padding has a colour of its own, and the
    edge is drawn.
    """
    if crop is None:
        return enlarge(picture, size)
    top, left = min(0.0, crop.top), min(0.0, crop.left)
    down, across = size[0] / (max(1.0, crop.bottom) - top), size[1] / (max(1.0, crop.right) - left)

    def place(box: CropBox) -> tuple[int, int, int, int]:
        """Left, top, right and bottom in pixels."""
        edges = (
            (box.left - left) * across,
            (box.top - top) * down,
            (box.right - left) * across,
            (box.bottom - top) * down,
        )
        x, y, right, bottom = map(round, edges)
        return x, y, max(x + 1, right), max(y + 1, bottom)

    outer, inner = place(CropBox(0.0, 0.0, 1.0, 1.0)), place(crop)
    whole = Image.new("RGB", size[::-1], PADDING)
    whole.paste(enlarge(picture, (outer[3] - outer[1], outer[2] - outer[0])), outer[:2])
    canvas = ImageEnhance.Brightness(whole).enhance(0.35)
    canvas.paste(whole.crop(inner), inner[:2])
    ImageDraw.Draw(canvas).rectangle((inner[0], inner[1], inner[2] - 1, inner[3] - 1), outline=BOX, width=2)
    return canvas


def fit(size: tuple[float, float]) -> Size:
    """The largest (height, width) of this shape that has room in a square of SIDE."""
    scale = SIDE / max(size)
    return max(1, round(size[0] * scale)), max(1, round(size[1] * scale))


def shrink(picture: Image.Image, size: Size) -> Image.Image:
    """A picture at the size at which an image of `size` is shown: fit(size) if one side is over SIDE, else `size`."""
    height, width = fit(size) if max(size) > SIDE else size
    if (picture.height, picture.width) == (height, width):
        return picture
    return picture.resize((width, height), Image.Resampling.LANCZOS, reducing_gap=3)


def enlarge(picture: Image.Image, size: Size) -> Image.Image:
    """A picture at (height, width): its pixels stay visible if it grows."""
    grows = picture.height < size[0] or picture.width < size[1]
    return picture.resize(size[::-1], Image.Resampling.NEAREST if grows else Image.Resampling.LANCZOS)


def wrap(text: str, size: int, width: int, lines: int) -> list[str]:
    """A text in at most so many lines of a width; one that is longer ends in dots."""
    words = readable(text[:MAX_CHARS]) + ("..." if len(text) > MAX_CHARS else "")
    found: list[str] = []
    while words and len(found) < lines:
        count = count_fitting(words, size, width)
        is_last = len(found) == lines - 1
        if count >= len(words):
            found.append(words)
            break
        if is_last:
            found.append(words[: count_fitting(words, size, width - measure("...", size))].rstrip() + "...")
            break
        space = words.rfind(" ", 0, count + 1)
        count = space if space > count // 2 else count
        found.append(words[:count].rstrip())
        words = words[count:].lstrip()
    return found


def count_fitting(text: str, size: int, width: float) -> int:
    """How many characters of a text a width has room for, at least one."""
    low, high = 1, len(text)
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if measure(text[:middle], size) <= width else (low, middle - 1)
    return low


def cut_start(text: str, size: int, width: float) -> str:
    """The end of a text that a width has room for: of a path its name."""
    shown = readable(text[-MAX_CHARS:])
    if len(text) <= MAX_CHARS and measure(shown, size) <= width:
        return shown
    backwards = shown[::-1]
    return "..." + backwards[: count_fitting(backwards, size, width - measure("...", size))][::-1]


def stack_text(lines: Sequence[tuple[str, int, Color]], width: int) -> Image.Image:
    """Lines of text of a size and a colour, one below the other."""
    image = Image.new("RGB", (width, sum(line_height(size) for _, size, _ in lines)), BACKGROUND)
    draw, top = ImageDraw.Draw(image), 0
    for text, size, ink in lines:
        top += line_height(size)
        draw_text(draw, (0, top - round(size * 0.3)), text, ink, size)
    return image
