"""read/cond.py: cond of prompts of several lengths: padded, masked, moved, pickled, and dropped for the empty one."""

import pickle
from dataclasses import replace

import pytest
import torch
from torch.utils.data import DataLoader

from latentprep import BucketBatchSampler, LatentDataset
from latentprep.cache.cond import write_uncond
from latentprep.cache.manifest import Uncond, commit, open_manifest
from latentprep.cache.ragged import Ragged, pad
from latentprep.cache.storage import Storage
from latentprep.cache.text import write_text
from latentprep.errors import UserError
from latentprep.read.cond import finish_cond
from tests.conftest import SMALL

WIDTH = 3


def row_of(prompt, *width):
    """[T,...] of a prompt: a length and numbers of its own."""
    length = 1 + len(prompt) % 5
    return torch.arange(1.0, 1 + length * torch.Size(width).numel()).view(length, *width).half() + len(prompt)


def ragged_cache(folder, fill=None, empty=None):
    """Give a cache ragged cond of row_of, and a fixed `pooled`; `empty` stands for the empty prompt's."""
    storage = Storage(folder)
    manifest = open_manifest(storage)
    shards = []
    for entry in manifest.shards:
        text = entry.open_text(storage)
        rows = [row_of(prompt, WIDTH) for prompt in text.prompt]
        cond = {"prompt_embeds": Ragged.of(rows), "pooled": torch.ones(len(rows), 2).half()}
        stamp = write_text(storage, entry.id, "ragged", replace(text, cond=cond, metadata={"recipe": {}}))
        shards.append(entry.with_text("ragged", stamp))
    empty = empty or {"prompt_embeds": Ragged.of([row_of("", WIDTH)]), "pooled": torch.zeros(1, 2).half()}
    uncond = write_uncond(storage, "0" * 16, empty, {})
    recipe = replace(manifest.recipe, text=replace(manifest.recipe.text, fill=fill))
    commit(storage, replace(manifest, recipe=recipe, shards=shards, uncond=Uncond("0" * 16, uncond)), [])
    return folder


@pytest.fixture
def plain(run, images, tmp_path):
    for n in range(4):
        (images / f"tall{n}.txt").write_text("x" * (n + 1))
    assert run("encode", images, "--out", tmp_path / "c", *SMALL).code == 0
    return tmp_path / "c"


def tall(data):
    return [n for n in range(len(data)) if data.key(n).startswith("tall")]


def check(batch, fill):
    cond, lengths = batch.cond, batch.cond_lengths["prompt_embeds"]
    assert cond.keys() == {"prompt_embeds", "pooled", "prompt_embeds_mask"}
    assert len(set(lengths.tolist())) > 1
    assert cond["prompt_embeds"].shape == (len(batch), int(lengths.max()), WIDTH)
    assert cond["prompt_embeds_mask"].dtype == torch.bool
    assert cond["prompt_embeds"].dtype == torch.float32
    rows = zip(batch.cond_text, cond["prompt_embeds"], cond["prompt_embeds_mask"], strict=True)
    for prompt, row, mask in rows:
        own = row_of(prompt, WIDTH).float()
        assert torch.equal(row[mask], own)
        assert mask.tolist() == [n < len(own) for n in range(len(row))]
        padding = own[-1] if fill == "repeat" else torch.zeros(WIDTH)
        assert (row[~mask] == padding).all()


@pytest.mark.parametrize("fill", [None, "repeat", "zeros"])
def test_a_batch_is_padded_as_the_cache_says_with_a_mask(plain, fill):
    data = LatentDataset(ragged_cache(plain, fill))
    check(data.__getitems__(tall(data)), fill or "repeat")


@pytest.mark.parametrize("start", ["fork", "spawn"])
def test_the_mask_comes_through_workers(plain, start):
    data = LatentDataset(ragged_cache(plain, "zeros"))
    loader = DataLoader(
        data, batch_sampler=BucketBatchSampler(data, 4), collate_fn=LatentDataset.collate, num_workers=1,
        multiprocessing_context=start,
    )  # fmt: skip
    batches = {batch.cond_text[0][:1]: batch for batch in loader}
    assert batches.keys() == {"x", "w"}  # of captions, and of names of files: wide0
    check(batches["x"], "zeros")
    check(pickle.loads(pickle.dumps(batches["x"])), "zeros")
    assert batches["w"].cond["prompt_embeds_mask"].all()


