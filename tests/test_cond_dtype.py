"""cache/int8.py and --cond-dtype: cond in 8 bits, from the text encoder to the batch, and what is never packed."""

import json
import shutil
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

import latentprep
from latentprep import LatentDataset
from latentprep.cache import int8
from latentprep.cache.int8 import BLOCK, check_scales, dtype_of, nbytes_of, pack, store_as, unpack, unpack_all
from latentprep.cache.ragged import Ragged
from latentprep.errors import UserError
from latentprep.geometry import Geometry
from latentprep.options import EncodeOptions, TextOptions
from latentprep.personalized import PersonalizedBase
from latentprep.prepare.recheck_text import compare_cond
from latentprep.prepare.recipes import estimate_row_bytes, make_recipe
from latentprep.prepare.work.cond import check_finite
from latentprep.read.cond import finish_cond
from tests.conftest import SMALL, gradient
from tests.test_encode import files
from tests.test_verify import put, rewrite

SIZE = {"model": "tiny", "resolution": 64, "bucket_step": 32, "min_side": 32, "progress": False}
PACKED = ("--cond-dtype", "int8")
MOST = 0.01  # error of the worst token of the miniatures, in its own root mean square; tiny has 0.0063


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """Six images with captions, and their caches with cond in float32, and in 8 bits."""
    folder = tmp_path_factory.mktemp("made")
    (folder / "images").mkdir()
    for n in range(6):
        gradient(64, 64).rotate(60 * n).save(folder / "images" / f"{n}.png")
        (folder / "images" / f"{n}.txt").write_text(f"picture {n}" * n)
    for name, options in (("exact", {}), ("packed", {"cond_dtype": "int8"})):
        done = latentprep.encode(folder / "images", folder / name, store_dtype="float32", **SIZE, **options)
        assert done.ok
    return folder


@pytest.fixture
def cache(made, tmp_path):
    """A copy of the cache in 8 bits, beside a copy of its images."""
    for name in ("images", "packed"):
        shutil.copytree(made / name, tmp_path / name)
    return tmp_path / "packed"


def again(cache):
    return ("encode", cache.parent / "images", "--out", cache, *SMALL, "--store-dtype", "float32", *PACKED)


def read(cache, **options):
    data = LatentDataset(cache, latent_sampling_method="deterministic", **options)
    return data.__getitems__(list(range(len(data))))


def text_of(cache):
    (path,) = (cache / "shards").glob("*.text.safetensors")
    return load_file(path)


def rows_of(cache):
    """Prompt -> what its row of every tensor of cond holds, to the bit."""
    found = text_of(cache)
    ends, data = found["prompt_offsets"].tolist(), found["prompt"].numpy().tobytes()
    names = [name for name in found if name.startswith("cond/")]
    return {
        data[a:b].decode(): [found[name][n].numpy().tobytes() for name in names]
        for n, (a, b) in enumerate(pairwise(ends))
    }


def error_of(found, exact):
    """The largest error of a token, in its own root mean square."""
    return float(((found - exact).square().mean(-1).sqrt() / exact.square().mean(-1).sqrt()).max())


