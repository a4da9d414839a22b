"""Edit pairs: control images of a target. Aligned to the pixel, stored, read; what is missing or damaged is a skip."""

import json
import os
import pickle
import re
import shutil
import tarfile
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from diffusers import Flux2Pipeline, FluxKontextPipeline
from PIL import Image, ImageOps

import latentprep
from latentprep import LatentDataset, LatentLoader, LatentMix, UserError
from latentprep.cache.latents import open_latents, write_latents
from latentprep.cache.manifest import _seal, open_manifest, read_skips
from latentprep.cache.storage import Storage
from latentprep.geometry import Geometry
from latentprep.options import ImageOptions
from latentprep.prepare.images.load import LoadOptions, load_pixels
from latentprep.prepare.models.vae_encoder import VaeEncoder
from latentprep.prepare.models.vae_folder import open_vae
from latentprep.prepare.plan.buckets import fit_to, has_shape_of, make_place, place_control
from latentprep.prepare.source.controls import add_controls, list_controls
from latentprep.prepare.source.folder import Folder
from latentprep.recipe import LatentsRecipe
from latentprep.records import Placement
from tests.conftest import SMALL, TINY, gradient, read_item, stop_at
from tests.test_encode import files, reference, rows

pytestmark = pytest.mark.slow

PAGE = (Path(__file__).parent.parent / "docs" / "reader.md").read_text(encoding="utf-8")
MANY = ("--flip", "--crop", "random", "--crops", "2")


def noise(width, height, seed=0):
    """A picture in which every pixel is unlike its neighbours: it shows where it was cut."""
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8))


def draw_targets(folder):
    """Four targets in two buckets at 64 pixels, one of them with alpha."""
    folder.mkdir()
    for n in range(2):
        gradient(128, 40).rotate(180 * n).save(folder / f"wide{n}.png")
        image = gradient(64, 80).rotate(180 * n)
        if n:
            image.putalpha(Image.linear_gradient("L").resize(image.size))
        image.save(folder / f"tall{n}.png")
    return folder


def draw_before(folder):
    """A control image for each target: of its size, half as large, or lying with an EXIF orientation."""
    folder.mkdir()
    exif = Image.Exif()
    exif[274] = 6
    for n in range(2):
        noise(128, 40, n).save(folder / f"wide{n}.png")
    noise(32, 40, 2).save(folder / "tall0.webp", lossless=True)
    noise(64, 80, 3).rotate(90, expand=True).save(folder / "tall1.png", exif=exif)
    return folder


def draw_ref(folder):
    """A second control image for each target, of another shape."""
    folder.mkdir()
    for n in range(2):
        for name in ("wide", "tall"):
            noise(90, 70 + n, n + len(name)).save(folder / f"{name}{n}.png")
    return folder


@pytest.fixture
def targets(tmp_path):
    return draw_targets(tmp_path / "targets")


@pytest.fixture
def before(tmp_path):
    return draw_before(tmp_path / "before")


@pytest.fixture
def ref(tmp_path):
    return draw_ref(tmp_path / "ref")


def encode(run, source, out, *options, code=0):
    result = run("encode", source, "--out", out, *SMALL, "--no-cond", *options)
    assert result.code == code, result.err
    return result


# --- pixels


def load(tmp_path, target, control, **geometry):
    """The pixels of a target and its control image."""
    for name, image in (("targets", target), ("controls", control)):
        (tmp_path / name).mkdir(exist_ok=True)
        image.save(tmp_path / name / "x.png")
    found = load_saved(tmp_path, **geometry)
    assert len(found.controls) == 1
    return found


def load_saved(tmp_path, **geometry):
    """The pixels of a target and its control image, or the skip."""
    made = Geometry.from_options(resolution="64", bucket_step=32, min_side=32, seed=0, **geometry)
    recipe = LatentsRecipe.of(
        vae="x", geometry=made, images=ImageOptions(), flip=False, dtype="float32", store="mean", store_dtype="float16"
    )
    controls = (list_controls(tmp_path / "controls"),)
    (item,), _ = add_controls([read_item(tmp_path / "targets" / "x.png", "x.png")], controls)
    options = LoadOptions.from_recipe(Folder(str(tmp_path / "targets")), 8, None, recipe, controls=controls)
    return load_pixels(item, make_place(made, 8)(item.size), options)


