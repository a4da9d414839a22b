"""Guards that no other test misses if they go: each by itself, in the smallest run that needs it."""

import dataclasses
import os
import shutil
import stat
import time
from pathlib import Path

import pytest
import torch
from PIL import Image

from latentprep import LatentDataset
from latentprep.cache import compact as compacting
from latentprep.cache import readers
from latentprep.cache.compact import would_rewrite
from latentprep.cache.group import check_numbers
from latentprep.cache.leftovers import clear_orphans
from latentprep.cache.lock import hold
from latentprep.cache.manifest import open_manifest
from latentprep.cache.schema import TEXT
from latentprep.cache.shard import Shard
from latentprep.cache.storage import Stamp, Storage
from latentprep.cache.strings import check_offsets
from latentprep.errors import UserError
from latentprep.prepare.models.vae_encoder import VaeEncoder
from latentprep.prepare.source.folder import Folder
from latentprep.read import counters
from latentprep.read.batch import LatentBatch
from latentprep.read.weight import rescale_weight
from tests.conftest import SMALL, gradient
from tests.test_encode import files, rows
from tests.test_incremental import SHARDS, same_rows, touch
from tests.test_skips import break_png

# EXIF orientation -> how a picture lies in its file (TIFF 6.0, tag 274)
ORIENTED = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_90,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_270,
}


def test_an_edit_of_equal_length_is_no_touch(run, images, tmp_path):
    image = gradient(64, 64)
    image.save(images / "same.bmp")
    options = ("encode", images, "--out", tmp_path / "c", *SMALL)
    assert run(*options).code == 0
    length = (images / "same.bmp").stat().st_size
    image.transpose(Image.Transpose.ROTATE_180).save(images / "same.bmp")
    touch(images / "same.bmp")
    assert (images / "same.bmp").stat().st_size == length
    assert "changed  same.bmp\n" in run(*options, "--dry-run", "--list").out
    assert "encoded  1 image" in run(*options).out
    assert run("verify", tmp_path / "c", "--source", images).code == 0


@pytest.mark.parametrize("option", [("--clip-skip", 2), ("--emphasis",), ("--max-tokens", 150)])
@pytest.mark.parametrize("is_first", [True, False])
def test_each_setting_of_the_text_encoder_makes_cond_anew(run, images, tmp_path, model, option, is_first):
    (images / "tall0.txt").write_text("a (red:1.5) cat")
    plain = ("encode", images, "--model", model, *SMALL[2:])
    before, after = ((*option,), ()) if is_first else ((), (*option,))
    assert run(*plain, "--out", tmp_path / "c", *before).code == 0
    assert run(*plain, "--out", tmp_path / "c", *after).code == 0
    assert run(*plain, "--out", tmp_path / "fresh", *after).code == 0
    assert files(tmp_path / "c") == files(tmp_path / "fresh")


def test_what_a_failed_unit_leaves_behind_goes_to_no_other(run, images, tmp_path, monkeypatch):
    options = ("encode", images, *SMALL, "--shard-size", "60kB", "--batch-size", 1, "--workers", 1)
    assert run(*options, "--out", tmp_path / "whole").code == 0
    encode, calls = VaeEncoder.start, []

    def fails_once(self, pixels):
        calls.append(1)
        if len(calls) == 1:
            raise RuntimeError("as if")
        return encode(self, pixels)

    monkeypatch.setattr(VaeEncoder, "start", fails_once)
    result = run(*options, "--out", tmp_path / "c")
    assert result.code == 1
    assert result.out.count("FAILED") == 1
    whole, found = rows(tmp_path / "whole"), rows(tmp_path / "c")
    assert 0 < len(found) < len(whole)
    same_rows(found, {key: whole[key] for key in found})


@pytest.fixture
def cache(run, images, tmp_path) -> Path:
    assert run("encode", images, "--out", tmp_path / "c", *SMALL, *SHARDS, "--flip").code == 0
    return tmp_path / "c"


@pytest.fixture
def with_dead_rows(run, images, cache) -> Path:
    for name in ("tall0", "wide0", "wide1"):
        (images / f"{name}.png").unlink()
    assert run("encode", images, "--out", cache, *SMALL, *SHARDS, "--flip").code == 0
    return cache


def test_compact_waits_for_the_lock(run, with_dead_rows):
    with hold(Storage(with_dead_rows)):
        before = files(with_dead_rows / "shards")
        result = run("compact", with_dead_rows, "--min-share", 0)
        assert result.code == 1
        assert "another latentprep run is writing it" in result.err
        assert files(with_dead_rows / "shards") == before


def test_compact_deletes_nothing_before_it_has_committed(run, with_dead_rows, monkeypatch):
    before = files(with_dead_rows)

    def fails(*_):
        raise UserError("the disk is full")

    monkeypatch.setattr(compacting, "commit", fails)
    result = run("compact", with_dead_rows, "--min-share", 0)
    assert result.code == 1
    assert before.items() <= files(with_dead_rows).items()


