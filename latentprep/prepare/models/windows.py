"""Prompts -> the windows of text that CLIP takes one by one, and stable-diffusion-webui's emphasis. Pure text.

Both follow stable-diffusion-webui (modules/sd_hijack_clip.py, modules/prompt_parser.py), with one difference: it cuts
a list of tokens and may cut a run of letters in two if no comma is near, while windows are cut between CLIP's pieces
here (runs of letters, digits, punctuation), so that each of them is a text that any pipeline's encode_prompt takes.
Of 400 pieces of English prose of 60 to 280 words 31 have other windows for this; prompts of tags have none.
"""

import re
from bisect import bisect_right
from collections.abc import Callable
from itertools import groupby
from typing import NamedTuple

import numpy as np
import regex  # re's syntax, and Unicode's classes

Fragment = tuple[str, float]  # text and its weight
BREAK: Fragment = ("BREAK", -1.0)  # where a new window begins
BREAK_WORD = re.compile(r"(?:(?<!\s)\s+)?\bBREAK\b\s*")  # the look behind: a long gap is read once, not from each place
Count = Callable[[list[str]], list[int]]  # tokens of each text, without start and end

MAX_WEIGHT = 100.0  # beyond what anybody means; the web UI has no bound
BACKTRACK = 20  # a window ends behind a comma among its last 20 tokens: the web UI's comma_padding_backtrack
# CLIP's BPE merges nothing across these: its own pattern, with the white space before; accents stay with their letters.
PIECE = regex.compile(
    r"(?<!\s)\s*(?:'s|'t|'re|'ve|'m|'ll|'d|\p{L}[\p{L}\p{M}]*|\p{N}|[^\s\p{L}\p{N}]+)", regex.IGNORECASE
)
EMPHASIS = re.compile(r"\\[()\[\]\\]|\\|[(\[\])]|:\s*(?P<weight>[+-]?(?:\d+(?:\.\d*)?|\.\d+))\s*\)|[^\\()\[\]:]+|:")


class Piece(NamedTuple):
    """What stays together in one window."""

    text: str
    tokens: int
    fragment: int  # which one it is of
    is_comma: bool  # the token that a window may end behind


def split_windows(fragments: list[Fragment], num_windows: int, room: int, count: Count) -> list[list[Fragment]]:
    """The fragments of a prompt in `num_windows` windows of at most `room` tokens each; those not needed are empty.

    A window that is full ends behind the last comma if that is among its last BACKTRACK tokens, provided that the rest
    still fits; else where it is full. If a comma comes next, that is the first of the next window. A word that does not
    fit goes into the next window as a whole, if it is no longer than a window. BREAK begins a new window. The last
    window holds what is left, and is too long if the prompt is: the tokenizer cuts it.
    """
    sections: list[list[Fragment]] = [[]]
    for fragment in fragments:
        if fragment == BREAK:
            sections.append([])
        else:
            sections[-1].append(fragment)
    if len(sections) > 1 and not sections[-1]:
        sections.pop()  # nothing stands behind the last BREAK; anywhere else an empty window is made, as in the web UI
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
        is_full = sum(piece.tokens for piece in pieces[start:end]) == room
        if not (is_full and pieces[end].is_comma):
            comma = find_comma(pieces, start, end, room)
            if comma is not None and fits(pieces, comma, left, room):
                end = comma
        windows.append(pieces[start:end])
        start = end
    return [glue(window, fragments) for window in [*windows, pieces[start:]]]


def join(fragments: list[Fragment]) -> str:
    """The text of a window. Fragments are tokenized apart, as in the web UI: CLIP merges nothing across a space."""
    return " ".join(text for text, _ in fragments)


def list_pieces(fragments: list[Fragment], room: int, count: Count) -> list[Piece]:
    texts = [(text, n) for n, (whole, _) in enumerate(fragments) for text in PIECE.findall(whole)]
    pieces = []
    for (text, fragment), tokens in zip(texts, count([text for text, _ in texts]), strict=True):
        if tokens > room:
            while (length := find_length(text, room, count)) < len(text):
                pieces.append(Piece(text[:length], room, fragment, False))  # full, so that nothing is put beside it
                text = text[length:]
            tokens = count([text])[0]
        before = text[:-1].rstrip()
        if text.endswith(",") and (not before or count([before])[0] == tokens - 1):  # else a token such as ),
            if before:
                pieces.append(Piece(text[:-1], tokens - 1, fragment, False))
            pieces.append(Piece("," if before else text, 1, fragment, True))
        else:
            pieces.append(Piece(text, tokens, fragment, False))
    return pieces


def find_length(text: str, room: int, count: Count) -> int:
    """Characters of the longest beginning of a text that has at most `room` tokens; at least one."""

    def num_tokens(length: int) -> int:
        return count([text[:length]])[0]

    high = room
    while high < len(text) and num_tokens(high) <= room:
        high *= 2
    return max(1, bisect_right(range(1, min(high, len(text)) + 1), room, key=num_tokens))


def fill(pieces: list[Piece], start: int, room: int) -> int:
    """The end of the pieces from `start` on that fit into a window."""
    end = start
    while end < len(pieces) and pieces[end].tokens <= room:
        room -= pieces[end].tokens
        end += 1
    return end


def find_comma(pieces: list[Piece], start: int, end: int, room: int) -> int | None:
    """Behind the last comma of a window, if it is among the last BACKTRACK of the window's tokens."""
    # a comma pushed here because the window before was full does not count: the web UI forgets it
    first = start + 2 if pieces[start].is_comma else start + 1
    found = [n for n in range(first, end + 1) if pieces[n - 1].is_comma]
    if not found:
        return None
    used = sum(piece.tokens for piece in pieces[start : found[-1]])
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
    Weights are -MAX_WEIGHT to MAX_WEIGHT.
    """
    matches = list(EMPHASIS.finditer(prompt))
    parts: list[str] = []
    weights = np.ones(len(matches))  # one per part, later parts start at 1; an array: brackets may be thousands
    opened: dict[str, list[int]] = {"(": [], "[": []}  # where each bracket stands among the parts

    def weigh(start: int, factor: float) -> None:
        with np.errstate(over="ignore", invalid="ignore"):  # as Python's floats: infinite beyond 7,447 brackets
            weights[start : len(parts)] *= factor

    for match in matches:
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
            parts.append(text.removeprefix("\\"))
    for bracket, factor in (("(", 1.1), ("[", 1 / 1.1)):
        for start in opened[bracket]:
            weigh(start, factor)
    weights = np.nan_to_num(weights).clip(-MAX_WEIGHT, MAX_WEIGHT)  # infinite ones would stop a run
    pairs = zip(parts, weights.tolist(), strict=False)
    whole = [("".join(text for text, _ in same), weight) for weight, same in groupby(pairs, key=lambda pair: pair[1])]
    found: list[Fragment] = []
    for text, weight in whole:
        for number, part in enumerate(BREAK_WORD.split(text)):
            found += [BREAK] if number else []
            found += [(part, weight)] if part or not number else []
    return found
