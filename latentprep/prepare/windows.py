"""Prompts -> the windows of text that CLIP takes one by one, and stable-diffusion-webui's emphasis. Pure text.

Both follow stable-diffusion-webui (modules/sd_hijack_clip.py, modules/prompt_parser.py), with one difference: it cuts
a list of tokens and may cut a word in two, while windows are cut between words here, so that each of them is a text
that any pipeline's own encode_prompt takes.
"""

import re
from bisect import bisect_right
from collections.abc import Callable
from itertools import groupby
from typing import NamedTuple

Fragment = tuple[str, float]  # text and its weight
BREAK: Fragment = ("BREAK", -1.0)  # where a new window begins
BREAK_WORD = re.compile(r"\s*\bBREAK\b\s*")
Count = Callable[[list[str]], list[int]]  # tokens of each text, without start and end

BACKTRACK = 20  # a window ends behind a comma among its last 20 tokens: the web UI's comma_padding_backtrack
# A word with the white space before it, or a part of one that ends with a comma: CLIP's BPE merges across neither.
PIECE = re.compile(r"\s*(?:\S*?,(?=[^\W_])|\S+)")
EMPHASIS = re.compile(r"\\[()\[\]\\]|\\|[(\[\])]|:\s*(?P<weight>[+-]?(?:\d+\.?\d*|\.\d+))\s*\)|[^\\()\[\]:]+|:")


class Piece(NamedTuple):
    """What stays together in one window."""

    text: str
    tokens: int
    fragment: int  # which one it is of


def split_windows(fragments: list[Fragment], num_windows: int, room: int, count: Count) -> list[list[Fragment]]:
    """The fragments of a prompt in `num_windows` windows of at most `room` tokens each; those not needed are empty.

    A window ends between words; behind a comma if one stands among its last tokens, provided that the rest still
    fits. If all of it is full and a comma comes next, that is the first of the next window. A word that is longer than
    a window is cut between characters. BREAK begins a new window. The last window holds what is left, and is too long
    if the prompt is: the tokenizer cuts it.
    """
    sections = [list(own) for is_break, own in groupby(fragments, key=lambda f: f == BREAK) if not is_break]
    if fragments and fragments[0] == BREAK:
        sections.insert(0, [])  # an empty window, as the web UI makes it
    windows: list[list[Fragment]] = []
    for section in sections:
        if len(windows) < num_windows:
            windows += split_section(section, num_windows - len(windows), room, count)
        else:
            windows[-1] = windows[-1] + section
    return windows + [[] for _ in range(num_windows - len(windows))]


def split_section(fragments: list[Fragment], num_windows: int, room: int, count: Count) -> list[list[Fragment]]:
    """The windows that what stands between two BREAKs needs, at least one and at most `num_windows`."""
    if num_windows == 1 or count([join(fragments)])[0] <= room:
        return [fragments]
    pieces = list_pieces(fragments, room, count)
    windows, start = [], 0
    for left in range(num_windows - 1, 0, -1):
        end = fill(pieces, start, room)
        if end == len(pieces):
            break
        if is_comma_next(pieces, start, end, room, count):
            word = pieces[end]
            pieces[end : end + 1] = [
                word._replace(text=word.text[:-1], tokens=word.tokens - 1), word._replace(text=",", tokens=1),
            ]  # fmt: skip
            end += 1
        elif (comma := find_comma(pieces, start, end, room)) is not None and fits(pieces, comma, left, room):
            end = comma
        windows.append(pieces[start:end])
        start = end
    return [glue(window, fragments) for window in [*windows, pieces[start:]]]


def is_comma_next(pieces: list[Piece], start: int, end: int, room: int, count: Count) -> bool:
    """Whether the next piece is a word that just fits, and a comma that does not."""
    left = room - sum(piece.tokens for piece in pieces[start:end])
    text = pieces[end].text
    return left == pieces[end].tokens - 1 and text.endswith(",") and count([text[:-1]])[0] == left


