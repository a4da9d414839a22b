"""cache/: the format's bytes, round trips, atomic writes, and files that are not what they should be."""

import hashlib
import json
import os
from pathlib import Path

import fsspec
import numpy as np
import pytest
import torch
from fsspec.asyn import AsyncFileSystem

from latentprep.cache import manifest as manifests
from latentprep.cache.group import LatentGroup, TextGroup
from latentprep.cache.latents import Latents, open_latents, write_latents
from latentprep.cache.manifest import LatentFacts, MadeWith, Manifest, commit, open_manifest, read_skips
from latentprep.cache.normalization import Normalization
from latentprep.cache.schema import LATENTS
from latentprep.cache.shard import Shard
from latentprep.cache.storage import Stamp, Storage
from latentprep.cache.text import Text, open_text, write_text
from latentprep.errors import UserError
from latentprep.options import Geometry, ImageOptions
from latentprep.recipe import LatentsRecipe, Recipe, TextRecipe
from latentprep.records import Row, Skip

KEYS = ["a/b.jpg", "é.png", "bad-\udcff.png", "x..y.png"]


def latent_group(label="h16w8", rows=4, **changes):
    fields = {
        "latent_mean": torch.arange(rows * 16, dtype=torch.float16).reshape(rows, 1, 4, 2, 2),
        "latent_std": torch.full((rows, 1, 4, 2, 2), 0.5, dtype=torch.float16),
        "weight": torch.ones(rows, 1, 2, 2, dtype=torch.float16),
        "original_size": torch.full((rows, 2), 9, dtype=torch.int32),
        "resized_size": torch.full((rows, 1, 2), 8, dtype=torch.int32),
        "crop": torch.zeros(rows, 1, 4, dtype=torch.int32),
        "flipped": torch.zeros(1, dtype=torch.uint8),
        "digest": torch.zeros(rows, 16, dtype=torch.uint8),
        "key": KEYS[:rows],
        "nbytes": torch.arange(rows),
        "version": torch.arange(rows) * 10**14,
    }
    return LatentGroup(label, **{name: value for name, value in {**fields, **changes}.items() if value is not None})


def text(rows=4, **metadata):
    numbers = np.arange(rows, dtype=np.int64)
    captions = [["one", ""], ["zwei"], [], ["ü"]][:rows]
    prompt_of = np.array([[0], [1], [0], [1]], np.int32)[:rows]
    group = TextGroup(
        "h16w8", key=KEYS[:rows], caption=captions, prompt_of=prompt_of, nbytes=numbers, version=numbers * 10**15
    )
    cond = {"prompt_embeds": torch.arange(12, dtype=torch.float16).reshape(2, 3, 2)}
    return Text([group], ["first", "second ☃"], cond, np.array([4, 9], np.int32), 77, metadata)


def test_header_and_bytes_of_format_2_are_pinned(tmp_path):
    storage = Storage(tmp_path)
    write_latents(storage, "u", Latents([latent_group()], {"recipe": "r", "scaling_factor": 0.5}))
    data = (tmp_path / "shards" / "u.latents.safetensors").read_bytes()
    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + length])
    assert header.pop("__metadata__") == {
        "latentprep": '{"format":2,"groups":[["h16w8",4]],"kind":"latents","recipe":"r","scaling_factor":0.5,'
        '"seal":"66e4368062399066432bae3ca8b9a66f"}'
    }
    assert {name.removeprefix("h16w8/"): (t["dtype"], t["shape"]) for name, t in header.items()} == {
        "latent_mean": ("F16", [4, 1, 4, 2, 2]),
        "latent_std": ("F16", [4, 1, 4, 2, 2]),
        "weight": ("F16", [4, 1, 2, 2]),
        "original_size": ("I32", [4, 2]),
        "resized_size": ("I32", [4, 1, 2]),
        "crop": ("I32", [4, 1, 4]),
        "flipped": ("U8", [1]),
        "digest": ("U8", [4, 16]),
        "key": ("U8", [30]),
        "key_offsets": ("I64", [5]),
        "nbytes": ("I64", [4]),
        "version": ("I64", [4]),
    }
    write_text(storage, "u", "t", text())
    data += (tmp_path / "shards" / "u.t.text.safetensors").read_bytes()
    assert hashlib.sha256(data).hexdigest() == "f1478888e027d0288f6bb94e931cea2f39d2815319d451d5b0daab8211eb6cd6"


