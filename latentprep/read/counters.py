"""Random choices from counters: they depend on seed, epoch and sample, and on no state that a process could lose."""

import numpy as np


def mix(seed: int, *parts: np.ndarray | int) -> np.ndarray:
    """uint64 numbers that depend on every part and on nothing else (splitmix64, chained): counters, not state."""
    state = np.asarray(seed % 2**64, np.uint64)
    with np.errstate(over="ignore"):
        for part in parts:
            state = (state ^ np.asarray(part, np.uint64)) + np.uint64(0x9E3779B97F4A7C15)
            state = (state ^ (state >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
            state = (state ^ (state >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
            state = state ^ (state >> np.uint64(31))
    return state


FLIP, NOISE, PROMPT, CAPTION, DROP = 1, 2, 3, 4, 5  # what a counter is for, so that no two choices share one


def fractions(draws: np.ndarray) -> np.ndarray:
    """float64 in [0,1) of uint64 numbers."""
    return (draws >> np.uint64(11)) * 2.0**-53
