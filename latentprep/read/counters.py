"""Random choices from counters: they depend on seed, epoch and sample, and on no state that a process could lose."""

from math import isqrt

import numpy as np


def hash_numbers(seed: int, *parts: np.ndarray | int) -> np.ndarray:
    """uint64 numbers that depend on every part and on nothing else (splitmix64, chained): counters, not state."""
    state = np.asarray(seed % 2**64, np.uint64)
    with np.errstate(over="ignore"):
        for part in parts:
            state = (state ^ np.asarray(part, np.uint64)) + np.uint64(0x9E3779B97F4A7C15)
            state = (state ^ (state >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
            state = (state ^ (state >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
            state = state ^ (state >> np.uint64(31))
    return state


# the purposes of random numbers: each choice mixes its own number in, so no two choices get the same random numbers
FLIP, NOISE, PROMPT, CAPTION, DROP, CROP, SPLIT, TURN = range(1, 9)


def fractions(draws: np.ndarray) -> np.ndarray:
    """float64 in [0,1) of uint64 numbers."""
    return (draws >> np.uint64(11)) * 2.0**-53


def permute(numbers: np.ndarray, count: int, *parts: int) -> np.ndarray:
    """Where a random permutation of range(count) puts some numbers [n]: [n] int64. `parts` are its seed.

    No table of the permutation is made. It is a Feistel network on a grid of a x b >= count numbers. It adds instead of
    xor, and is applied again to every result outside the range (cycle walking): the generalized Feistel cipher of Black
    and Rogaway, Ciphers with Arbitrary Finite Domains (2002).
    """
    a = isqrt(count - 1) + 1
    b = -(-count // a)
    keys = hash_numbers(0, *parts, np.arange(6)).tolist()
    found = numbers.astype(np.uint64)
    outside = np.arange(len(found))
    while len(outside):
        left: np.ndarray = found[outside] % np.uint64(a)
        right: np.ndarray = found[outside] // np.uint64(a)
        for n in range(0, 6, 2):
            left = (left + hash_numbers(keys[n], right) % np.uint64(a)) % np.uint64(a)
            right = (right + hash_numbers(keys[n + 1], left) % np.uint64(b)) % np.uint64(b)
        found[outside] = left + right * np.uint64(a)
        outside = outside[found[outside] >= count]
    return found.astype(np.int64)