GEOMETRIES = [
    {}, {"crop": "random", "crops": 3}, {"crop": "focus", "crops": 2}, {"fit": "pad"}, {"fit": "stretch"},
    {"upscale": False, "crop": "focus"}, {"width": 32, "height": 64}, {"width": 96, "height": 64, "crop": "random"},
]  # fmt: skip


def smooth(width, height):
    """A picture of large random spots, which copies of other sizes show too."""
    return noise(12, 8).resize((width, height), Image.Resampling.BICUBIC)


@pytest.mark.parametrize("geometry", GEOMETRIES, ids=str)
@pytest.mark.parametrize("scale", [0.5, 1, 2, 3])
def test_a_control_image_of_its_targets_shape_is_cut_at_the_same_place(tmp_path, geometry, scale):
    """The control image shows what its target does, at another size: so both must give the same pixels."""
    height = 70 if "upscale" in geometry else 60
    found = load(tmp_path, smooth(150, height), smooth(int(150 * scale), int(height * scale)), **geometry)
    (control,) = found.controls
    assert control.crops == found.crops
    one, other = found.pixels.astype(int), control.pixels.astype(int)
    assert not np.array_equal(one, other) or scale == 1
    assert np.abs(one - other).mean() < (3 if scale != 1 else 1e-9)
    for axis in (1, 2):  # it would be seen if it were a pixel off
        assert np.abs(one - np.roll(other, 1, axis)).mean() > 1.5 * np.abs(one - other).mean() + 1
    assert "control_fitted" not in found.notes


def test_the_saliency_of_the_target_counts_and_not_the_control_images(tmp_path):
    target, control = Image.new("RGB", (256, 64)), Image.new("RGB", (256, 64))
    target.paste(noise(40, 64), (200, 0))
    control.paste(noise(40, 64), (0, 0))
    found = load(tmp_path, target, control, crop="focus", width=64, height=64)
    assert found.crops[0][1] > 150
    assert found.controls[0].crops == found.crops


@pytest.mark.parametrize("geometry", [{"fit": "crop"}, {"fit": "pad"}, {"fit": "stretch"}], ids=str)
def test_a_control_image_of_another_shape_is_fitted_as_a_target_would_be(tmp_path, geometry):
    other = noise(50, 90)
    found = load(tmp_path, noise(150, 60), other, width=96, height=32, **geometry)
    alone = load(tmp_path, other, other, width=96, height=32, **geometry)
    assert np.array_equal(found.controls[0].pixels, alone.pixels)
    assert "control_fitted" in found.notes
    assert "control_fitted" not in alone.notes


def test_shapes_are_equal_but_for_a_pixel_of_the_smaller():
    sizes = [(height, width) for height in range(1, 40, 3) for width in range(1, 40, 4)]
    for height, width in sizes:
        for factor in (2, 3, 7):
            large = (height * factor, width * factor)
            for more in (-1, 1):  # as a copy that was made smaller is rounded
                assert has_shape_of((height, width), large)
                assert has_shape_of((max(1, height + more), width), large) or height + more < 1
    assert not has_shape_of((100, 100), (100, 102))
    assert not has_shape_of((50, 50), (100, 104))
    placement = fit_to((100, 100), (64, 64), "crop")
    assert place_control((50, 51), (100, 100), placement, "crop", True) is placement
    own = place_control((50, 80), (100, 100), placement, "crop", True)
    assert isinstance(own, Placement)
    assert own == fit_to((50, 80), (64, 64), "crop")
    assert place_control((1, 400), (100, 100), placement, "crop", True)[0] == "extreme_aspect"


def test_a_control_image_of_no_end_is_not_read(tmp_path, monkeypatch):
    load(tmp_path, noise(64, 64), noise(64, 64))
    with (tmp_path / "controls" / "x.png").open("r+b") as file:
        file.truncate(1 << 40)  # of no bytes on disk
    monkeypatch.setattr(Folder, "read", None)  # nothing is read
    skip = load_saved(tmp_path)
    assert (skip.reason, "expected at most" in skip.detail) == ("too_large", True)
    assert skip.detail.startswith(f"its control image {tmp_path}/controls/x.png: 1.1 TB")


