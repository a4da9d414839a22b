"""Bounds, seeds and promises between files that no other test misses, each by itself."""

import dataclasses
import json
import os
import pickle
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

from latentprep import BucketBatchSampler, LatentDataset
from latentprep.cache.manifest import commit, open_manifest
from latentprep.cache.storage import Storage
from latentprep.errors import UserError
from latentprep.geometry import Geometry
from latentprep.look import verify as verifying
from latentprep.look import verify_cond
from latentprep.options import ImageOptions
from latentprep.prepare.images.load import LoadOptions, load_pixels, place_weight
from latentprep.prepare.models.vae_encoder import Posterior, VaeEncoder
from latentprep.prepare.plan.buckets import make_place
from latentprep.prepare.plan.plan import RowBytes, cut_rows
from latentprep.prepare.source.sources import open_source
from latentprep.prepare.work.cond import check_finite
from latentprep.prompts import make_prompt
from latentprep.read.batch import cond_model_elsewhere
from latentprep.read.order import Steps
from latentprep.recipe import LatentsRecipe
from latentprep.records import Item, Placement, Skip
from tests.conftest import SMALL, read_item
from tests.test_incremental import SHARDS


@pytest.fixture
def cache(run, images, tmp_path) -> Path:
    assert run("encode", images, "--out", tmp_path / "c", *SMALL, *SHARDS, "--flip").code == 0
    return tmp_path / "c"


ROOT = Path(__file__).parent.parent


def test_a_shard_may_be_filled_to_the_last_byte():
    rows = [(Item(f"{n}", (64, 64), 1, 1), Placement((64, 64), (64, 64), (0, 0, 64, 64))) for n in range(5)]
    cost = RowBytes(8, 100, 8)
    assert cost.largest((64, 64)) == 512
    assert [len(run) for run in cut_rows(rows, cost, 2 * 512)] == [2, 2, 1]
    assert [len(run) for run in cut_rows(rows, cost, 2 * 512 - 1)] == [1] * 5


def test_a_std_that_is_not_finite_is_no_row(run, images, tmp_path, monkeypatch):
    encode = VaeEncoder.start

    def overflows(self, pixels):
        found = encode(self, pixels)
        return Posterior(found.mean, found.std * torch.inf)

    monkeypatch.setattr(VaeEncoder, "start", overflows)
    result = run("encode", images, "--out", tmp_path / "c", *SMALL)
    assert result.code == 1
    assert "none of its 8 images can be used" in result.err
    assert "non_finite" in result.err


def test_a_batch_is_never_larger_than_asked_for(run, images, tmp_path, monkeypatch):
    encode, sizes = VaeEncoder.start, []

    def counts(self, pixels):
        sizes.append(len(pixels))
        return encode(self, pixels)

    monkeypatch.setattr(VaeEncoder, "start", counts)
    assert run("encode", images, "--out", tmp_path / "c", *SMALL, "--batch-size", 3).code == 0
    assert sizes == [3, 1, 3, 1]  # two buckets of four


@pytest.mark.parametrize("change", [{"size": (80, 65)}, {"nbytes": 5}])
def test_an_image_that_is_not_what_was_listed_is_a_skip(images, change):
    item = read_item(images / "tall0.png", "tall0.png")
    geometry = Geometry.from_options(resolution="64", bucket_step=32)
    recipe = LatentsRecipe.of(
        vae="", geometry=geometry, images=ImageOptions(), flip=False, dtype="float32", store="mean",
        store_dtype="float32",
    )  # fmt: skip
    options = LoadOptions.from_recipe(open_source(images), 8, None, recipe)
    placement = make_place(geometry, 8)(item.size)
    assert not isinstance(load_pixels(item, placement, options), Skip)
    found = load_pixels(dataclasses.replace(item, **change), placement, options)
    assert (found.reason, "when listed, now" in found.detail) == ("changed", True)


def test_weights_are_averages_of_areas():
    stripes = Image.new("L", (64, 64))
    stripes.putdata([255 * (x % 2) for _ in range(64) for x in range(64)])
    box = (0, 0, 32, 32)
    weight = place_weight(stripes, (32, 32), box, [box], 8)
    assert abs(weight - 0.5).max() < 0.01