def test_round_trip_of_both_files(tmp_path):
    storage = Storage(tmp_path)
    write_latents(storage, "u", Latents([latent_group(), latent_group("h8w16", weight=None, latent_std=None)], {}))
    write_text(storage, "u", "t", text(recipe="r"))
    groups = (("h16w8", 4, (4, 2, 2)), ("h8w16", 4, (4, 2, 2)))
    latents = open_latents(storage, "u", groups)
    words = open_text(storage, "u", "t", groups[:1])
    assert latents.table() == groups
    for field in LATENTS:
        one, other = (getattr(group, field.name) for group in (latents.groups[0], latent_group()))
        if other is None:
            assert one is None
        else:
            assert torch.equal(one, other) if field.name != "key" else list(one) == other
    assert latents.groups[1].weight is None
    assert latents.groups[1].latent_std is None
    assert list(words.groups[0].key) == KEYS
    assert list(words.groups[0].caption) == [["one", ""], ["zwei"], [], ["ü"]]
    assert list(words.prompt) == ["first", "second ☃"]
    assert (words.prompt[1], words.prompt[:1]) == ("second ☃", ["first"])
    assert torch.equal(words.cond["prompt_embeds"], text().cond["prompt_embeds"])
    assert words.max_tokens == 77
    assert words.metadata["recipe"] == "r"
    assert list(words.rows())[3] == Row(KEYS[3], 3, 3 * 10**15, ("ü",))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_every_store_dtype_can_be_read(tmp_path, dtype):
    storage = Storage(tmp_path)
    group = latent_group(latent_mean=latent_group().latent_mean.to(dtype))
    write_latents(storage, "u", Latents([group], {}))
    assert open_latents(storage, "u").groups[0].latent_mean.dtype == dtype


@pytest.mark.parametrize("shift", range(8))
def test_tensors_at_odd_addresses_are_read_too(tmp_path, shift):
    """safetensors pads its header so that all is aligned; other writers need not."""
    storage = Storage(tmp_path)
    write_text(storage, "u", "t", text())
    path = tmp_path / "shards" / "u.t.text.safetensors"
    data = path.read_bytes()
    length = int.from_bytes(data[:8], "little")
    path.write_bytes((length + shift).to_bytes(8, "little") + data[8 : 8 + length] + b" " * shift + data[8 + length :])
    found = open_text(storage, "u", "t")
    assert list(found.groups[0].key) == KEYS
    assert [found.prompt[n] for n in range(2)] == ["first", "second ☃"]
    assert found.groups[0].version.tolist() == [0, 10**15, 2 * 10**15, 3 * 10**15]
    assert found.cond["prompt_embeds"].sum() == 66


def test_writing_twice_gives_the_same_bytes(tmp_path):
    for name in ("a", "b"):
        write_text(Storage(tmp_path / name), "u", "t", text(one=1, two={"b": 1, "a": 2}, three=[3]))
    assert (tmp_path / "a/shards/u.t.text.safetensors").read_bytes() == (
        tmp_path / "b/shards/u.t.text.safetensors"
    ).read_bytes()


@pytest.mark.parametrize("damage", ["truncated", "text", "empty", "newer", "foreign"])
def test_what_is_not_a_shard_is_one_clear_line_with_its_name(tmp_path, damage):
    from safetensors.torch import save_file

    storage = Storage(tmp_path)
    write_latents(storage, "u", Latents([latent_group()], {}))
    path = tmp_path / "shards" / "u.latents.safetensors"
    if damage == "truncated":
        path.write_bytes(path.read_bytes()[:-7])
    elif damage == "text":
        path.write_text("this is no safetensors file")
    elif damage == "empty":
        path.write_bytes(b"")
    elif damage == "newer":
        save_file({"x": torch.zeros(1)}, path, {"latentprep": '{"format": 3}'})
    else:
        save_file({"x": torch.zeros(1)}, path)
    with pytest.raises(UserError) as error:
        open_latents(storage, "u")
    assert str(path) in str(error.value)
    assert "\n" not in str(error.value)
    if damage == "newer":
        assert "format 3, this latentprep reads up to format 2. Upgrade latentprep." in str(error.value)


def test_missing_shard_is_named(tmp_path):
    with pytest.raises(UserError, match=r"shards/u.latents.safetensors: missing"):
        open_latents(Storage(tmp_path), "u")


def test_write_is_atomic_where_it_fails(tmp_path, monkeypatch):
    storage = Storage(tmp_path)
    storage.write_atomic("shards/x", b"old")

    def full(descriptor):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(UserError, match=r"x: cannot write \(No space left on device\)"):
        storage.write_atomic("shards/x", b"new")
    assert (tmp_path / "shards" / "x").read_bytes() == b"old"
    assert [path.name for path in (tmp_path / "shards").iterdir()] == ["x"]