def test_what_is_transparent_in_a_control_image_is_laid_over_white(tmp_path):
    control = Image.new("RGBA", (64, 64), (10, 20, 30, 0))
    control.paste((200, 100, 50, 255), (0, 0, 32, 64))
    found = load(tmp_path, noise(64, 64), control)
    assert found.weight is None  # which is of the target alone
    assert (found.controls[0].pixels[0, :, 33:] == 255).all()
    assert (found.controls[0].pixels[0, :, :31] == (200, 100, 50)).all()


# --- the cache


def test_latents_of_control_images_are_those_of_the_same_part(run, targets, before, ref, tmp_path):
    """Against Pillow and diffusers: resized as the target, cut where the row says, mirrored where it is."""
    result = encode(run, targets, tmp_path / "c", *MANY, "--control", before, "--control", ref, "--batch-size", 2)
    assert f"control  {before}: 4 of 4 images have one" in result.err
    assert "4 images with a control image of another shape" in result.out  # ref
    found, vae = rows(tmp_path / "c"), open_vae(TINY).load(torch.float32)
    assert len(found) == 4
    for key, row in found.items():
        (path,) = before.glob(f"{Path(key).stem}.*")
        control = ImageOps.exif_transpose(Image.open(path)).convert("RGB")
        for view in range(len(row["crop"])):
            (height, width), (top, left, rows_, columns) = (
                row["resized_size"][view].tolist(),
                row["crop"][view].tolist(),
            )
            part = control.resize((width, height), Image.Resampling.LANCZOS)
            part = part.crop((left, top, left + columns, top + rows_))
            part = ImageOps.mirror(part) if view % 2 else part
            mean, _ = reference(vae, np.array(part))
            assert torch.allclose(row["control_1"][view].float(), mean, atol=4e-3)
        assert row["control_2"].shape == row["latent_mean"].shape
    assert "nothing wrong" in run("verify", tmp_path / "c", "--source", targets, "--re-encode", 4).out
    assert "nothing to do" in run("encode", "--again", tmp_path / "c").out
    assert run("inspect", tmp_path / "c", "--json").out.count('"control_images": 2') == 1
    assert "control 1" in run("inspect", tmp_path / "c", "--key", "wide0.png").out


def test_what_is_a_target_elsewhere_has_the_same_latents_as_a_control_image(run, targets, ref, tmp_path):
    size = ("--width", 64, "--height", 32)
    assert run("encode", targets, "--out", tmp_path / "c", "--model", "tiny", *size, "--control", ref).code == 0
    assert run("encode", ref, "--out", tmp_path / "r", "--model", "tiny", *size).code == 0
    found, wanted = rows(tmp_path / "c"), rows(tmp_path / "r")
    assert all(torch.equal(found[key]["control_1"], wanted[key]["latent_mean"]) for key in found)


def test_caches_without_control_images_have_the_bytes_that_they_always_had(run, targets, before, tmp_path):
    encode(run, targets, tmp_path / "c")
    written = files(tmp_path / "c")
    assert not any(word in data for data in written.values() for word in (b"num_controls", b'"control"', b"/control_"))
    encode(run, targets, tmp_path / "with", "--control", before)
    plain, pairs = rows(tmp_path / "c"), rows(tmp_path / "with")
    for key, row in plain.items():
        for name in ("latent_mean", "latent_std", "crop", "original_size"):
            assert torch.equal(row[name], pairs[key][name])


def test_images_without_a_control_image_are_skips_that_heal(run, targets, before, tmp_path):
    (before / "wide1.png").rename(tmp_path / "away.png")
    result = encode(run, targets, tmp_path / "c", "--control", before)
    assert "skipped  1 no_control (wide1.png: control_1: no image of its path and stem)" in result.out
    assert "nothing to do" in encode(run, targets, tmp_path / "c", "--control", before).out
    (tmp_path / "away.png").rename(before / "wide1.png")
    assert "1 new" in encode(run, targets, tmp_path / "c", "--control", before).out
    (before / "wide1.png").rename(tmp_path / "away.png")
    assert "1 gone" in encode(run, targets, tmp_path / "c", "--control", before).out
    (tmp_path / "away.png").rename(before / "wide1.png")
    assert "1 returned" in encode(run, targets, tmp_path / "c", "--control", before).out
    assert len(rows(tmp_path / "c")) == 4


