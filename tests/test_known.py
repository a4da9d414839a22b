"""plan/stored.py: a run opens no header of an image that its cache knows, and still sees what it must see."""

import gc
import json
import os
from dataclasses import dataclass
from pathlib import PurePosixPath

import numpy as np
import pytest
import torch
from PIL import Image

from latentprep.cache.strings import StringLists, Strings, join_lists, put_strings
from latentprep.keys import name_of, split_suffix, suffix_of
from latentprep.options import TextOptions
from latentprep.prepare import survey
from latentprep.prepare.source import sources
from latentprep.prepare.source.captions import add_captions
from latentprep.prepare.source.door import File
from latentprep.prepare.source.folder import Folder
from latentprep.prepare.source.listing import is_plain, list_images, stem
from latentprep.system import rare_collections
from tests.conftest import SMALL, gradient
from tests.test_tar import member, write_tar


@dataclass(frozen=True)
class Counted(Folder):
    """A folder that says which headers are asked for."""

    opened: tuple[list, ...] = ()

    def list(self):
        for found in super().list():
            yield found._replace(open=lambda found=found: self.note(found)) if isinstance(found, File) else found

    def note(self, file):
        self.opened[0].append(file.key)
        return file.open()


@pytest.fixture
def opened(monkeypatch):
    """Keys of the headers that were opened, in any folder."""
    keys: list[str] = []
    monkeypatch.setattr(sources, "SOURCES", [lambda where, without: Counted(str(where), without, (keys,))])
    return keys


@pytest.fixture
def encode(run, images, tmp_path, opened):
    """Encodes the images; gives the result, and the headers that were opened for it."""

    def encode_images(*options, source=images):
        opened.clear()
        result = run("encode", source, "--out", tmp_path / "c", *SMALL, *options)
        return result, sorted(opened)

    return encode_images


def shape_of(run, cache, key):
    return json.loads(run("inspect", cache, "--key", key, "--json").out)["original_size"]


def test_a_run_with_nothing_to_do_opens_no_header(encode):
    assert len(encode()[1]) == 8
    result, found = encode()
    assert "nothing to do" in result.out
    assert found == []


def test_only_what_is_new_or_has_changed_is_opened(run, encode, images, tmp_path):
    encode()
    before = {
        f"{kind}{n}.png": shape_of(run, tmp_path / "c", f"{kind}{n}.png") for kind in ("tall", "wide") for n in (2, 3)
    }
    gradient(64, 90).save(images / "new.png")
    gradient(96, 64).save(images / "tall1.png")
    os.utime(images / "wide1.png", ns=(1, 10**18))
    (images / "wide0.png").rename(images / "moved.png")
    result, found = encode()
    assert found == ["moved.png", "new.png", "tall1.png", "wide1.png"]
    assert "1 new, 1 changed, 1 renamed, 1 touched" in result.out
    assert shape_of(run, tmp_path / "c", "tall1.png") == [64, 96]
    assert {key: shape_of(run, tmp_path / "c", key) for key in before} == before
    assert encode()[1] == []


def test_an_image_that_is_back_is_known_no_more(encode, images, tmp_path):
    encode()
    (images / "wide0.png").rename(tmp_path / "wide0.png")
    assert encode()[1] == []
    (tmp_path / "wide0.png").rename(images / "wide0.png")
    result, found = encode()
    assert "1 returned" in result.out
    assert found == ["wide0.png"]


def test_a_lower_limit_is_kept_for_what_is_known(encode, images):
    gradient(1000, 1100).save(images / "large.png")
    encode()
    result, found = encode("--max-megapixels", 1)
    assert found == ["large.png"]
    assert "1 gone" in result.out
    assert "1 too_large" in result.out


def test_content_that_is_compared_has_its_own_size(run, encode, images, tmp_path):
    Image.new("RGB", (64, 96), "red").save(images / "x.bmp")
    encode()
    status = (images / "x.bmp").stat()
    Image.new("RGB", (96, 64), "blue").save(images / "x.bmp")
    os.utime(images / "x.bmp", ns=(status.st_atime_ns, status.st_mtime_ns))
    assert (images / "x.bmp").stat().st_size == status.st_size
    assert "nothing to do" in encode()[0].out  # as far as name, size and time say
    result, found = encode("--check-content")
    assert "1 changed" in result.out
    assert len(found) == 9
    assert shape_of(run, tmp_path / "c", "x.bmp") == [64, 96]


def test_what_was_skipped_is_opened_and_heals(encode, images):
    whole = (images / "wide0.png").read_bytes()
    (images / "wide0.png").write_bytes(whole[:-40])
    (images / "wide1.png").write_text("no picture")
    encode()
    result, found = encode()
    assert "nothing to do" in result.out
    assert found == ["wide0.png", "wide1.png"]
    (images / "wide0.png").write_bytes(whole)
    result, found = encode()
    assert "encoded  1 image" in result.out
    assert encode()[1] == ["wide1.png"]


