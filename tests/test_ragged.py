"""cache/ragged.py: cond of prompts that have lengths of their own, from the file to the batch."""

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from latentprep import LatentDataset
from latentprep.cache.manifest import open_manifest
from latentprep.cache.ragged import (
    FILLS,
    Ragged,
    finite_rows,
    pad,
    put_cond,
    row_shape,
    stack_rows,
    take_cond,
)
from latentprep.cache.schema import STORED
from latentprep.cache.storage import Storage
from latentprep.errors import UserError
from latentprep.look.verify import verify
from latentprep.personalized import PersonalizedBase
from tests.test_ancestor import WIDTH, LatentDiffusion, vae, web_uis_conditioner  # noqa: F401 (a fixture)


def rows(*lengths):
    return [torch.arange(n * 2.0).reshape(n, 2) + 10 * n for n in lengths]


def test_round_trip():
    ragged = Ragged.of(rows(3, 1, 2))
    tensors = {}
    put_cond(tensors, {"embeds": ragged, "pooled": torch.ones(3, 4)})
    assert {name: list(value.shape) for name, value in tensors.items()} == {
        "cond/embeds": [6, 2], "cond/embeds_offsets": [4], "cond/pooled": [3, 4],
    }  # fmt: skip
    found = take_cond(tensors, 3, STORED)
    assert all(torch.equal(a, b) for a, b in zip(found["embeds"], rows(3, 1, 2), strict=True))
    assert torch.equal(found["pooled"], torch.ones(3, 4))
    assert (row_shape(found["embeds"]), row_shape(found["pooled"])) == ((None, 2), (4,))
    assert found["embeds"].to(torch.float16).dtype == torch.float16
    assert isinstance(stack_rows(rows(2, 2), False), torch.Tensor)


def test_finite_rows():
    broken = rows(3, 1, 2)
    broken[1][0, 1] = torch.inf
    assert finite_rows(Ragged.of(broken)).tolist() == [True, False, True]


def test_padding_repeats_the_last_vector():
    padded, lengths = pad(rows(3, 1), "repeat")
    assert lengths.tolist() == [3, 1]
    assert torch.equal(padded[0], rows(3)[0])
    assert torch.equal(padded[1], rows(1)[0].expand(3, -1))


@pytest.mark.parametrize(
    "offsets",
    [
        [0, 3, 4],
        [0, 3, 4, 5, 6],
        [0, 3, 4, 5],
        [0, 4, 3, 6],
        [1, 3, 4, 6],
        [0, 3, 4, 2**40],
    ],
)
def test_offsets_that_do_not_fit_are_refused(offsets):
    tensors = {"cond/embeds": torch.zeros(6, 2), "cond/embeds_offsets": torch.tensor(offsets)}
    with pytest.raises(ValueError, match="cond/embeds"):
        take_cond(tensors, 3, STORED)


@pytest.mark.parametrize("fill", FILLS)
def test_a_prompt_may_have_no_tokens(fill):
    """HunyuanImage keeps of a second encoder what a prompt has in quotes."""
    values = torch.arange(1.0, 13).reshape(6, 2)
    tensors = {"cond/embeds": values, "cond/embeds_offsets": torch.tensor([0, 0, 6])}
    cond = take_cond(tensors, 2, STORED)["embeds"]
    padded, lengths = pad([cond[0], cond[1]], fill)
    assert torch.equal(padded, torch.stack([torch.zeros(6, 2), values]))
    assert lengths.tolist() == [0, 6]
    assert pad([cond[0]], fill)[0].tolist() == [[[0.0, 0.0]]]  # never a batch of no tokens
    assert pad([cond[1]], "zeros", at_least=8)[0][0, 6:].tolist() == [[0.0, 0.0]] * 2


def test_rows_of_their_own_lengths_are_vectors():
    tensors = {"cond/embeds": torch.zeros(6), "cond/embeds_offsets": torch.tensor([0, 3, 4, 6])}
    with pytest.raises(ValueError, match="cond/embeds"):
        take_cond(tensors, 3, STORED)


def test_tokens_may_have_several_vectors():
    """Krea 2 keeps 12 layers of each token: [T,12,D]."""
    made = [torch.randn(count, 12, 2) for count in (3, 1, 2)]
    tensors = {}
    put_cond(tensors, {"embeds": Ragged.of(made)})
    found = take_cond(tensors, 3, STORED)["embeds"]
    assert all(torch.equal(a, b) for a, b in zip(found, made, strict=True))
    assert row_shape(found) == (None, 12, 2)
    assert finite_rows(found).all()