DAMAGES = {
    "io_error": lambda path: (path.unlink(), path.symlink_to(path.parent / "nothing")),
    "unreadable": lambda path: path.write_bytes(b"no image"),
    "truncated": lambda path: path.write_bytes(path.read_bytes()[:-400]),
    "extreme_aspect": lambda path: noise(4000, 1).save(path),
    "too_large": lambda path: noise(600, 600).save(path),
    "animated": lambda path: noise(128, 40).save(path, "gif", save_all=True, append_images=[noise(128, 40, 1)]),
}


def test_a_control_image_that_cannot_be_used_is_named(run, targets, before, tmp_path):
    for folder in (targets, before):
        for reason in DAMAGES:
            shutil.copy(folder / "wide0.png", folder / f"{reason}.png")
    for reason, damage in DAMAGES.items():
        damage(before / f"{reason}.png")
    options = ("--control", before, "--animated", "skip", "--max-megapixels", "0.3")
    encode(run, targets, tmp_path / "c", *options)
    skips = {skip.key.removesuffix(".png"): skip for skip in read_skips(Storage(tmp_path / "c"))}
    assert skips.keys() == DAMAGES.keys()
    for reason, skip in skips.items():
        assert skip.reason == reason
        assert skip.detail.startswith(f"its control image {before}/{reason}.png: ")
    assert len(rows(tmp_path / "c")) == 4
    for reason in DAMAGES:
        (before / f"{reason}.png").unlink()
        shutil.copy(before / "wide1.png", before / f"{reason}.png")
    encode(run, targets, tmp_path / "c", *options)
    assert len(rows(tmp_path / "c")) == 10


def test_a_changed_control_image_makes_one_row_anew(run, targets, before, tmp_path, monkeypatch):
    encode(run, targets, tmp_path / "c", "--control", before)
    old = rows(tmp_path / "c")
    noise(128, 40, 77).save(before / "wide1.png")
    (problem,) = json.loads(run("verify", tmp_path / "c", "--source", targets, "--json").out)["problems"]
    assert (problem["name"], problem["problem"]) == ("wide1.png", "changed")
    posterior, calls = VaeEncoder._posterior, []
    monkeypatch.setattr(VaeEncoder, "_posterior", lambda *a: calls.append(1) or posterior(*a))
    assert "1 changed" in encode(run, targets, tmp_path / "c", "--control", before).out
    assert len(calls) == 2  # the target, and its control image
    new = rows(tmp_path / "c")
    assert [key for key in new if not torch.equal(new[key]["control_1"], old[key]["control_1"])] == ["wide1.png"]
    assert run("verify", tmp_path / "c", "--source", targets).code == 0
    assert run("compact", tmp_path / "c", "--min-share", 0).code == 0
    assert run("verify", tmp_path / "c", "--source", targets).code == 0  # it still knows where its control images are
    packed = rows(tmp_path / "c")
    assert all(torch.equal(packed[key][name], new[key][name]) for key in new for name in ("control_1", "latent_mean"))
    for path in before.iterdir():  # copied, checked out
        os.utime(path, ns=(1, 1))
    calls.clear()
    assert "4 touched" in encode(run, targets, tmp_path / "c", "--control", before).out
    assert not calls


def test_folders_that_change_places_are_a_change(run, tmp_path):
    """Names and times are the same, and so are the sums of sizes: a sum would not tell."""
    for number, name in enumerate(("a", "b", "targets")):
        (tmp_path / name).mkdir()
        for n in range(3):
            noise(64, 64 + number, 10 * number + n).save(tmp_path / name / f"{n}.png")
            os.utime(tmp_path / name / f"{n}.png", ns=(5, 5))
    one, other = (("--control", tmp_path / a, "--control", tmp_path / b) for a, b in ("ab", "ba"))
    encode(run, tmp_path / "targets", tmp_path / "c", *one)
    old = rows(tmp_path / "c")
    assert "3 changed" in encode(run, tmp_path / "targets", tmp_path / "c", *other).out
    new = rows(tmp_path / "c")
    assert all(torch.equal(new[key]["control_1"], old[key]["control_2"]) for key in new)
    result = encode(
        run, tmp_path / "b", tmp_path / "c", "--control", tmp_path / "targets", "--control", tmp_path / "a", code=1
    )
    assert "3 of its 3 images have another content in SOURCE" in result.err