def test_cond_that_is_not_finite_stops_the_run():
    good, bad = torch.zeros(2, 3, 4), torch.zeros(2, 3, 4)
    bad[1, 2, 3] = torch.inf
    for encoded, stored, dtype, message in (
        (good, bad, "float32", r"^--store-dtype float16: cannot hold the a of 'two'"),
        (bad, bad, "float32", r"^--model: the text encoder in a/b gives no finite numbers for 'two', even in float32"),
        (bad, bad, "float16", r"^--dtype float16: the text encoder in a/b overflows for 'two'.* bfloat16 or float32.$"),
        (
            bad,
            bad,
            "bfloat16",
            r"^--dtype bfloat16: the text encoder in a/b overflows for 'two'\. Use --dtype float32\.$",
        ),
    ):
        recipe = SimpleNamespace(store_dtype="float16", dtype=dtype)
        with pytest.raises(UserError, match=message):
            check_finite(["one", "two"], {"a": encoded}, {"a": stored}, recipe, "a/b")
    check_finite(["one", "two"], {"a": good}, {"a": good}, recipe, "a/b")


def test_what_is_gone_has_no_prompt_in_a_new_text_file(run, images, tmp_path):
    options = ("encode", images, "--out", tmp_path / "c", *SMALL)
    assert run(*options).code == 0
    (images / "tall0.png").unlink()
    (images / "tall1.txt").write_text("another")
    assert run(*options).code == 0
    storage = Storage(tmp_path / "c")
    (entry,) = open_manifest(storage).shards
    text = entry.open_text(storage)
    assert len(entry.dead) == 1
    assert "another" in text.prompt
    assert "picture number 0" not in list(text.prompt)


def test_a_placeholder_is_put_into_captions_too():
    assert make_prompt(("see [filewords]",), "a [name] dog", "sks", 0, "key") == "see a sks dog"


def test_every_draw_follows_from_the_seed(cache):
    def draws(seed):
        data = LatentDataset(cache, flip_p=0.5, caption_dropout=0.5, repeats=20, seed=seed)
        wide = [n for n in range(len(data)) if data.key(n).startswith("wide")]
        batch = data.__getitems__(wide)
        return batch.flipped.tolist(), [text == "" for text in batch.cond_text]

    assert draws(1) == draws(1)
    for one, other in zip(draws(1), draws(2), strict=True):
        assert one != other


def test_prompts_that_are_made_follow_from_the_seed(run, images, tmp_path):
    (images / "tall0.txt").write_text("a, b, c, d, e, f, g, h")
    assert run("encode", images, "--out", tmp_path / "c", *SMALL, "--no-cond").code == 0

    def prompts(seed):
        data = LatentDataset(tmp_path / "c", include_cond=False, shuffle_tags=True, seed=seed)
        return next(data[n].cond_text for n in range(len(data)) if data.key(n) == "tall0.png")

    assert prompts(1) == prompts(1) != prompts(2)


def test_which_of_several_prompts_is_taken_follows_from_the_seed(run, images, tmp_path):
    options = ("--no-cond", "--shuffle-tags", "--prompts-per-image", 6)
    for n in range(4):
        (images / f"tall{n}.txt").write_text("a, b, c, d, e, f, g, h")
    assert run("encode", images, "--out", tmp_path / "c", *SMALL, *options).code == 0

    def prompts(seed):
        data = LatentDataset(tmp_path / "c", include_cond=False, seed=seed)
        return [data[n].cond_text for n in range(len(data))]

    assert prompts(1) == prompts(1) != prompts(2)


def test_a_shard_that_is_not_what_the_manifest_promises_is_not_read(cache):
    data = LatentDataset(cache)
    object.__setattr__(data.manifest.recipe.latents, "store_dtype", "float32")
    with pytest.raises(UserError, match="this shard and its text do not fit the others"):
        data[0]
    data = LatentDataset(cache)
    assert len(data[0].cond["prompt_embeds"]) == 1
    data._shards.cond = {"prompt_embeds": (torch.float16, torch.Size([1, 2]))}  # as if the first shard had others
    with pytest.raises(UserError, match="this shard and its text do not fit the others"):
        data[len(data) - 1]


def test_a_text_encoder_stays_in_the_training_process(cache):
    data = LatentDataset(cache, shuffle_tags=True, cond_model=lambda prompts: torch.zeros(len(prompts), 3, 2))
    assert pickle.loads(pickle.dumps(data)).cond_model is cond_model_elsewhere  # a lambda could not be pickled
    assert data.cond_model is not None