def test_delete_says_where_it_cannot(tmp_path, monkeypatch):
    storage = Storage(tmp_path)
    storage.write_atomic("shards/x", b"old")
    storage.delete("shards/never-there")

    def read_only(path):
        raise OSError(30, "Read-only file system")

    monkeypatch.setattr(os, "remove", read_only)
    with pytest.raises(UserError, match=r"x: cannot delete \(Read-only file system\)."):
        storage.delete("shards/x")


def test_cache_on_another_file_system(tmp_path):
    storage = Storage("memory://somewhere/cache")
    write_latents(storage, "u", Latents([latent_group()], {"recipe": "r"}))
    found = open_latents(storage, "u")
    assert torch.equal(found.groups[0].latent_mean, latent_group().latent_mean)
    assert found.metadata["recipe"] == "r"
    assert storage.names("shards") == ["shards/u.latents.safetensors"]


RECIPE = Recipe(
    LatentsRecipe("x", Geometry("native"), ImageOptions(), ("plain",), "float32", "mean+std", "float16", 64),
    TextRecipe(placeholder="", prompts_per_image=1, shuffle_tags=False, tag_drop_out=0.0, keep_tags=0, wildcards=False),
)
FACTS = LatentFacts(Normalization((0.0,), (0.5,)), 8, 4, ("plain",))
MADE_WITH = MadeWith("m", config="c", masks="m")


def manifest(**changes):
    groups = (("h16w8", 3, (4, 2, 1)), ("h8w16", 1, (4, 1, 2)))
    shards = [
        Shard("u1", groups, Stamp(10, "aa"), "t1", Stamp(20, "bb"), dead=(1, 3)),
        Shard("u2", groups[:1], Stamp(10, "cc"), "t2", Stamp(2, "dd")),
    ]
    return Manifest(**{"recipe": RECIPE, "latent": FACTS, "made_with": MADE_WITH, "shards": shards, **changes})


def test_manifest_round_trip(tmp_path):
    storage = Storage(tmp_path)
    skips = [Skip("b", "too_small", "1x1 < 2", 5, 6), Skip("a\n", "unreadable", "é")]
    commit(storage, manifest(), skips)
    found = open_manifest(storage)
    assert found.shards == manifest().shards
    assert (found.num_images, found.num_dead, found.num_skipped) == (5, 2, 2)
    assert [rows.tolist() for rows in found.shards[0].live_rows()] == [[0, 2], []]
    assert read_skips(storage) == [skips[1], skips[0]]
    assert found.skipped_file == storage.stamp("skipped.jsonl")
    commit(storage, manifest(shards=[]), [])
    assert open_manifest(storage).shards == []


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "not a latent cache, it has no cache.json. Make one with latentprep encode."),
        ("{", "cannot be read"),
        ("[" * 100_000, "cannot be read"),
        ("[]", "not a manifest"),
        ("{}", "no format number"),
        ('{"format": true}', "no format number"),
        ('{"format": 7}', "format 7, this latentprep reads up to format 2. Upgrade latentprep."),
        ('{"format": 2}', "changed after latentprep wrote it"),
    ],
)
def test_manifests_that_are_none(tmp_path, content, message):
    if content is not None:
        (tmp_path / manifests.NAME).write_text(content)
    with pytest.raises(UserError) as error:
        open_manifest(Storage(tmp_path))
    assert message in str(error.value)
    assert str(tmp_path) in str(error.value)


def test_every_flipped_byte_of_a_manifest_is_found(tmp_path):
    storage = Storage(tmp_path)
    commit(storage, manifest(), [])
    path = tmp_path / manifests.NAME
    good = path.read_bytes()
    for place in range(len(good)):
        path.write_bytes(good[:place] + bytes([good[place] ^ 1]) + good[place + 1 :])
        with pytest.raises(UserError, match=r"cache\.json"):
            open_manifest(storage)


def sealed(tmp_path, change):
    """A manifest whose JSON was changed by someone who knows how it is sealed."""
    storage = Storage(tmp_path)
    commit(storage, manifest(), [])
    data = json.loads((tmp_path / manifests.NAME).read_text())
    change(data)
    del data["blake2b"]
    body = json.dumps(data)[:-1] + ",\n"
    (tmp_path / manifests.NAME).write_text(body + manifests._seal(body))
    return storage