def test_a_file_and_its_folder_are_on_disk_before_it_counts(tmp_path, monkeypatch):
    done = []
    fsync, replace = os.fsync, os.replace

    def sync(descriptor):
        done.append("folder" if stat.S_ISDIR(os.fstat(descriptor).st_mode) else "file")
        fsync(descriptor)

    def rename(one, other):
        done.append("rename")
        replace(one, other)

    monkeypatch.setattr(os, "fsync", sync)
    monkeypatch.setattr(os, "replace", rename)
    Storage(tmp_path).write_atomic("a/b", b"bytes")
    assert done == ["file", "rename", "folder"]


def test_strict_counts_the_skips_of_a_finished_cache(run, images, tmp_path):
    (images / "bad.png").write_bytes((images / "wide0.png").read_bytes()[:-40])
    options = ("encode", images, "--out", tmp_path / "c", *SMALL)
    assert run(*options).code == 0
    result = run(*options, "--strict")
    assert "nothing to do" in result.out
    assert result.code == 1


@pytest.mark.parametrize("orientation", range(2, 9))
def test_a_mask_is_turned_as_its_exif_says(run, images, tmp_path, orientation):
    mask = Image.linear_gradient("L").resize((128, 40)).rotate(30)
    weights = []
    for name, lying, exif in (("plain", mask, None), ("turned", mask.transpose(ORIENTED[orientation]), orientation)):
        folder = tmp_path / name
        folder.mkdir()
        tags = Image.Exif()
        if exif is not None:
            tags[274] = exif
        lying.save(folder / "wide0.png", exif=tags)
        shutil.rmtree(tmp_path / "c", ignore_errors=True)
        assert run("encode", images, "--out", tmp_path / "c", *SMALL, "--weights", folder, "--no-cond").code == 0
        data = LatentDataset(tmp_path / "c", use_weight="raw", include_cond=False)
        weights.append(next(data[n].weight for n in range(len(data)) if data.key(n) == "wide0.png"))
    assert weights[0].std() > 0.1
    assert torch.equal(*weights)


def test_each_weight_map_is_rescaled_by_itself(cache):
    maps = torch.stack([torch.arange(12.0).reshape(1, 3, 4) ** n / 9 + n for n in (1, 2, 3)])
    assert torch.equal(rescale_weight(maps), torch.cat([rescale_weight(row[None]) for row in maps]))
    assert torch.allclose(rescale_weight(maps).mean((1, 2, 3)), torch.ones(3))
    assert torch.equal(rescale_weight(maps).amin((1, 2, 3)), torch.zeros(3))
    data = LatentDataset(cache, use_weight=True)
    tall = [n for n in range(len(data)) if data.key(n).startswith("tall")]
    assert torch.equal(data.__getitems__(tall).weight, torch.cat([data[n].weight for n in tall]))


def test_to_moves_every_tensor(cache):
    data = LatentDataset(cache, latent_sampling_method="random", use_weight=True)
    batch = data[0]
    assert batch.latent_sample is not None  # drawn, so that it has to be moved too
    batch._made_cond = {"prompt_embeds": torch.zeros(1, 3, 2)}
    here, moved = vars(batch), vars(batch.to("meta"))

    def devices(value):
        tensors = value.values() if isinstance(value, dict) else [value]
        return {tensor.device.type for tensor in tensors if isinstance(tensor, torch.Tensor)}

    with_tensors = {field.name for field in dataclasses.fields(LatentBatch) if devices(here[field.name])}
    assert {name for name in with_tensors if devices(moved[name]) != {"meta"}} == set()
    assert len(with_tensors) >= 11
    assert all(devices(here[name]) == {"cpu"} for name in with_tensors)


def test_no_two_choices_share_a_counter(cache):
    purposes = [getattr(counters, name) for name in ("FLIP", "NOISE", "PROMPT", "CAPTION", "DROP", "CROP")]
    assert len(set(purposes)) == len(purposes)
    data = LatentDataset(cache, flip_p=0.5, caption_dropout=0.5, repeats=100)
    wide = [n for n in range(len(data)) if data.key(n).startswith("wide")]
    batch = data.__getitems__(wide)
    dropped = torch.tensor([text == "" for text in batch.cond_text])
    for one in (True, False):
        for other in (True, False):
            assert 0.15 < ((batch.flipped == one) & (dropped == other)).float().mean() < 0.35


def test_whoever_takes_the_lock_looks_whose_folder_it_is(tmp_path):
    (tmp_path / "shards").mkdir()
    (tmp_path / "shards" / "photos.zip").write_bytes(b"mine")
    with pytest.raises(UserError, match="holds shards, which latentprep did not write"), hold(Storage(tmp_path)):
        pass
    assert files(tmp_path) == {"shards/photos.zip": b"mine"}