def test_latents_that_are_lost_are_encoded_by_the_size_in_the_header(encode, tmp_path):
    encode("--shard-size", "30kB")
    path = min((tmp_path / "c" / "shards").glob("*.latents.*"))
    path.unlink()
    result, found = encode("--shard-size", "30kB")
    assert "encoded  2 images" in result.out
    assert len(found) == 2


def test_images_of_sets_are_known_by_their_set(run, images, tmp_path, opened):
    other = tmp_path / "other"
    other.mkdir()
    for n in range(2):
        gradient(64, 100 + n).save(other / f"wide{n}.png")
    sets = tmp_path / "sets.toml"
    sets.write_text(
        f'model = "tiny"\nresolution = 64\ndevice = "cpu"\n[[set]]\nsource = "{images}"\n[[set]]\nsource = "{other}"\n'
    )
    assert run("encode", sets, "--out", tmp_path / "c").code == 0
    opened.clear()
    assert "nothing to do" in run("encode", sets, "--out", tmp_path / "c").out
    assert opened == []
    gradient(64, 99).save(other / "wide1.png")
    assert "1 changed" in run("encode", sets, "--out", tmp_path / "c").out
    assert opened == ["wide1.png"]


def test_only_images_without_a_mask_are_known(run, images, tmp_path, opened):
    masks = tmp_path / "masks"
    masks.mkdir()
    Image.new("L", Image.open(images / "wide0.png").size, 51).save(masks / "wide0.png")
    options = ("--out", tmp_path / "c", *SMALL, "--weights", masks)
    run("encode", images, *options)
    opened.clear()
    assert "nothing to do" in run("encode", images, *options).out
    assert opened == ["wide0.png"]
    opened.clear()
    Image.new("L", Image.open(images / "wide1.png").size, 99).save(masks / "wide1.png")
    assert "1 changed" in run("encode", images, *options).out
    assert opened == ["wide0.png"]
    width, height = Image.open(images / "wide1.png").size
    assert shape_of(run, tmp_path / "c", "wide1.png") == [height, width]


def test_members_of_tars_are_known(run, images, tmp_path, monkeypatch):
    paths = sorted(images.glob("*.png"))
    write_tar(tmp_path / "tars" / "0.tar", [member(path.name, path.read_bytes()) for path in paths])
    options = ("--out", tmp_path / "c", *SMALL)
    run("encode", tmp_path / "tars", *options)
    monkeypatch.setattr("latentprep.prepare.source.listing.open_image", lambda _: pytest.fail("a header was read"))
    assert "nothing to do" in run("encode", tmp_path / "tars", *options).out


def test_a_cache_at_a_url_is_read_for_no_size(run, images, opened):
    options = ("--out", "memory://known/c", *SMALL)
    run("encode", images, *options)
    opened.clear()
    assert "nothing to do" in run("encode", images, *options).out
    assert len(opened) == 8


def test_each_size_is_placed_once(encode, monkeypatch):
    make, placed = survey.make_place, []

    def make_noted(*arguments):
        place = make(*arguments)
        return lambda size: placed.append(size) or place(size)

    monkeypatch.setattr(survey, "make_place", make_noted)
    encode()
    assert len(placed) == len(set(placed)) == 2


def test_items_are_not_twice_in_memory(images):
    listing = list_images(Folder(str(images)))
    assert len(add_captions(listing, TextOptions()).items) == 8
    assert listing.items == []


def test_keys_are_taken_apart_as_pathlib_does():
    random = np.random.default_rng(0)
    num_plain = 0
    for _ in range(20_000):
        key = "".join(random.choice(list("ab./.İ"), random.integers(1, 8)))
        assert is_plain(key) == {"", ".", ".."}.isdisjoint(key.split("/"))
        if not is_plain(key) or key.endswith("."):  # of which pathlib has changed its mind
            continue
        num_plain += 1
        path = PurePosixPath(key)
        assert (stem(key), split_suffix(key)) == (str(path.with_suffix("")), (str(path.with_suffix("")), path.suffix))
        assert (name_of(key), suffix_of(key)) == (path.name, path.suffix.lower())
    assert num_plain > 5000
    assert stem("a/./b.png") == "a/b"


def test_joined_lists_are_the_lists_and_no_part_of_the_file():
    parts = []
    for texts in ([["a", "bü"], ["c"]], [["d"]]):
        tensors: dict[str, torch.Tensor] = {}
        put_strings(tensors, "x", [text for own in texts for text in own])
        rows = torch.from_numpy(np.cumsum([0, *map(len, texts)]))
        parts.append(StringLists(Strings(tensors, "x"), "x_rows", rows))
    joined = join_lists(parts)
    parts[0].strings.data[:] = 0
    assert list(joined) == [["a", "bü"], ["c"], ["d"]]


def test_the_collector_is_as_it_was_afterwards():
    before = gc.get_threshold()
    with rare_collections():
        assert gc.get_threshold()[0] > before[0]
    assert gc.get_threshold() == before