def test_the_mask_moves_with_the_batch(plain):
    data = LatentDataset(ragged_cache(plain))
    moved = data.__getitems__(tall(data)).to("meta")
    assert moved.cond["prompt_embeds_mask"].is_meta


@pytest.mark.gpu
def test_all_of_cond_is_pinned(plain):
    data = LatentDataset(ragged_cache(plain))
    batch = data.__getitems__(tall(data)).pin_memory()
    assert all(value.is_pinned() for value in (*batch.stored_cond.values(), *batch.cond_lengths.values()))


@pytest.mark.parametrize("share", [0.5, 1.0])
def test_dropped_prompts_have_the_empty_one_s_cond_and_mask(plain, share):
    data = LatentDataset(ragged_cache(plain, "zeros"), caption_dropout=share, repeats=20)
    batch = data.__getitems__(tall(data))
    dropped = [n for n, prompt in enumerate(batch.cond_text) if not prompt]
    assert 0 < len(dropped) <= len(batch)
    uncond = data.uncond()
    assert uncond.keys() == batch.cond.keys()
    assert uncond["prompt_embeds_mask"].tolist() == [[True]]  # the empty prompt has one token here
    for n in dropped:
        own = batch.cond["prompt_embeds_mask"][n]
        assert int(own.sum()) == 1
        assert torch.equal(batch.cond["prompt_embeds"][n][own], uncond["prompt_embeds"][0])
        assert not batch.cond["prompt_embeds"][n][~own].any()
        assert torch.equal(batch.cond["pooled"][n], uncond["pooled"][0])


@pytest.mark.parametrize(
    "empty",
    [
        {"prompt_embeds": Ragged.of([torch.zeros(2, WIDTH + 1)]), "pooled": torch.zeros(1, 2)},
        {"prompt_embeds": torch.zeros(1, 2, WIDTH), "pooled": torch.zeros(1, 2)},
        {"pooled": torch.zeros(1, 2)},
    ],
)
def test_an_empty_prompt_of_another_shape_is_said(plain, empty):
    data = LatentDataset(ragged_cache(plain, empty=empty), caption_dropout=1.0)
    with pytest.raises(UserError, match=r"its prompt_embeds does not fit that of the shards. Run latentprep verify"):
        data.__getitems__(tall(data))


def test_a_rule_of_padding_that_is_none_is_refused(plain):
    with pytest.raises(UserError, match=r"not a complete manifest \(.*zeros\|repeat.*recipe\.text\.fill"):
        LatentDataset(ragged_cache(plain, "lots"))


@pytest.mark.parametrize("fill", ["repeat", "zeros"])
@pytest.mark.parametrize("width", [(WIDTH,), (12, 2)])
def test_rows_of_any_number_of_dimensions_are_padded(fill, width):
    rows = [row_of(prompt, *width) for prompt in ("a", "bc", "def")]
    padded, lengths = pad(rows, fill)
    assert padded.shape == (3, max(map(len, rows)), *width)
    assert padded.dtype == torch.float16
    for row, found, length in zip(rows, padded, lengths.tolist(), strict=True):
        assert torch.equal(found[:length], row)
        assert (found[length:] == (row[-1] if fill == "repeat" else 0)).all()
    alike, lengths = pad([rows[0], rows[0]], fill)
    assert torch.equal(alike, torch.stack([rows[0], rows[0]]))
    assert lengths.tolist() == [len(rows[0])] * 2


def test_a_mask_that_is_stored_counts():
    stored = {"embeds": torch.zeros(2, 3, 1), "embeds_mask": torch.ones(2, 3)}
    assert finish_cond(stored, {"embeds": torch.tensor([1, 3])})["embeds_mask"].tolist() == [[True] * 3] * 2
