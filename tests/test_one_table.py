"""cache/schema.py: a field that is added to the table, and to the rows, is written, kept and read by all others."""

import zlib

import numpy as np
import pytest
import torch

from latentprep import LatentDataset, LatentLoader
from latentprep.cache import schema
from latentprep.cache.manifest import open_manifest
from latentprep.cache.schema import Field
from latentprep.cache.storage import Storage
from latentprep.prepare.work import compose, finish
from tests.conftest import SMALL, stop_at
from tests.test_encode import files

FLOAT32 = frozenset({torch.float32})
OPTIONS = (*SMALL, "--flip", "--shard-size", "100kB", "--batch-size", 2)


def score(key):
    return zlib.crc32(key.encode()) / 2**32


@pytest.fixture
def more_fields(monkeypatch):
    """One field more in either table, and in the rows; nothing else is told of them."""
    latents = (*schema.LATENTS, Field("depth", FLOAT32, "NVhw"), Field("license", schema.STRINGS, is_optional=True))
    monkeypatch.setitem(schema.TABLES, "latents", latents)
    monkeypatch.setitem(schema.TABLES, "partial", latents)
    monkeypatch.setitem(schema.TABLES, "text", (*schema.TEXT, Field("aesthetic", FLOAT32), Field("tags", schema.LISTS)))
    latents_row, text_row = finish.make_row, compose.make_row

    def make_latents_row(row, views):
        height, width = row.placement.bucket
        depth = np.full((len(views), height // 8, width // 8), score(row.item.key), np.float32)
        return {**latents_row(row, views), "depth": depth, "license": f"of {row.item.key}"}

    def make_text_row(row, prompt_of):
        return {**text_row(row, prompt_of), "aesthetic": np.float32(score(row.key)), "tags": [row.key, "tag"]}

    monkeypatch.setattr(finish, "make_row", make_latents_row)
    monkeypatch.setattr(compose, "make_row", make_text_row)


def check(cache, count):
    storage = Storage(cache)
    num_rows = 0
    for shard in open_manifest(storage).shards:
        groups = zip(shard.open_latents(storage).groups, shard.open_text(storage).groups, strict=True)
        for group, words in groups:
            num_rows += len(group)
            assert list(group.license) == [f"of {key}" for key in group.key]
            assert [list(tags) for tags in words.tags] == [[key, "tag"] for key in words.key]
    assert num_rows == count
    data = LatentDataset(cache)
    for batch in LatentLoader(data, 3):
        assert batch.fields.keys() == {"depth", "aesthetic"}
        wanted = torch.tensor([score(data.key(index)) for index in batch.index.tolist()])
        assert torch.equal(batch.fields["aesthetic"], wanted)
        assert torch.equal(batch.fields["depth"], wanted[:, None, None].expand(batch.fields["depth"].shape))
        assert batch.fields["depth"].shape[1:] == batch.latent_mean.shape[2:]


def test_a_field_of_the_table_goes_round(run, images, tmp_path, monkeypatch, more_fields):
    whole, cache = tmp_path / "whole", tmp_path / "c"
    assert run("encode", images, "--out", whole, *OPTIONS).code == 0
    with monkeypatch.context() as patch:
        stop_at(patch, 4)
        assert run("encode", images, "--out", cache, *OPTIONS).code == 130
    assert list(cache.glob("shards/*.partial.*"))
    assert run("encode", images, "--out", cache, *OPTIONS).code == 0
    assert files(cache) == files(whole)
    check(cache, 8)
    assert run("verify", cache, "--source", images).code == 0

    (images / "tall1.png").unlink()
    (images / "tall1.txt").unlink()
    (images / "wide2.png").rename(images / "z.png")
    (images / "tall0.txt").write_text("another caption")
    assert run("encode", images, "--out", cache, *OPTIONS).code == 0
    assert run("verify", cache, "--source", images).code == 0
    assert run("compact", cache, "--min-share", 0).code == 0
    assert run("verify", cache, "--source", images).code == 0
    storage = Storage(cache)
    found = [
        (name, float(value))
        for shard in open_manifest(storage).shards
        for group in shard.open_latents(storage).groups
        for name, value in zip(group.license, group.depth[:, 0, 0, 0], strict=True)
    ]
    assert len(found) == 7
    assert all(value == np.float32(score(name.removeprefix("of "))) for name, value in found)  # row by row together


def test_a_file_that_lacks_a_field_of_the_table_is_none(run, images, tmp_path, monkeypatch):
    assert run("encode", images, "--out", tmp_path / "c", *OPTIONS).code == 0
    monkeypatch.setitem(schema.TABLES, "latents", (*schema.LATENTS, Field("depth", FLOAT32, "NVhw")))
    result = run("verify", tmp_path / "c")
    assert result.code == 1
    assert "depth" in result.out