@pytest.mark.parametrize("seed", range(40))
def test_what_is_packed_comes_back_within_half_a_step(monkeypatch, seed):
    random = np.random.default_rng(seed)
    shape = (*random.integers(1, 5, random.integers(1, 3)), int(random.integers(BLOCK, 300)))
    values = torch.from_numpy(random.standard_normal(shape) * 10.0 ** random.uniform(-2, 4)).float()
    values[..., random.integers(shape[-1])] *= 100  # a channel of outliers
    values[0, ..., :BLOCK] *= random.integers(2)  # perhaps a block of zeros
    packed, scale = pack(values)
    assert (packed.dtype, packed.shape, packed.is_contiguous()) == (torch.int8, values.shape, True)
    assert (scale.dtype, list(scale.shape)) == (torch.float16, [*shape[:-1], -(-shape[-1] // BLOCK)])
    step = scale.float().repeat_interleave(BLOCK, -1)[..., : shape[-1]]
    found = unpack(packed, scale)
    assert found.is_contiguous()
    assert bool(((found - values).abs() <= step * 0.5001).all())
    monkeypatch.setattr(int8, "AT_ONCE", int(random.integers(1, 1000)))
    for dtype in (torch.bfloat16, torch.float16, torch.float64):
        assert torch.equal(unpack(packed, scale, dtype), found.to(dtype))
    assert all(torch.equal(a, b) for a, b in zip(pack(found), (packed, scale), strict=True))


def test_outliers_cost_only_their_own_block():
    values = torch.randn(7, 4 * BLOCK, generator=torch.Generator().manual_seed(0))
    values[0, 3] = 6000  # as the first token of a language model has
    found = unpack(*pack(values))
    assert error_of(found[:, BLOCK:], values[:, BLOCK:]) < 0.01
    assert abs(found[0, 3] - 6000) < 3


def test_only_values_of_tokens_are_packed():
    cond = {
        "prompt_embeds": torch.randn(2, 5, 64), "layers": torch.randn(2, 3, 5, 64), "odd": torch.randn(2, 5, 77),
        "pooled_prompt_embeds": torch.randn(2, 64), "text_ids": torch.arange(1026.0).view(2, 171, 3),
        "position_ids": torch.arange(1024.0).view(2, 8, 64), "narrow": torch.randn(2, 5, BLOCK - 1),
        "rows": Ragged.of([torch.randn(n, 64) for n in (3, 1)]),
        "row_ids": Ragged.of([torch.arange(300.0)[:, None]] * 2),
    }  # fmt: skip
    stored = store_as(cond, "int8")
    packed = {"prompt_embeds", "layers", "odd", "rows"}
    assert {name for name, value in stored.items() if value.dtype == torch.int8} == packed
    assert stored.keys() - cond.keys() == {f"{name}_scale" for name in packed}
    for name in cond.keys() - packed - {"row_ids"}:
        assert torch.equal(stored[name], cond[name])
    assert torch.equal(stored["row_ids"].values, cond["row_ids"].values)
    check_scales(stored)
    found = finish_cond({name: value for name, value in stored.items() if not isinstance(value, Ragged)}, {})
    assert found.keys() == cond.keys() - {"rows", "row_ids"}
    assert all(value.dtype == torch.float32 for value in found.values())
    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        name = str(dtype).removeprefix("torch.")
        ids, others = ({own for own in cond if own.endswith("_ids") is is_id} for is_id in (True, False))
        assert {dtype_of(own, cond[own], name) for own in others} == {dtype}
        exact = torch.float32 if dtype == torch.bfloat16 else dtype  # bfloat16 has not all numbers above 256
        assert {dtype_of(own, cond[own], name) for own in ids} == {exact}
    batch = {"prompt_embeds": cond["prompt_embeds"], "text_ids": torch.tensor([[[300.0, 301.0, 511.0]]])}
    found = finish_cond(store_as(batch, "bfloat16"), {}, torch.bfloat16)
    assert found["prompt_embeds"].dtype == torch.bfloat16
    assert found["text_ids"].tolist() == [[[300.0, 301.0, 511.0]]]
    assert nbytes_of(512 * 4096, "int8") == 512 * 4096 * 34 // 32
    assert nbytes_of(512 * 4096, "float16") == 512 * 4096 * 2


def test_what_eight_bits_cannot_hold_is_refused():
    recipe, cond = SimpleNamespace(store_dtype="int8", dtype="float32"), torch.zeros(2, 3, 64)
    cond[1, 2, 3] = 1e7
    with pytest.raises(
        UserError, match=r"^--cond-dtype int8: cannot hold the embeds of 'two'\. Use --cond-dtype bfloat"
    ):
        check_finite(["one", "two"], {"embeds": cond}, store_as({"embeds": cond}, "int8"), recipe, "", "--cond-dtype")
    for value in (torch.inf, torch.nan):
        cond[1, 2, 3] = value
        with pytest.raises(UserError, match="no finite numbers for 'two'"):
            check_finite(["one", "two"], {"embeds": cond}, store_as({"embeds": cond}, "int8"), recipe, "")
    cond[1, 2, 3] = 8e6
    check_finite(["one", "two"], {"embeds": cond}, store_as({"embeds": cond}, "int8"), recipe, "")


def test_a_batch_has_the_numbers_of_the_text_encoder(made):
    exact, packed = read(made / "exact"), read(made / "packed")
    assert torch.equal(exact.latent_sample, packed.latent_sample)
    assert packed.latent_mean.dtype == torch.float32
    assert exact.cond_text == packed.cond_text
    assert packed.cond.keys() == {"prompt_embeds"}
    assert 0 < error_of(packed.cond["prompt_embeds"], exact.cond["prompt_embeds"]) < MOST
    half = packed.to(torch.bfloat16).cond["prompt_embeds"]
    assert torch.equal(half, packed.cond["prompt_embeds"].bfloat16())
    assert {name: str(value.dtype) for name, value in packed.stored_cond.items()} == {
        "prompt_embeds": "torch.int8", "prompt_embeds_scale": "torch.float16",
    }  # fmt: skip
    size = sum(value.nbytes for name, value in text_of(made / "packed").items() if name.startswith("cond/"))
    assert size == nbytes_of(text_of(made / "exact")["cond/prompt_embeds"].numel(), "int8")


def test_dropped_captions_get_the_packed_cond_of_the_empty_prompt(made):
    uncond = LatentDataset(made / "packed").uncond()
    assert uncond.keys() == {"prompt_embeds"}
    batch = read(made / "packed", caption_dropout=0.5)
    dropped = torch.tensor([not text for text in batch.cond_text])
    assert dropped.any()
    assert not dropped.all()
    cond = batch.cond["prompt_embeds"]
    assert torch.equal(cond[dropped], uncond["prompt_embeds"].expand(int(dropped.sum()), -1, -1))
    exact = LatentDataset(made / "exact").uncond()["prompt_embeds"]
    assert 0 < error_of(uncond["prompt_embeds"], exact) < MOST


def test_what_is_stored_is_taken_over_to_the_bit(run, cache):
    before, source = rows_of(cache), cache.parent / "images"
    assert "nothing to do" in run(*again(cache)).out
    (source / "1.txt").write_text("another")
    (source / "2.txt").unlink()
    result = run(*again(cache))
    assert result.code == 0, result.err
    after = rows_of(cache)
    kept = before.keys() & after.keys()
    assert len(kept) == 4
    assert all(before[prompt] == after[prompt] for prompt in kept)
    assert "another" in after
    (source / "3.png").unlink()
    (source / "4.png").unlink()
    assert run(*again(cache)).code == 0
    assert run("compact", cache).code == 0
    rows = rows_of(cache)
    assert rows.keys() == {"", "another", "picture 5" * 5}
    assert all(rows[prompt] == after[prompt] for prompt in rows)
    assert run("verify", cache, "--source", source, "--re-encode", 4).code == 0


def test_another_dtype_makes_texts_anew_and_nothing_else(run, cache, made):
    latents = {name: data for name, data in files(cache / "shards").items() if ".latents." in name}
    command = again(cache)[: -len(PACKED)]
    shown = run(*command, "--dry-run").out
    assert "--cond-dtype int8 -> float32" in shown
    assert run(*command).code == 0
    after = files(cache / "shards")
    assert {name: data for name, data in after.items() if ".latents." in name} == latents
    assert rows_of(cache) == rows_of(made / "exact")  # made anew, and not from 8 bits
    assert run("verify", cache).code == 0


def test_it_is_an_option_like_others(run, cache, tmp_path):
    assert json.loads((cache / "cache.json").read_text())["made_with"]["again"]["cond_dtype"] == "int8"
    assert "nothing to do" in run("encode", "--again", cache, cache.parent / "images").out
    (tmp_path / "o.toml").write_text('cond-dtype = "int8"\nstore_dtype = "float32"\n')
    command = ("encode", cache.parent / "images", "--out", cache, *SMALL, "--options", tmp_path / "o.toml")
    assert "nothing to do" in run(*command).out
    result = run("encode", cache.parent / "images", "--cond-dtype", "int4")
    assert "--cond-dtype int4: expected one of float32, float16, bfloat16, int8." in result.err


def test_it_counts_for_all_sets(run, cache, tmp_path):
    (tmp_path / "sets.toml").write_text(
        'cond-dtype = "int8"\n[[set]]\nsource = "images"\n[[set]]\nname = "b"\nsource = "images"\n'
    )
    assert run("encode", tmp_path / "sets.toml", "--out", tmp_path / "c", *SMALL).code == 0
    data = LatentDataset(tmp_path / "c")
    assert data.sets == ["images", "b"]
    assert all(data[n].stored_cond["prompt_embeds"].dtype == torch.int8 for n in range(12))
    assert "nothing to do" in run("encode", "--again", tmp_path / "c").out


def test_the_plan_counts_its_bytes():
    vae = SimpleNamespace(has_std=True, latent_channels=16, factor=8, digest="")
    text = SimpleNamespace(num_values=lambda options: 512 * 4096, settings=lambda options: {}, digest="t")
    models, found = SimpleNamespace(vae=vae, text=text, is_upcast=False), {}
    for dtype in (None, "float32", "int8"):
        geometry = Geometry.from_options(resolution="64")
        options = EncodeOptions(Path("a"), "b", geometry, TextOptions(cond_dtype=dtype, prompts_per_image=2))
        found[dtype] = estimate_row_bytes(make_recipe(options, models, "float32", "float32"), models, options)
    sizes = {dtype: row.per_row - 512 for dtype, row in found.items()}
    assert sizes == {None: 2 * 512 * 4096 * 2, "float32": 2 * 512 * 4096 * 4, "int8": 2 * 512 * 4096 * 17 // 16}
    assert len({row.per_latent_pixel for row in found.values()}) == 1


def test_inspect_says_how_cond_is_stored(run, cache):
    assert "prompt_embeds [77, 64], stored as int8" in run("inspect", cache).out
    text = json.loads(run("inspect", cache, "--json").out)["text"]
    assert (text["cond"], text["cond_dtype"]) == ({"prompt_embeds": [77, 64]}, "int8")


@pytest.mark.parametrize(("latents", "cond"), [("float32", "float16"), ("float16", "float32"), ("bfloat16", "int8")])
def test_latents_and_cond_have_dtypes_of_their_own(run, images, tmp_path, latents, cond):
    options = ("--out", tmp_path / "c", *SMALL, "--store-dtype", latents, "--cond-dtype", cond)
    assert run("encode", images, *options).code == 0
    assert run("verify", tmp_path / "c", "--source", images, "--re-encode", 1).code == 0
    data = LatentDataset(tmp_path / "c")
    assert data[0].latent_mean.dtype == getattr(torch, latents)
    assert data[0].stored_cond["prompt_embeds"].dtype == getattr(torch, cond)
    assert data[0].cond["prompt_embeds"].dtype == torch.float32


def test_the_same_dtype_as_latents_is_the_default(run, images, tmp_path):
    assert run("encode", images, "--out", tmp_path / "c", *SMALL).code == 0
    assert "nothing to do" in run("encode", images, "--out", tmp_path / "c", *SMALL, "--cond-dtype", "float16").out


SCALES = "cond/prompt_embeds_scale"


@pytest.mark.parametrize(
    ("name", "change", "problem", "words"),
    [
        (SCALES, lambda t: t.fill_(torch.nan), "non_finite", "prompts"),
        (SCALES, lambda t: -t, "range", "below 0"),
        ("cond/prompt_embeds", lambda t: t.fill_(-128), "range", "below -127"),
        (SCALES, lambda t: None, "structure", "is not there, expected torch.float16"),
        (SCALES, lambda t: t[..., :1], "structure", "77, 1], expected torch.float16"),
        (SCALES, lambda t: t.float(), "structure", "is torch.float32"),
        (SCALES, lambda t: t.to(torch.int8), "structure", "is torch.int8"),
        (SCALES, lambda t: t[:1], "structure", "prompt_embeds_scale is"),
        ("cond/prompt_embeds", lambda t: t[..., :32], "structure", "expected torch.float16"),
        ("cond/prompt_embeds", lambda t: t.float(), "dtype", "expected int8"),
        ("cond/prompt_embeds", lambda t: t.view(torch.uint8), "structure", "is torch.uint8"),
    ],
)
def test_crafted_scales_are_found_and_no_reader_follows_them(run, cache, name, change, problem, words):
    file = rewrite(cache, "text", put(name, change))
    found = json.loads(run("verify", cache, "--json").out)["problems"]
    assert [p["name"] for p in found if p["problem"] == problem and words in p["detail"]] == [f"shards/{file}"]
    if problem == "structure":
        with pytest.raises(UserError, match=file):
            read(cache)


def test_cond_that_is_not_of_its_prompt_is_found(run, cache):
    rewrite(cache, "text", put("cond/prompt_embeds", lambda t: t.roll(1, 0)))
    command = ("verify", cache, "--source", cache.parent / "images", "--re-encode", 6, "--json")
    problems = json.loads(run(*command).out)["problems"]
    assert {p["problem"] for p in problems} == {"cond"}
    assert len(problems) >= 5


def test_one_wrong_token_counts_and_rounding_does_not():
    exact = {
        "prompt_embeds": torch.randn(77, 64, generator=torch.Generator().manual_seed(0)),
        "text_ids": torch.ones(77, 3),
    }
    stored = {name: value[0] for name, value in store_as({n: v[None] for n, v in exact.items()}, "int8").items()}
    difference, wrong = compare_cond(exact, stored, 0.003)
    assert (0.001 < difference < MOST, wrong) == (True, "")
    stored["prompt_embeds"][5] = stored["prompt_embeds"][6]
    assert "prompt_embeds" in compare_cond(exact, stored, 0.003)[1]
    assert compare_cond(exact, {**stored, "text_ids": torch.zeros(77, 3)}, 9.0)[1] == "text_ids is not what is stored"
    assert (
        "[77, 32], expected [77, 64]"
        in compare_cond(exact, {**stored, "prompt_embeds": stored["prompt_embeds"][:, :32]}, 9)[1]
    )


@pytest.mark.parametrize("name", ["packed", "exact"])
def test_an_empty_prompt_of_another_kind_is_said(made, name):
    (own,) = (made / name).glob("uncond.*")
    (other,) = (made / ("exact" if name == "packed" else "packed")).glob("uncond.*")
    data = LatentDataset(made / name, caption_dropout=1.0)
    data._prompts.stored._empty = {n.removeprefix("cond/"): value for n, value in load_file(other).items()}
    with pytest.raises(UserError, match=f"{own.name}: its prompt_embeds does not fit"):
        data[0]


def test_the_ancestors_door_reads_it(made):
    entries = PersonalizedBase(
        made / "images", 64, 64, repeats=1, flip_p=0, cache=made / "packed", include_cond=True, seed=0
    )
    batch = read(made / "exact")
    exact = dict(zip(batch.cond_text, batch.cond["prompt_embeds"], strict=True))
    for entry in entries:
        assert 0 < error_of(entry.cond, exact[entry.cond_text]) < MOST


@pytest.fixture(scope="module")
def zimage(tmp_path_factory):
    """A miniature whose prompts have lengths of their own."""
    from tests import test_zimage as mini  # needs a newer diffusers

    folder = tmp_path_factory.mktemp("zimage")
    torch.manual_seed(0)
    tokenizer = mini.make_qwen_tokenizer(folder / "vocabulary")
    encoder = mini.make_qwen3(mini.Qwen3Model, len(tokenizer))
    vae = mini.make_vae(latent_channels=16, scaling_factor=0.3611, shift_factor=0.1159)
    parts = {"scheduler": None, "vae": vae, "text_encoder": encoder, "tokenizer": tokenizer, "transformer": None}
    mini.diffusers.ZImagePipeline(**parts).save_pretrained(folder / "model")
    return folder / "model"


def test_prompts_of_their_own_lengths(zimage, run, images, tmp_path):
    for n in range(4):
        (images / f"tall{n}.txt").write_text("more " * n)
    size = ("--model", zimage, *SMALL[2:])
    for name, dtype in (("exact", "float32"), ("packed", "int8")):
        assert run("encode", images, "--out", tmp_path / name, *size, "--cond-dtype", dtype).code == 0
    whole = [load_file(path) for path in (tmp_path / "packed" / "shards").glob("*.text.*")]
    assert all(own["cond/prompt_embeds"].dtype == torch.int8 for own in whole)
    exact, packed = (LatentDataset(tmp_path / name, caption_dropout=0.3) for name in ("exact", "packed"))
    tall = [n for n in range(len(exact)) if exact.key(n).startswith("tall")]
    one, other = exact.__getitems__(tall), packed.__getitems__(tall)
    assert one.cond_text == other.cond_text
    assert one.cond.keys() == other.cond.keys() == {"prompt_embeds", "prompt_embeds_mask"}
    assert other.cond_lengths.keys() == {"prompt_embeds"}
    mask = one.cond["prompt_embeds_mask"]
    assert torch.equal(mask, other.cond["prompt_embeds_mask"])
    assert not mask.all()
    assert not other.cond["prompt_embeds"][~mask].any()
    assert 0 < error_of(other.cond["prompt_embeds"][mask], one.cond["prompt_embeds"][mask]) < MOST
    assert packed.uncond().keys() == {"prompt_embeds", "prompt_embeds_mask"}
    for name in ("tall0.png", "wide1.png", "wide2.png"):
        (images / name).unlink()
    assert run("encode", images, "--out", tmp_path / "packed", *size, *PACKED).code == 0
    assert run("compact", tmp_path / "packed").code == 0
    kept = LatentDataset(tmp_path / "packed")
    again = {kept.key(n): kept[n].cond["prompt_embeds"] for n in range(len(kept))}
    for key, row in ((packed.key(n), LatentDataset(tmp_path / "exact")[n].cond["prompt_embeds"]) for n in tall[1:]):
        assert error_of(again[key], row) < MOST
    assert run("verify", tmp_path / "packed", "--source", images, "--re-encode", 2).code == 0


def test_scales_of_other_lengths_are_refused():
    stored = store_as({"rows": Ragged.of([torch.ones(n, 64) for n in (3, 1)])}, "int8")
    check_scales(stored)
    scale = stored["rows_scale"]
    for wrong in (Ragged(scale.values, np.array([0, 1, 4])), scale.values):
        with pytest.raises(ValueError, match="cond/rows_scale is"):
            check_scales({**stored, "rows_scale": wrong})
    assert unpack_all({"rows": stored["rows"][0], "rows_scale": scale[0]})["rows"].shape == (3, 64)
