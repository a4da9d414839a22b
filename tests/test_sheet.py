"""sheet.py: what stands where on a contact sheet, pixel by pixel."""

import numpy as np
import pytest
from PIL import Image, ImageDraw, ImageFont

from latentprep import sheet, sheet_fonts
from latentprep.sheet import BOX, GROUND, PADDING, SIDE, Card, CropBox, Picture, draw_cropped, draw_sheet

WHITE = Image.new("RGB", (100, 60), (255, 255, 255))


def crop(size, crop, picture=WHITE):
    return np.asarray(draw_cropped(picture, crop, size)).astype(int)


def test_the_box_lies_where_the_crop_says():
    found = crop((60, 100), CropBox(10 / 60, 20 / 100, 50 / 60, 70 / 100))
    edge = (found == BOX).all(axis=2)
    rows, columns = np.flatnonzero(edge.any(axis=1)), np.flatnonzero(edge.any(axis=0))
    assert (rows[0], rows[-1], columns[0], columns[-1]) == (10, 49, 20, 69)
    assert edge[10, 20:70].all()
    assert edge[10:50, 69].all()
    assert not edge[12:48, 22:68].any()
    assert (found[12:48, 22:68] == 255).all()  # what is kept is as it is
    assert found[:10].max() < 100  # and the rest is dark
    assert found[:, 70:].max() < 100


def test_padding_has_a_colour_of_its_own():
    found = crop((60, 150), CropBox(0, -0.25, 1, 1.25))
    assert (found[30, 4:23] == PADDING).all()
    assert (found[30, 27:123] == 255).all()
    assert (found[30, 127:146] == PADDING).all()
    assert (found[:, 0] == BOX).all()
    assert (found[:, -1] == BOX).all()
    taller = crop((90, 100), CropBox(-0.5, 0.2, 1, 0.7))  # padding above, and a crop at both sides
    assert (taller[10, 24:66] == PADDING).all()
    assert (taller[50, 24:66] == 255).all()
    assert taller[50, :18].max() < 100


def test_a_picture_without_a_crop_is_untouched():
    assert (crop((60, 100), None) == 255).all()


@pytest.mark.parametrize("size", [(1, 3000), (3000, 1), (5, 5), (600, 400)])
def test_pictures_of_any_shape_fit(size):
    picture = sheet.shrink(Image.new("RGB", size[::-1], (9, 200, 9)), size)
    card = Card("a.png", "", [Picture("x", picture, CropBox(0.2, 0.2, 0.9, 0.9)), Picture("y", picture)])
    image = np.asarray(draw_sheet(["cache"], [], [card]))
    assert (image == (9, 200, 9)).all(axis=2).any()
    assert max(sheet.fit(size)) == SIDE


def test_cards_are_in_line_and_no_wider_than_the_sheet_should_be():
    card = Card("a.png", "caption", [Picture("source", WHITE)] * 3)
    image = draw_sheet(["cache"], [], [card] * 5)
    assert image.width <= sheet.WIDEST
    white = (np.asarray(image) == 255).all(axis=2)
    assert white.sum() == 15 * 115 * SIDE  # 100x60 becomes 192x115
    starts = np.flatnonzero(white.any(axis=1)[1:] & ~white.any(axis=1)[:-1])
    assert len(starts) == 3
    assert len(set(np.diff(starts))) == 1
    one = draw_sheet(["cache"], [], [Card("a.png", "", [Picture("source", WHITE)] * 9)])
    assert one.width > sheet.WIDEST  # a single card has room for all of its pictures


def test_a_picture_that_is_not_there_says_why():
    said = draw_sheet(["cache"], [], [Card("a", "", [Picture("x", None, says="no such file"), Picture("y", WHITE)])])
    silent = draw_sheet(["cache"], [], [Card("a", "", [Picture("x", None), Picture("y", WHITE)])])
    assert (np.asarray(said) == sheet.WARNING).all(axis=2).any()
    assert not (np.asarray(silent) == sheet.WARNING).all(axis=2).any()
    assert (np.asarray(said) == GROUND).all(axis=2).sum() > 10 * 190


@pytest.fixture(params=["own", "machine"])
def fonts(request, monkeypatch):
    """Pillow's font alone, or those of this machine too."""
    if request.param == "own":
        monkeypatch.setattr(sheet_fonts, "NAMES", ())
    for known in (sheet_fonts.list_fonts, sheet_fonts.find_font):
        known.cache_clear()
    yield request.param
    for known in (sheet_fonts.list_fonts, sheet_fonts.find_font):
        known.cache_clear()


@pytest.mark.parametrize("text", ["\x1b[31m", "a\nb", "\u732b\U0001f600", "\ud800", "\u202eabc", "\x00", "caf\xe9"])
def test_what_cannot_be_drawn_is_escaped(fonts, text):
    shown = sheet.readable(text)
    assert all(sheet_fonts.find_font(char) is not None for char in shown)
    if fonts == "own":
        assert shown == text.encode("unicode_escape", "surrogatepass").decode() or "\\" in shown
    draw_sheet([text], [text], [Card(text, text, [Picture(text, None, says=text)], text, [text])])


def test_letters_of_other_fonts_stand_beside_each_other(monkeypatch):
    """A font that knows Cyrillic is searched for by its name; Pillow's own does not."""
    try:
        ImageFont.truetype("DejaVuSans.ttf", 15)
    except OSError:
        pytest.skip("this machine has no DejaVu Sans")
    text = "Лиса and Käse"
    assert sheet.readable(text) == text
    parts = [part for part, _ in sheet_fonts._split(text, 15)]
    assert parts == ["Лиса", " and K", "ä", "se"]
    image = Image.new("RGB", (400, 40))
    sheet_fonts.draw_text(ImageDraw.Draw(image), (10, 30), text, (255, 255, 255), 15)
    columns = np.flatnonzero(np.asarray(image).any(axis=(0, 2)))
    assert abs(columns[0] - 10) <= 3
    assert abs(columns[-1] - 10 - sheet.measure(text, 15)) <= 3
    right = Image.new("RGB", (400, 40))
    sheet_fonts.draw_text(ImageDraw.Draw(right), (390, 30), text, (255, 255, 255), 15, "rs")
    assert abs(np.flatnonzero(np.asarray(right).any(axis=(0, 2)))[-1] - 390) <= 3


def test_text_that_can_be_drawn_stays():
    text = "".join(map(chr, range(32, 127)))
    assert sheet.readable(text) == text


def test_long_texts_are_cut():
    assert sheet.wrap("one two three", 13, 1000, 2) == ["one two three"]
    lines = sheet.wrap("word " * 10_000, 13, 300, 2)
    assert len(lines) == 2
    assert lines[1].endswith("...")
    assert not lines[0].startswith(" ")
    assert all(sheet.measure(line, 13) <= 300 for line in [*lines, *sheet.wrap("x" * 10**6, 13, 300, 3)])
    name = sheet.cut_start("folder/" * 50 + "name.png", 15, 200)
    assert name.startswith("...")
    assert name.endswith("/name.png")
    assert sheet.measure(name, 15) <= 205
    assert sheet.wrap("", 13, 100, 2) == []