def test_a_run_that_is_stopped_ends_as_undisturbed(run, targets, before, ref, tmp_path, monkeypatch):
    options = ("--control", before, "--control", ref, "--flip")
    encode(run, targets, tmp_path / "whole", *options)
    posterior, done = VaeEncoder._posterior, stop_at(monkeypatch, 9)
    encode(run, targets, tmp_path / "c", *options, code=130)
    done.clear()
    monkeypatch.setattr(VaeEncoder, "_posterior", lambda *a: done.append(1) or posterior(*a))
    encode(run, targets, tmp_path / "c", *options)
    assert len(done) == 18  # of 24, since an image has 2 views of 3 each, and one was done
    assert files(tmp_path / "c") == files(tmp_path / "whole")


def test_what_overflows_in_a_control_image_alone(run, targets, before, tmp_path, monkeypatch):
    """In half precision it is encoded again; in float32 too: its pair is a skip."""
    start = VaeEncoder._start

    def overflows(encoder, pixels):
        mean, std = start(encoder, pixels)
        if numbers.pop(0):
            mean = mean.clone()
            mean[1] = torch.inf
        return mean, std

    monkeypatch.setattr(VaeEncoder, "_start", overflows)
    options = ("--control", before, "--batch-size", 2)
    numbers = [False, True, False, False]  # of two batches: targets, control images
    result = encode(run, targets, tmp_path / "half", *options, "--dtype", "bfloat16")
    assert "1 encoding done again in float32" in result.out
    assert len(rows(tmp_path / "half")) == 4
    numbers = [False, True, False, False]
    result = encode(run, targets, tmp_path / "c", *options)
    assert "skipped  1 non_finite (wide1.png: a control image: the VAE gives no finite latents" in result.out
    assert "wide1.png" not in rows(tmp_path / "c")
    assert "skipped  1 non_finite" in encode(run, targets, tmp_path / "c", *options).out


def test_a_full_memory_halves_batches_of_control_images_too(run, targets, before, tmp_path, monkeypatch):
    encode(run, targets, tmp_path / "whole", "--control", before, "--batch-size", 2)
    posterior, sizes = VaeEncoder._posterior, []

    def full(self, vae, pixels):
        sizes.append(len(pixels))
        if len(pixels) > 1 and len(sizes) > 1:  # the first, of targets, still fits
            raise RuntimeError("not enough memory: you tried to allocate 1 byte")
        return posterior(self, vae, pixels)

    monkeypatch.setattr(VaeEncoder, "_posterior", full)
    encode(run, targets, tmp_path / "c", "--control", before, "--batch-size", 2)
    assert sizes == [2, 2, 1, 1, *[1] * 4]
    found, wanted = rows(tmp_path / "c"), rows(tmp_path / "whole")
    assert all(torch.allclose(found[key]["control_1"], wanted[key]["control_1"], atol=1e-2) for key in wanted)


# --- reading


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """Where a cache of pairs is, and its images: two control images of each target, plain and mirrored."""
    folder = tmp_path_factory.mktemp("made")
    draw_targets(folder / "targets"), draw_before(folder / "before"), draw_ref(folder / "ref")
    done = latentprep.encode(
        folder / "targets", folder / "c", control=[folder / "before", folder / "ref"], flip=True, no_cond=True,
        model="tiny", resolution=64, bucket_step=32, min_side=32, progress=False,
    )  # fmt: skip
    assert done.num_cached == 4
    return folder


@pytest.fixture
def cache(made, tmp_path):
    """A copy of it, to be changed."""
    return shutil.copytree(made / "c", tmp_path / "copy")


def test_batches_have_the_latents_of_control_images(made):
    stored = rows(made / "c")
    data = LatentDataset(made / "c", latent_sampling_method="random", flip_p=0.5, include_cond=False)
    assert "2 control images" in repr(data)
    assert data.num_controls == 2
    views = set()
    for batch in LatentLoader(data, 3, seed=1):
        assert "2 control images" in repr(batch)
        assert not batch.fields
        one, two = batch.control
        for n, index in enumerate(batch.index.tolist()):
            view = int(batch.flipped[n])
            views.add(view)
            for found, name in ((one, "control_1"), (two, "control_2")):
                wanted = data.normalization.apply(stored[data.key(index)][name][view].float()[None])[0]
                assert torch.equal(found[n], wanted)
        assert one.shape == batch.latent_sample.shape
        assert {control.dtype for control in batch.to(torch.bfloat16).control} == {torch.bfloat16}
        assert all(control.is_meta for control in batch.to("meta").control)
        again = pickle.loads(pickle.dumps(batch))
        assert all(torch.equal(*pair) for pair in zip(again.control, batch.control, strict=True))
        assert all(values.dtype == torch.float16 for values in batch.stored_control.values())  # as stored: less to move
    assert views == {0, 1}
    part = data.select("wide*")
    assert [len(batch.control) for batch in LatentLoader(part, 4)] == [2]