@pytest.mark.parametrize(
    ("path", "value"),
    [
        (["shards", 0, "id"], "../../etc/passwd"), (["shards", 0, "text_id"], "a/b"), (["shards", 0, "id"], 7),
        (["shards", 0, "id"], "u2"), (["shards", 0, "groups"], []), (["shards", 0, "groups", 0, 1], -3),
        (["shards", 0, "groups", 0, 1], 10**12), (["shards", 0, "groups", 0, 2], [4, 2]),
        (["shards", 0, "groups", 0, 2, 0], 5), (["shards", 0, "latents_file"], [1]), (["shards", 0, "text_file"], None),
        (["shards", 0, "latents_file", "nbytes"], -1), (["shards", 0, "latents_file", "blake2b"], None),
        (["shards", 0], None), (["shards"], {}), (["shards", 0, "dead"], [4]), (["shards", 0, "dead"], [-1]),
        (["shards", 0, "dead"], [1, 1]), (["shards", 0, "dead"], {}), (["latent", "normalization"], "x"),
        (["latent", "normalization", "scale"], [float("nan")]), (["latent", "normalization", "scale"], [0]),
        (["latent", "normalization", "scale"], [1.0, 2.0]), (["latent", "normalization", "shift"], 0.5),
        (["latent", "normalization", "patch"], 3), (["latent", "normalization", "patch"], True),
        (["latent", "factor"], 0), (["latent", "views"], ["plain", "inside out"]), (["recipe"], None),
        (["recipe", "latents", "store_dtype"], "int8"), (["recipe", "latents", "geometry"], []),
        (["recipe", "latents", "store"], "std"), (["recipe", "latents", "images", "draft"], "yes"),
        (["recipe", "latents", "views"], ["plain", "flipped"]), (["recipe", "text"], {}),
        (["made_with", "config"], 5), (["made_with", "masks"], []), (["recipe", "latents", "tiling"], "x"),
        (["recipe", "latents", "tiling"], 1), (["made_with"], {}), (["num_skipped"], None), (["skipped_file"], 5),
        (["uncond"], {}), (["uncond"], {"id": "../x", "file": {"nbytes": 1, "blake2b": ""}}),
    ],
)  # fmt: skip
def test_crafted_manifests_are_refused_with_the_name_of_the_file(tmp_path, path, value):
    def change(data):
        for step in path[:-1]:
            data = data[step]
        data[path[-1]] = value

    storage = sealed(tmp_path, change)
    with pytest.raises(UserError, match=r"cache\.json: not a complete manifest"):
        open_manifest(storage)


def test_a_manifest_without_measure_is_not_read(tmp_path):
    with open(tmp_path / manifests.NAME, "wb") as file:
        file.truncate(2**33)
    with pytest.raises(UserError, match=r"cache\.json: cannot be read \(8.6 GB is more than any latentprep writes\)"):
        open_manifest(Storage(tmp_path))


@pytest.mark.parametrize("name", ["cache.json", "shards/u.latents.safetensors"])
def test_a_pipe_in_the_place_of_a_file_is_not_waited_for(tmp_path, name):
    storage = Storage(tmp_path)
    (tmp_path / "shards").mkdir()
    os.mkfifo(tmp_path / name)
    with pytest.raises(UserError, match="not a regular file"):
        open_manifest(storage) if name == "cache.json" else open_latents(storage, "u")


def test_unfinished_cache_says_how_to_finish_it(tmp_path):
    write_latents(Storage(tmp_path), "u", Latents([latent_group()], {}))
    with pytest.raises(UserError, match=r"an unfinished cache. Run the same latentprep encode again"):
        open_manifest(Storage(tmp_path))


def test_only_storage_opens_files_for_writing():
    package = Path(manifests.__file__).parent.parent
    for path in package.rglob("*.py"):
        # the last three: into temporary folders
        ours = ("storage.py", "lock.py", "demo.py", "clip_tokenizer.py", "load_tokenizer.py", "samples.py")
        if path.name not in ours:
            source = path.read_text()
            assert not any(
                call in source for call in (".write_bytes(", ".write_text(", ', "wb"', ', "w"', "save_file(")
            ), path


def test_a_remote_of_fsspecs_asynchronous_kind_has_folders():
    """s3fs, gcsfs and adlfs define _ls alone; fsspec puts ls on each instance."""

    class Remote(AsyncFileSystem):
        protocol = "asyncremote"

        async def _ls(self, path, detail=True, **_options):
            raise FileNotFoundError(path)

    fsspec.register_implementation("asyncremote", Remote, clobber=True)
    storage = Storage("asyncremote://bucket/cache")
    assert not storage.is_local
    assert storage.sizes() == {}