@pytest.mark.parametrize("name", ["skipped.jsonl", ".lock", ".readers"])
def test_a_link_is_not_ours_though_what_it_leads_to_is_empty(tmp_path, name):
    (tmp_path / "elsewhere").write_bytes(b"")
    (tmp_path / "c").mkdir()
    (tmp_path / "c" / name).symlink_to(tmp_path / "elsewhere")
    with pytest.raises(UserError, match=f"holds {name}, which latentprep did not write"), hold(Storage(tmp_path / "c")):
        pass


def test_no_orphan_of_a_remote_is_cleared(run, cache, monkeypatch):
    """Another run may be writing it: there is no lock."""
    manifest = open_manifest(Storage(cache))
    remote = Storage(f"memory://orphans{os.getpid()}")
    remote.write_atomic("shards/abc.latents.safetensors", b"just written")
    now = time.time()
    for days in (0, 2, 4):
        monkeypatch.setattr(readers.time, "time", lambda days=days: now + days * 86_400)
        assert clear_orphans(remote, manifest) == (0, 0)
    assert remote.exists("shards/abc.latents.safetensors")


def test_a_shard_with_just_the_share_of_dead_rows_is_rewritten():
    def shard(num_dead):
        return Shard("u", (("g", 5, (4, 8, 8)),), Stamp(5, ""), "t", Stamp(1, ""), tuple(range(num_dead)))

    assert [would_rewrite(shard(dead), 0.4) for dead in range(4)] == [False, False, True, True]
    assert not would_rewrite(shard(0), 0.0)


@pytest.mark.parametrize("offsets", [[0, 5, 2, 6], [1, 6], [0, 5], [0, 7], []])
def test_offsets_rise_from_the_start_to_the_end(offsets):
    found = torch.tensor(offsets, dtype=torch.int64)
    with pytest.raises(ValueError, match="offsets"):
        check_offsets("key_offsets", found, 6)
    with pytest.raises(ValueError, match="expected int64 offsets"):
        check_offsets("key_offsets", torch.tensor([0, 6], dtype=torch.int32), 6)
    check_offsets("key_offsets", torch.tensor([0, 0, 2, 2, 6]), 6)


def test_compact_keeps_every_prompt_with_its_cond(run, images, tmp_path):
    options = ("encode", images, "--out", tmp_path / "c", *SMALL)
    assert run(*options).code == 0
    (images / "tall0.png").unlink()
    assert run(*options).code == 0

    def prompts():
        data = LatentDataset(tmp_path / "c")
        return {data.key(n): (data[n].cond_text, data[n].cond["prompt_embeds"]) for n in range(len(data))}

    before = prompts()
    assert run("compact", tmp_path / "c", "--min-share", 0).code == 0
    after = prompts()
    assert before.keys() == after.keys()
    assert len({text[0] for text, _ in before.values()}) > 2
    for key, (text, cond) in before.items():
        assert after[key][0] == text
        assert torch.equal(after[key][1], cond)


def test_a_field_without_values_is_refused():
    (field,) = [field for field in TEXT if field.name == "nbytes"]
    with pytest.raises(ValueError, match=r"x/nbytes is torch.int64 \[0\], expected \[N\]"):
        check_numbers(field, torch.zeros(0, dtype=torch.int64), "x/nbytes", {})


def test_a_row_that_counts_goes_before_a_dead_row_of_the_same_content(run, images, tmp_path):
    shutil.copy2(images / "wide0.png", images / "copy.png")
    options = ("encode", images, "--out", tmp_path / "c", *SMALL)
    assert run(*options).code == 0
    (images / "copy.png").unlink()
    assert run(*options).code == 0
    (images / "wide0.png").rename(images / "moved.png")
    assert run(*options, "--dry-run").out.startswith("renamed  1 image: moved.png (was wide0.png): ")


def test_a_skipped_file_of_equal_length_and_another_time_is_tried_again(run, images, tmp_path):
    good = (images / "wide0.png").read_bytes()
    break_png(images / "wide0.png")
    options = ("encode", images, "--out", tmp_path / "c", *SMALL)
    assert "skipped  1 unreadable" in run(*options).out
    (images / "wide0.png").write_bytes(good)
    touch(images / "wide0.png")
    assert "encoded  1 image" in run(*options).out
    assert (tmp_path / "c" / "skipped.jsonl").read_bytes() == b""


def test_content_that_cannot_be_read_now_is_no_change(run, images, tmp_path, monkeypatch):
    options = ("encode", images, "--out", tmp_path / "c", *SMALL)
    assert run(*options).code == 0
    read = Folder.read
    monkeypatch.setattr(Folder, "read", lambda self, key, limit: read(self, key.replace("tall0.png", "none"), limit))
    assert "nothing to do" in run(*options, "--check-content").out