def test_a_cache_without_has_none_and_is_not_mixed_with_one(run, targets, made, tmp_path):
    encode(run, targets, tmp_path / "plain")
    pairs, plain = (LatentDataset(folder, include_cond=False) for folder in (made / "c", tmp_path / "plain"))
    assert plain[0].control is None
    assert "control" not in repr(plain) + repr(plain[0])
    with pytest.raises(
        UserError, match=r"^LatentMix: \[1\] has 2 control images of each image, \[0\] has 0. Give"
    ) as error:
        LatentMix([plain, pairs])
    assert "\n" not in str(error.value)
    assert len(list(LatentLoader([pairs, pairs], 4)))


def test_the_loops_of_the_page_give_a_pipelines_own_tokens(made):
    """Hidden states and positions against FluxKontextPipeline.prepare_latents and Flux2Pipeline's."""
    kontext, flux2 = re.findall(r"^```py\n(.*?)^```", PAGE.partition("## Edit pairs")[2], re.MULTILINE | re.DOTALL)
    batch = next(iter(LatentLoader(LatentDataset(made / "c", include_cond=False).select("wide*"), 2)))
    noisy, asked = torch.randn_like(batch.latent_sample), {}
    size, device, dtype = noisy.shape, noisy.device, noisy.dtype

    def transformer(**arguments):
        asked.update(arguments)
        return (asked["hidden_states"],)

    scope = {"batch": batch, "noisy": noisy, "transformer": transformer, "torch": torch, "others": {}}
    exec(kontext, scope)
    pipeline = SimpleNamespace(
        vae_scale_factor=8, latent_channels=size[1], _pack_latents=FluxKontextPipeline._pack_latents,
        _prepare_latent_image_ids=FluxKontextPipeline._prepare_latent_image_ids,
    )  # fmt: skip
    packed, control, ids, control_ids = FluxKontextPipeline.prepare_latents(
        pipeline, batch.control[0], size[0], size[1], size[2] * 8, size[3] * 8, dtype, device, latents=None
    )
    assert asked["hidden_states"].shape[1] == packed.shape[1] + control.shape[1]
    assert torch.equal(asked["hidden_states"][:, packed.shape[1] :], control)
    assert torch.equal(asked["img_ids"], torch.cat([ids, control_ids]))
    own = FluxKontextPipeline._pack_latents(noisy, *size)
    assert torch.equal(scope["predicted"], own)
    asked.clear()
    exec(flux2, scope)
    ids = [
        Flux2Pipeline._prepare_latent_ids(noisy)[:1],
        Flux2Pipeline._prepare_image_ids([c[:1] for c in batch.control]),
    ]
    assert torch.equal(asked["img_ids"], torch.cat(ids, dim=1).expand(size[0], -1, -1))
    tokens = [Flux2Pipeline._pack_latents(image) for image in (noisy, *batch.control)]
    assert torch.equal(asked["hidden_states"], torch.cat(tokens, dim=1))
    assert torch.equal(scope["predicted"], tokens[0])


def rewritten(cache, change):
    """A cache whose groups somebody has changed."""
    storage = Storage(cache)
    (entry,) = open_manifest(storage).shards
    latents = open_latents(storage, entry.id)
    write_latents(storage, entry.id, type(latents)([change(group) for group in latents.groups], latents.metadata))
    return cache