def join(fragments: list[Fragment]) -> str:
    """The text of a window. Fragments are tokenized apart, as in the web UI: CLIP merges nothing across a space."""
    return " ".join(text for text, _ in fragments)


def list_pieces(fragments: list[Fragment], room: int, count: Count) -> list[Piece]:
    texts = [(text, n) for n, (whole, _) in enumerate(fragments) for text in PIECE.findall(whole)]
    pieces = []
    for (text, fragment), tokens in zip(texts, count([text for text, _ in texts]), strict=True):
        while tokens > room:
            length = find_length(text, room, count)
            pieces.append(Piece(text[:length], room, fragment))  # counts as full, so that nothing is put beside it
            text = text[length:]
            tokens = count([text])[0]
        pieces.append(Piece(text, tokens, fragment))
    return pieces


def find_length(text: str, room: int, count: Count) -> int:
    """Characters of the longest beginning of a text that has at most `room` tokens; at least one."""

    def num_tokens(length: int) -> int:
        return count([text[:length]])[0]

    return max(1, bisect_right(range(1, len(text) + 1), room, key=num_tokens))


def fill(pieces: list[Piece], start: int, room: int) -> int:
    """The end of the pieces from `start` on that fit into a window."""
    end = start
    while end < len(pieces) and pieces[end].tokens <= room:
        room -= pieces[end].tokens
        end += 1
    return end


def find_comma(pieces: list[Piece], start: int, end: int, room: int) -> int | None:
    """Behind the last comma of a window, if it is among the last BACKTRACK of the window's tokens."""
    found = [n for n in range(start + 1, end + 1) if pieces[n - 1].text.endswith(",")]
    used = sum(piece.tokens for piece in pieces[start : found[-1]]) if found else 0
    return found[-1] if used > room - BACKTRACK else None


def fits(pieces: list[Piece], start: int, num_windows: int, room: int) -> bool:
    """Whether the pieces from `start` on go into so many windows, filled as far as words allow."""
    for _ in range(num_windows):
        start = fill(pieces, start, room)
    return start == len(pieces)


def glue(pieces: list[Piece], fragments: list[Fragment]) -> list[Fragment]:
    return [
        ("".join(piece.text for piece in same), fragments[n][1])
        for n, same in groupby(pieces, key=lambda piece: piece.fragment)
    ]


def parse_emphasis(prompt: str) -> list[Fragment]:
    """Text and weights of a prompt in the web UI's syntax; neighbours of one weight are one fragment.

    (text) weighs 1.1 times as much, [text] 1.1 times less, (text:1.3) 1.3 times as much, each within the others.
    A backslash makes a bracket a character. A bracket that is never closed goes on to the end, one that was never
    opened is text. The word BREAK becomes the fragment BREAK, within brackets too (there the web UI takes it for text).
    """
    parts: list[tuple[str, float]] = []
    opened: dict[str, list[int]] = {"(": [], "[": []}  # where each bracket stands among the parts

    def weigh(start: int, factor: float) -> None:
        parts[start:] = [(text, weight * factor) for text, weight in parts[start:]]

    for match in EMPHASIS.finditer(prompt):
        text = match[0]
        if text in opened:
            opened[text].append(len(parts))
        elif match["weight"] and opened["("]:
            weigh(opened["("].pop(), float(match["weight"]))
        elif text == ")" and opened["("]:
            weigh(opened["("].pop(), 1.1)
        elif text == "]" and opened["["]:
            weigh(opened["["].pop(), 1 / 1.1)
        else:
            parts.append((text.removeprefix("\\"), 1.0))
    for bracket, factor in (("(", 1.1), ("[", 1 / 1.1)):
        for start in opened[bracket]:
            weigh(start, factor)
    whole = [("".join(text for text, _ in same), weight) for weight, same in groupby(parts, key=lambda part: part[1])]
    found: list[Fragment] = []
    for text, weight in whole:
        for number, part in enumerate(BREAK_WORD.split(text)):
            found += [BREAK] if number else []
            found += [(part, weight)] if part or not number else []
    return found
