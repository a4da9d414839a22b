"""read/repeats.py: every sample is one repetition of one image, however the images' repeats differ."""

import numpy as np
import pytest

from latentprep.read.repeats import Repeats

COUNTS = [1, [1, 1, 1], 4, [3, 1, 2], [1, 5, 5, 2, 1], [7], [2, 2, 9]]


def by_hand(counts):
    """(image, repetition) of every sample: round after round, in each the images that are still repeated."""
    return [(image, n) for n in range(max(counts)) for image, count in enumerate(counts) if n < count]


@pytest.mark.parametrize("counts", COUNTS)
def test_samples_are_taken_apart_and_put_together(counts):
    listed = counts if isinstance(counts, list) else [counts] * 3
    repeats = Repeats(len(listed), np.array(counts) if isinstance(counts, list) else counts)
    wanted = by_hand(listed)
    assert len(repeats) == len(wanted) == sum(listed)
    samples = np.random.default_rng(0).permutation(len(wanted))
    images, repetitions = repeats.split(samples)
    assert list(zip(images.tolist(), repetitions.tolist(), strict=True)) == [wanted[n] for n in samples]
    assert repeats.join(images, repetitions).tolist() == samples.tolist()


@pytest.mark.parametrize("counts", COUNTS)
def test_beyond_the_last_sample_all_of_it_begins_again_with_further_repetitions(counts):
    listed = counts if isinstance(counts, list) else [counts] * 3
    repeats = Repeats(len(listed), np.array(counts) if isinstance(counts, list) else counts)
    wanted, samples = by_hand(listed), np.arange(3 * len(repeats))
    images, repetitions = repeats.split(samples)
    for cycle in range(3):
        part = slice(cycle * len(wanted), (cycle + 1) * len(wanted))
        found = list(zip(images[part].tolist(), repetitions[part].tolist(), strict=True))
        assert found == [(image, n + cycle * listed[image]) for image, n in wanted]
    assert repeats.join(images, repetitions).tolist() == samples.tolist()