@pytest.mark.parametrize("dtype", [torch.int32, torch.float64])
def test_offsets_of_another_dtype_are_refused(dtype):
    tensors = {"cond/embeds": torch.zeros(6, 2), "cond/embeds_offsets": torch.tensor([0, 3, 4, 6], dtype=dtype)}
    with pytest.raises(ValueError, match="expected int64 offsets"):
        take_cond(tensors, 3, STORED)


@pytest.fixture
def cache(images, vae, tmp_path):  # noqa: F811
    for n, count in enumerate((100, 200, 10, 76)):
        (images / f"tall{n}.txt").write_text("word " * count)
    make = {"repeats": 1, "flip_p": 0, "cond_model": web_uis_conditioner, "include_cond": True, "seed": 0}

    def encode():
        PersonalizedBase(images, 64, 64, model=LatentDiffusion(vae), cache=tmp_path / "c", **make)

    encode()
    return tmp_path / "c", encode


def lengths_of(cache):
    data = LatentDataset(cache, latent_sampling_method="deterministic")
    batch = data.__getitems__(list(range(len(data))))
    assert batch.to("meta").cond_lengths["prompt_embeds"].is_meta
    cond = batch.cond["prompt_embeds"]
    for text, row, length in zip(batch.cond_text, cond, batch.cond_lengths["prompt_embeds"].tolist(), strict=True):
        assert torch.equal(row[:length], web_uis_conditioner([text])[0])
    return sorted(batch.cond_lengths["prompt_embeds"].tolist())


def test_only_the_vectors_of_each_prompt_are_stored(cache):
    (name,) = (cache[0] / "shards").glob("*.text.safetensors")
    found = load_file(name)
    assert found["cond/prompt_embeds"].shape == (77 * 5 + 154 * 2 + 231, WIDTH)
    assert np.diff(found["cond/prompt_embeds_offsets"].numpy()).tolist().count(77) == 5
    assert lengths_of(cache[0]) == [77] * 5 + [154, 154, 231]


def test_verify_inspect_and_compact_know_it(cache, images, run):
    for name in ("tall1.png", "wide1.png", "wide2.png", "wide3.png"):
        (images / name).unlink()
    (images / "tall3.txt").write_text("short")
    cache[1]()
    result = run("inspect", cache[0])
    assert result.code == 0
    assert f"prompt_embeds [T, {WIDTH}]" in result.out
    assert run("compact", cache[0]).code == 0
    assert not open_manifest(Storage(cache[0])).num_dead
    assert lengths_of(cache[0]) == [77] * 3 + [154]
    assert verify(Storage(cache[0]), lambda n: None)[1] == []


def test_a_shard_of_the_other_kind_does_not_fit(cache):
    data = LatentDataset(cache[0])
    data[0]
    data._shards.cond["prompt_embeds"] = (torch.float16, (77, WIDTH))
    data._shards.opened.clear()
    with pytest.raises(UserError, match="do not fit the others"):
        data[0]


def test_a_batch_can_be_read_within_autocast(cache):
    with torch.autocast("cpu", dtype=torch.bfloat16):
        batch = LatentDataset(cache[0], use_weight=True, seed=1).__getitems__([0, 1, 2])
    again = LatentDataset(cache[0], use_weight=True, seed=1).__getitems__([0, 1, 2])
    assert torch.equal(batch.latent_mean, again.latent_mean)
    assert batch.latent_mean.dtype == torch.float16
    assert torch.equal(batch.weight, again.weight)


@pytest.mark.parametrize("value", [torch.tensor(1.0), torch.zeros(3), torch.zeros(2, 4)])
def test_cond_of_another_shape_is_refused(value):
    with pytest.raises(ValueError, match=r"cond/embeds is torch.float32 .*, expected \[3,...\]"):
        take_cond({"cond/embeds": value}, 3, STORED)


def test_no_prompts_at_all():
    (cond,) = take_cond({"cond/e": torch.zeros(0, 2), "cond/e_offsets": torch.tensor([0])}, 0, STORED).values()
    assert int((~finite_rows(cond)).sum()) == 0