@pytest.mark.parametrize(
    "change",
    [
        lambda group: group.having(control_2=None),
        lambda group: group.having(control_1=None),
        lambda group: group.having(control_3=group.control_1.clone()),
        lambda group: group.having(control_1=group.control_1.float()),
        lambda group: group.having(control_1=group.control_1[..., :2].contiguous()),
        lambda group: group.having(control_1=group.control_1[:, :1].contiguous()),
        lambda group: group.having(control_1=group.control_1[:1].contiguous()),
    ],
)
def test_files_that_do_not_hold_what_the_manifest_promises(run, cache, change):
    rewritten(cache, change)
    with pytest.raises(UserError, match=r"latents.safetensors: "):
        LatentDataset(cache, include_cond=False)[0]
    problems = {problem["problem"] for problem in json.loads(run("verify", cache, "--json").out)["problems"]}
    assert problems & {"control", "dtype", "structure"}


def test_numbers_that_are_not_finite_are_found(run, cache):
    broken = lambda group: group.having(control_2=torch.full_like(group.control_2, torch.inf))  # noqa: E731
    rewritten(cache, broken)
    assert "control_2: 2 rows" in run("verify", cache).out


@pytest.mark.parametrize("value", [0, 5, "1", True, 1])
def test_a_manifest_with_another_number_of_control_images(cache, value):
    path = cache / "cache.json"
    text = path.read_text()
    assert '"num_controls": 2' in text
    body = text.replace('"num_controls": 2', f'"num_controls": {json.dumps(value)}').rpartition(' "blake2b"')[0]
    path.write_text(body + _seal(body))
    expected = "does not fit|do not fit" if value == 1 and value is not True else "not a complete manifest"
    with pytest.raises(UserError, match=expected):
        LatentDataset(cache, include_cond=False)[0]


# --- options


def test_another_number_of_control_images_is_another_recipe(run, targets, made, before):
    result = encode(run, targets, made / "c", "--flip", "--control", before, code=1)
    assert "holds a cache of another recipe (control images 2 -> 1; cache -> asked)" in result.err
    result = encode(run, targets, made / "c", "--flip", code=1)
    assert "(control images 2 -> none; cache -> asked)" in result.err


def test_verify_takes_folders_that_have_moved(run, targets, before, ref, tmp_path):
    encode(run, targets, tmp_path / "c", "--control", before, "--control", ref)
    shutil.move(before, tmp_path / "elsewhere")
    command = ("verify", tmp_path / "c", "--source", targets)
    result = run(*command)
    assert result.err == f"error: --control {before}: no such folder. Give that of this cache's control images.\n"
    assert run(*command, "--control", tmp_path / "elsewhere", "--control", ref, "--re-encode", 3).code == 0
    result = run(*command, "--control", tmp_path / "elsewhere")
    assert result.err.startswith("error: --control: got 1 folder, this cache has 2 control images of each image. Give")


@pytest.mark.parametrize(
    ("folders", "message"),
    [
        (["nowhere"], "--control {0}: expected a folder of images, and there is no such folder."),
        (["empty"], "--control {0}: no control images in it."),
        (["others"], "--control {0}: none of its images has the path and stem of an image in SOURCE."),
        (["double"], "--control {0}: wide0.jpg and wide0.png are two control images of one image. Remove one."),
        (["targets"], "--control {0}: holds SOURCE {0} itself. Targets and control images need folders of their own."),
        (["before"] * 5, "--control: 5 folders, expected at most 4."),
    ],
)
def test_folders_that_are_refused_in_one_line(run, targets, before, tmp_path, folders, message):
    for name, inner in (("empty", []), ("others", ["z.png"]), ("double", ["wide0.png", "wide0.jpg"])):
        (tmp_path / name).mkdir()
        for own in inner:
            noise(8, 8).save(tmp_path / name / own)
    given = [part for name in folders for part in ("--control", tmp_path / name)]
    result = encode(run, targets, tmp_path / "c", *given, code=1)
    assert result.err.splitlines()[-1].startswith("error: " + message.format(tmp_path / folders[0]))
    assert not (tmp_path / "c").exists()


def test_a_disk_that_vanishes_is_no_folder_of_few_images(run, targets, before, tmp_path, monkeypatch):
    monkeypatch.setattr(Folder, "is_there", lambda folder: folder.where != str(before))
    result = encode(run, targets, tmp_path / "c", "--control", before, code=1)
    assert f"--control {before}: vanished while it was listed. Mount it again" in result.err