@pytest.mark.parametrize("large", [1, 2**22])
def test_buckets_of_one_size_are_shuffled_each_by_itself(cache, monkeypatch, large):
    monkeypatch.setattr("latentprep.read.order.LARGE", large)
    sampler = BucketBatchSampler(LatentDataset(cache), 1)
    assert sampler.data.sizes_of_buckets() == [4, 4]
    orders = []
    for epoch in range(6):
        sampler.set_epoch(epoch)
        samples = [n for batch in sampler for n in batch]
        orders.append(([n for n in samples if n < 4], [n - 4 for n in samples if n >= 4]))
    assert any(one != other for one, other in orders)


def test_one_sample_left_for_each_rank_makes_a_step_of_its_own():
    steps = Steps(np.array([10, 9]), 4, 2, drop_last=False)
    assert steps.num_whole.tolist() == [1, 0]
    assert steps.tails.tolist() == [[2, 0], [5, 4]]


def test_verify_finds_a_key_that_stands_in_two_shards(run, images, tmp_path, monkeypatch):
    assert run("encode", images, "--out", tmp_path / "c", *SMALL, "--shard-size", "60kB").code == 0
    assert len(open_manifest(Storage(tmp_path / "c")).shards) == 2
    monkeypatch.setattr(verifying, "check_shard", lambda *arguments: verifying.Checked([], ["same.png"]))
    assert "duplicate  : same.png stands in 2 rows" in run("verify", tmp_path / "c").out


def test_a_prompt_that_just_fits_is_not_cut(run, images, tmp_path):
    (images / "tall0.txt").write_text(" ".join(["a"] * 75))
    (images / "tall1.txt").write_text(" ".join(["a"] * 76))
    assert run("encode", images, "--out", tmp_path / "c", *SMALL).code == 0
    text = json.loads(run("inspect", tmp_path / "c", "--json").out)["text"]
    assert (text["tokens"]["max"], text["max_tokens"], text["truncated_prompts"]) == (78, 77, 1)


def test_what_is_cropped_counts_no_dead_rows(run, images, tmp_path):
    options = ("encode", images, "--out", tmp_path / "c", *SMALL)
    assert run(*options).code == 0
    for name in ("wide0", "wide2"):
        (images / f"{name}.png").unlink()
    assert run(*options).code == 0
    found = json.loads(run("inspect", tmp_path / "c", "--json", "--most-cropped", 8).out)["cropped"]["images"]
    assert [image["key"] for image in found if image["key"].startswith("wide")] == ["wide1.png", "wide3.png"]
    assert len(found) == 6


def test_verify_finds_an_image_that_is_cached_and_skipped(run, cache):
    storage = Storage(cache)
    commit(storage, open_manifest(storage), [Skip("tall0.png", "too_small", "1x1 < 2", 5, 6)])
    assert "skipped.jsonl: tall0.png is skipped, and in the cache too" in run("verify", cache).out


def test_verify_looks_into_the_cond_of_the_empty_prompt(run, cache, monkeypatch):
    monkeypatch.setattr(verify_cond, "open_uncond", lambda storage, name: ({}, {"a": torch.full((1, 2, 3), torch.nan)}))
    assert re.search(r"non_finite +uncond.*: cond/a: 1 prompts\n", run("verify", cache).out)


THREADS = """
import re, threading
from latentprep.system import share_freed_memory

def work(turn, end):
    turn.wait()
    blocks, kept = [bytearray(60_000) for _ in range(500)], bytearray(60_000)
    del blocks
    turn.wait()
    end.wait()

share_freed_memory()
end, turns = threading.Event(), [threading.Barrier(2) for _ in range(6)]
for turn in turns:
    threading.Thread(target=work, args=(turn, end), daemon=True).start()
for turn in turns:
    turn.wait()
    turn.wait()
print(re.search(r"VmHWM:\\s*(\\d+) kB", open("/proc/self/status").read())[1])
"""


@pytest.mark.skipif(not hasattr(os, "confstr") or "glibc" not in (os.confstr("CS_GNU_LIBC_VERSION") or ""),
                    reason="needs glibc")  # fmt: skip
def test_what_a_thread_has_freed_is_of_use_to_the_next():
    """Six threads hold 30 MB each, one after the other; each for itself would keep it."""
    shown = subprocess.run([sys.executable, "-c", THREADS], capture_output=True, text=True, check=True, cwd=ROOT).stdout
    assert int(shown) < 130_000  # kB; else 187,000