def test_control_images_inside_the_image_folder_are_no_targets(run, targets, before, tmp_path):
    shutil.move(before, targets / "before")
    encode(run, targets, tmp_path / "c", "--control", targets / "before", "--weights", targets / "before")
    assert all(row["weight"].shape == row["control_1"][:, 0].shape for row in rows(tmp_path / "c").values())
    assert len(rows(tmp_path / "c")) == 4
    assert run("verify", tmp_path / "c", "--source", targets, "--re-encode", 2).code == 0


def test_control_images_may_lie_in_tars(run, targets, before, tmp_path):
    for folder in (targets, before):
        (tmp_path / f"{folder.name}-tars").mkdir()
        with tarfile.open(tmp_path / f"{folder.name}-tars" / "0.tar", "w") as tar:
            for path in sorted(folder.iterdir()):
                tar.add(path, path.name)
    encode(run, targets, tmp_path / "plain", "--control", before)
    encode(run, tmp_path / "targets-tars", tmp_path / "c", "--control", tmp_path / "before-tars")
    found, wanted = rows(tmp_path / "c"), rows(tmp_path / "plain")
    assert all(torch.equal(found[f"0.tar/{key}"]["control_1"], wanted[key]["control_1"]) for key in wanted)


def test_each_set_has_control_images_of_its_own(run, before, tmp_path):
    """In a file their paths begin at the file; what is one set's comes from its own folder."""
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        (tmp_path / f"{name}-before").mkdir()
        noise(64, 64, ord(name)).save(tmp_path / name / "x.png")
        noise(64, 64, ord(name) + 9).save(tmp_path / f"{name}-before" / "x.png")
    sets = '[[set]]\nsource = "a"\ncontrol = "a-before"\n\n[[set]]\nsource = "b"\ncontrol = ["b-before"]\n'
    (tmp_path / "sets.toml").write_text(sets, encoding="utf-8")
    encode(run, tmp_path / "sets.toml", tmp_path / "c")
    found = rows(tmp_path / "c")
    vae = open_vae(TINY).load(torch.float32)
    for name in ("a", "b"):
        mean, _ = reference(vae, np.array(noise(64, 64, ord(name) + 9)))
        assert torch.allclose(found[f"{name}/x.png"]["control_1"][0].float(), mean, atol=4e-3)
    assert run("verify", tmp_path / "c", "--source", tmp_path / "sets.toml", "--re-encode", 2).code == 0
    (tmp_path / "sets.toml").write_text(sets.replace('control = ["b-before"]\n', ""), encoding="utf-8")
    result = encode(run, tmp_path / "sets.toml", tmp_path / "d", code=1)
    assert "control: set a has 1, set b has 0. A cache has as many of each image" in result.err
    result = encode(run, tmp_path / "sets.toml", tmp_path / "d", "--control", before, code=1)
    assert "with several sets each has its own control images. Give the folder to its set." in result.err


def test_in_python_and_in_files_of_options(targets, before, ref, tmp_path):
    options = {"model": "tiny", "resolution": 64, "bucket_step": 32, "min_side": 32, "no_cond": True, "progress": False}
    for name, control in (("one", before), ("two", [before, str(ref)])):
        assert latentprep.encode(targets, tmp_path / name, control=control, **options).num_encoded == 4
        assert "nothing to do" in latentprep.encode(again=tmp_path / name, progress=False).report
    (tmp_path / "options.toml").write_text('control = ["before", "ref"]\n', encoding="utf-8")
    done = latentprep.encode(targets, tmp_path / "two", options=tmp_path / "options.toml", **options)
    assert "nothing to do" in done.report
    with pytest.raises(UserError, match=r"^control: is empty, expected a folder of images\."):
        latentprep.encode(targets, tmp_path / "d", control=[""], **options)
    with pytest.raises(UserError, match="expected a text or a path or a list of paths or None"):
        latentprep.encode(targets, tmp_path / "d", control=[1], **options)


def test_a_dry_run_counts_control_images(run, targets, made, tmp_path):
    found = []
    for options in ((), ("--control", made / "before"), ("--control", made / "before", "--control", made / "ref")):
        result = encode(run, targets, tmp_path / "d", "--store", "mean", "--dry-run", *options)
        found.append(float(re.search(r"disk: about ([\d.]+) kB of latents", result.out)[1]))
    assert 1.7 < found[1] / found[0] < 2.1
    assert 1.3 < found[2] / found[1] < 1.6
    assert not (tmp_path / "d").exists()
