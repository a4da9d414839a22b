"""prepare/preview.py, look/samples.py, previews.py: a contact sheet shows what is in a cache, and says how."""

import json
import os
import shutil
import tarfile
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

import latentprep
from latentprep import UserError, sheet
from latentprep.cache.group import LatentGroup
from latentprep.cache.manifest import open_manifest, pack
from latentprep.cache.storage import Storage
from latentprep.look.samples import RANDOM, RANKINGS, choose_samples, distances
from latentprep.options import SHOWS
from latentprep.prepare import preview_source
from latentprep.prepare.latent_colors import fit_map, project
from latentprep.prepare.preview_source import check_geometry
from tests.conftest import SMALL, TINY, gradient, make_model, spoil_latents

OPTIONS = {"model": "tiny", "resolution": 64, "bucket_step": 32, "min_side": 32, "device": "cpu", "progress": False}


@pytest.fixture
def drawn(monkeypatch):
    """What the last sheet was drawn of: heading, warnings, cards by their keys."""
    seen = SimpleNamespace(num=0)
    draw = sheet.draw_sheet

    def note(heading, warnings, cards):
        seen.heading, seen.warnings, seen.cards, seen.num = heading, warnings, cards, seen.num + 1
        seen.by_key = {card.key: card for card in cards}
        return draw(heading, warnings, cards)

    monkeypatch.setattr(sheet, "draw_sheet", note)
    return seen


@pytest.fixture
def cache(images, tmp_path):
    assert latentprep.encode(images, tmp_path / "c", **OPTIONS).ok
    return tmp_path / "c"


def preview(cache, **options):
    return latentprep.preview(cache, **{"progress": False, **options})


def pixels(picture):
    return np.asarray(picture.image).astype(float)


def difference(one, other):
    """Mean absolute difference of two pictures of one size, in levels."""
    return np.abs(pixels(one) - pixels(other)).mean()


def is_closer(one, other):
    """Whether two pictures are alike, and less so if one is turned, or its colours change places."""
    wrong = (one.image.rotate(180), Image.merge("RGB", one.image.split()[::-1]), Image.new("RGB", one.image.size))
    return difference(one, other) < 0.8 * min(difference(SimpleNamespace(image=image), other) for image in wrong)


# what is shown


def test_source_crop_latents_and_weight_stand_side_by_side(cache, images, drawn):
    image = preview(cache)
    assert image.mode == "RGB"
    assert len(drawn.cards) == 8
    assert drawn.warnings == []
    assert drawn.heading[1:] == ["8 samples of 8 images, at random (seed 0)", "decoded by the cache's own VAE, tiny"]
    for key, card in drawn.by_key.items():
        source, trained, decoded, weight = card.pictures
        own = Image.open(images / key).convert("RGB")
        assert source.title == f"source {own.width}x{own.height}"
        assert np.array_equal(pixels(source), np.asarray(own))
        height, width = trained.image.height, trained.image.width
        assert (trained.title, decoded.title) == (f"as trained {width}x{height}", "decoded")
        assert (decoded.image.height, decoded.image.width) == (height, width)
        assert (weight.image is not None) == own.info.get("transparency", key in ("tall1.png", "tall3.png"))
    assert drawn.by_key["tall1.png"].caption == "picture number 1"
    assert drawn.by_key["wide1.png"].caption == "wide1"
    assert drawn.by_key["wide1.png"].pictures[3].title == "weight 1"


def test_decoded_latents_look_as_what_the_vae_was_given(photos, tmp_path, drawn):
    assert latentprep.encode(photos, tmp_path / "c", **{**OPTIONS, "resolution": 128}, flip=True).ok
    preview(tmp_path / "c")
    assert len(drawn.cards) == 12
    for card in drawn.cards:
        _, trained, decoded = card.pictures
        assert decoded.image.size == trained.image.size
        assert is_closer(decoded, trained), card.key


def test_a_crop_is_the_box_that_the_cache_names(cache, drawn):
    preview(cache)
    for key, card in drawn.by_key.items():
        sample = latentprep.inspect(cache, key=key)
        (top, left, height, width), resized = sample["crop"][0], sample["resized_size"]
        crop = card.pictures[0].crop
        assert (crop.top * resized[0], crop.left * resized[1]) == pytest.approx((top, left))
        assert (crop.bottom * resized[0], crop.right * resized[1]) == pytest.approx((top + height, left + width))


def fixed(images, out, **options):
    """Encode to 64x64."""
    sizes = ("resolution", "bucket_step", "min_side")
    kept = {name: value for name, value in OPTIONS.items() if name not in sizes}
    assert latentprep.encode(images, out, **kept, width=64, height=64, **options).ok
    return out


@pytest.mark.parametrize("crop", ["center", "random", "focus"])
def test_what_was_trained_is_what_lies_in_the_box(images, tmp_path, drawn, crop):
    preview(fixed(images, tmp_path / "c", crop=crop), pattern="wide*")
    for card in drawn.cards:
        source, trained, *_ = card.pictures
        box, (width, height) = source.crop, source.image.size
        assert box.right - box.left < 0.6
        edges = (box.left * width, box.top * height, box.right * width, box.bottom * height)
        cut = source.image.resize(trained.image.size, Image.Resampling.LANCZOS, box=edges)
        assert difference(trained, SimpleNamespace(image=cut)) < 2
        assert difference(trained, SimpleNamespace(image=source.image.resize(trained.image.size))) > 5


def test_mirrored_views_are_mirrored_and_marked(images, tmp_path, drawn):
    assert latentprep.encode(images, tmp_path / "c", **OPTIONS, flip=True).ok
    preview(tmp_path / "c", pattern="tall1.png")
    plain, mirrored = drawn.cards
    assert [card.pictures[1].title for card in drawn.cards] == ["as trained 64x64", "as trained 64x64, mirrored"]
    assert [picture.is_marked for picture in plain.pictures] == [False] * 4
    assert all(picture.title.endswith("mirrored") == picture.is_marked for picture in mirrored.pictures)
    assert [picture.is_marked for picture in mirrored.pictures] == [False, True, True, True]
    assert np.array_equal(pixels(plain.pictures[1])[:, ::-1], pixels(mirrored.pictures[1]))
    assert difference(mirrored.pictures[1], mirrored.pictures[2]) < 40
    assert np.array_equal(pixels(plain.pictures[3])[:, ::-1], pixels(mirrored.pictures[3]))
    preview(tmp_path / "c", num=8)  # more views than are to be shown: images take turns with them
    assert [bool(card.pictures[1].is_marked) for card in drawn.cards] == [False, True] * 4


def test_padding_reaches_beyond_the_image_and_weighs_nothing(images, tmp_path, drawn):
    preview(fixed(images, tmp_path / "c", fit="pad"), pattern="wide0.png")
    source, trained, _, weight = drawn.cards[0].pictures
    assert source.crop.top < -0.5
    assert source.crop.bottom > 1.5
    assert (source.crop.left, source.crop.right) == (0, 1)
    assert trained.image.size == (64, 64)
    assert pixels(weight)[0].max() == 0
    assert pixels(weight)[4].min() == 255


def test_an_image_that_is_turned_by_exif_is_shown_upright(tmp_path, drawn):
    (tmp_path / "images").mkdir()
    exif = Image.Exif()
    exif[274] = 6
    gradient(60, 96).rotate(90, expand=True).save(tmp_path / "images" / "a.png", exif=exif)
    assert latentprep.encode(tmp_path / "images", tmp_path / "c", **OPTIONS).ok
    preview(tmp_path / "c")
    assert drawn.cards[0].pictures[0].title == "source 60x96"
    assert np.array_equal(pixels(drawn.cards[0].pictures[0]), np.asarray(gradient(60, 96)))


def test_control_images_have_their_latents_shown(images, tmp_path, drawn):
    (tmp_path / "before").mkdir()
    for path in images.glob("*.png"):
        Image.new("RGB", Image.open(path).size, (200, 30, 30)).save(tmp_path / "before" / path.name)
    assert latentprep.encode(images, tmp_path / "c", **OPTIONS, control=tmp_path / "before", weights="none").ok
    preview(tmp_path / "c")
    assert drawn.warnings == []
    for card in drawn.cards:
        *_, control = card.pictures
        assert control.title == "control 1"
        red, green, blue = pixels(control).mean((0, 1))
        assert red > green + 60 < blue + 120
        assert card.warnings == []
    shutil.rmtree(tmp_path / "before")
    preview(tmp_path / "c")
    assert drawn.warnings == [
        f"whether images have changed is not known: --control {tmp_path / 'before'}: no such folder."
    ]
    assert all(card.pictures[0].image is not None for card in drawn.cards)


def test_masks_count_when_it_is_told_whether_an_image_changed(images, tmp_path, drawn):
    (tmp_path / "masks").mkdir()
    for path in images.glob("tall*.png"):
        Image.linear_gradient("L").resize(Image.open(path).size).save(tmp_path / "masks" / path.name)
    assert latentprep.encode(images, tmp_path / "c", **OPTIONS, weights=tmp_path / "masks").ok
    preview(tmp_path / "c")
    assert [card.key for card in drawn.cards if card.warnings] == []
    assert drawn.by_key["tall0.png"].pictures[3].title == "weight, mean 0.50"
    Image.new("L", (64, 80), 9).save(tmp_path / "masks" / "tall0.png")
    preview(tmp_path / "c")
    assert [card.key for card in drawn.cards if card.warnings] == ["tall0.png"]


# what is wrong with images


def test_one_bad_image_never_stops_the_sheet(cache, images, drawn, monkeypatch):
    (images / "wide0.png").unlink()
    (images / "wide1.png").write_bytes(b"no image")
    data = (images / "wide2.png").read_bytes()
    (images / "wide2.png").write_bytes(data[: len(data) // 2])
    gradient(50, 50).save(images / "tall0.png")
    gradient(64, 80).rotate(180).save(images / "tall1.png")
    (images / "tall2.png").unlink()
    (images / "tall2.png").mkdir()

    decode = preview_source.decode

    def fail_once(data, item, *more):
        if item.key == "tall3.png":
            raise ZeroDivisionError("a bug\x1b[2J")
        return decode(data, item, *more)

    monkeypatch.setattr(preview_source, "decode", fail_once)
    preview(cache)
    assert len(drawn.cards) == 8
    says = {key: card.pictures[0].says for key, card in drawn.by_key.items()}
    assert "No such file" in says["wide0.png"]
    assert says["wide1.png"].startswith("changed since: its bytes are of no image format")
    assert says["wide2.png"].startswith("changed since: ")
    assert says["tall0.png"] == "changed since: was 64x80 when listed, now 50x50: run again"
    assert (says["tall1.png"], drawn.by_key["tall1.png"].warnings) == ("", ["changed since it was encoded"])
    assert "not a regular file" in says["tall2.png"]
    assert says["tall3.png"].startswith("ZeroDivisionError")
    assert says["wide3.png"] == ""
    for card in drawn.cards:  # latents are shown all the same
        assert card.pictures[2].image is not None
        assert card.pictures[0].crop is not None


def test_an_image_beyond_the_limit_is_not_decoded(cache, drawn, monkeypatch):
    before = Image.MAX_IMAGE_PIXELS
    monkeypatch.setattr(preview_source, "MAX_PIXELS", 5000)
    preview(cache)
    assert "5120 pixels) exceeds limit of 5000 pixels" in drawn.by_key["tall0.png"].pictures[0].says
    assert before == Image.MAX_IMAGE_PIXELS


@pytest.mark.parametrize(
    ("field", "values", "problem"),
    [
        ("crop", (-(2**30), 0, 64, 64), "its crop in the cache lies outside of the image"),
        ("crop", (0, 2**30, 64, 64), "its crop in the cache lies outside of the image"),
        ("crop", (0, 0, 2**30, 64), "its sizes in the cache fit no image"),
        ("resized_size", (0, 64), "its sizes in the cache fit no image"),
        ("original_size", (-1, 5), "its sizes in the cache fit no image"),
        ("crop", (-63, 0, 64, 64), ""),
    ],
)
def test_sizes_that_a_stranger_wrote_are_not_computed_with(field, values, problem):
    group = LatentGroup(
        "h64w64", original_size=torch.tensor([[80, 64]]), resized_size=torch.tensor([[[80, 64]]]),
        crop=torch.tensor([[[8, 0, 64, 64]]]), latent_mean=torch.zeros(1, 1, 4, 8, 8),
    )  # fmt: skip
    assert check_geometry(group, 0, 8) == ""
    getattr(group, field).reshape(-1)[:] = torch.tensor(values)
    assert check_geometry(group, 0, 8) == problem


# how latents are decoded


def test_another_vae_is_refused_and_never_used(run, images, tmp_path, drawn):
    model = make_model(tmp_path / "model")
    assert run("encode", images, "--out", tmp_path / "c", *SMALL[2:], "--model", model).code == 0
    image = tmp_path / "sheet.png"
    result = run("inspect", tmp_path / "c", "--preview", image, "--vae", "tiny")
    assert (result.code, image.exists()) == (1, False)
    assert result.err.startswith("error: --vae tiny: its VAE is ")
    with pytest.raises(UserError, match=r"^model='tiny': its VAE is .*, this cache was made with "):
        preview(tmp_path / "c", model="tiny")
    shutil.rmtree(model)
    make_model(tmp_path / "model", seed=1)  # another one in its place
    result = run("inspect", tmp_path / "c", "--preview", image)
    assert (result.code, image.exists()) == (0, True)
    assert f"note     not decoded by its VAE: --model {model}: its VAE is " in result.err
    assert "latents  colours by a linear map of each latent" in result.err
    assert drawn.heading[2].startswith("colours by a linear map")
    assert drawn.warnings[0].startswith("not decoded by its VAE: ")
    assert {card.pictures[2].title for card in drawn.cards} == {"linear map"}


@pytest.fixture
def without_vae(images, tmp_path):
    """A cache whose VAE is gone; it is that of tiny."""
    return encode_and_lose(images, tmp_path / "c")


def encode_and_lose(images, out, **options):
    model = out.parent / "model"
    shutil.copytree(TINY, model)
    assert latentprep.encode(images, out, **{**OPTIONS, "model": str(model), **options}).ok
    shutil.rmtree(model)
    return out


def test_without_its_vae_a_linear_map_is_fitted_to_the_images(photos, tmp_path, drawn):
    cache = encode_and_lose(photos, tmp_path / "c", resolution=128, flip=True)
    preview(cache)
    assert len(drawn.warnings) == 1
    for card in drawn.cards:
        _, trained, linear = card.pictures
        small = SimpleNamespace(image=trained.image.resize(linear.image.size, Image.Resampling.BOX))
        assert linear.title.startswith("linear map")
        assert is_closer(linear, small), card.key
    preview(cache, vae="tiny")
    assert (drawn.warnings, drawn.cards[0].pictures[2].title) == ([], "decoded")


def test_images_that_have_changed_do_not_bend_the_map(without_vae, images, drawn):
    preview(without_vae)
    before = {key: pixels(card.pictures[2]) for key, card in drawn.by_key.items()}
    for n in range(3):
        Image.new("RGB", (128, 40), (255, 0, 255)).save(images / f"wide{n}.png")
    preview(without_vae)
    after = {key: pixels(card.pictures[2]) for key, card in drawn.by_key.items()}
    assert max(np.abs(before[key] - after[key]).mean() for key in before) < 20


def test_without_vae_and_source_colours_are_false_and_said_to_be(run, without_vae, images, drawn):
    shutil.rmtree(images)
    result = run("inspect", without_vae, "--preview", without_vae.parent / "s.png")
    assert result.code == 0
    assert f"note     no images: --source {images}: no such folder" in result.err
    assert "latents  false colours: the three principal components" in result.err
    assert [line.partition(":")[0] for line in drawn.warnings] == ["no images", "not decoded by its VAE"]
    assert drawn.heading[2].startswith("false colours")
    for card in drawn.cards:
        source, false, _ = card.pictures
        assert (source.says, false.title) == ("no source", "false colours")
        assert source.crop is not None
        assert pixels(false).std() > 10
    with pytest.raises(UserError, match=r"^source='nowhere': no such folder"):
        preview(without_vae, source="nowhere")


def test_a_folder_of_an_encoder_alone_is_said_to_have_no_decoder(images, tmp_path, drawn):
    from safetensors.torch import load_file, save_file

    shutil.copytree(TINY, tmp_path / "model")
    weights = tmp_path / "model" / "vae" / "diffusion_pytorch_model.safetensors"
    save_file({name: t for name, t in load_file(weights).items() if not name.startswith("decoder")}, weights)
    options = {**OPTIONS, "model": str(tmp_path / "model")}
    assert latentprep.encode(images, tmp_path / "c", **options).ok
    preview(tmp_path / "c")
    assert "no decoder can be read of it" in drawn.warnings[0]
    assert drawn.cards[0].pictures[2].title == "linear map"


def test_a_vae_that_was_in_memory_alone_is_said_to_be(cache, drawn):
    manifest = open_manifest(Storage(cache))
    recipe = replace(manifest.recipe, latents=replace(manifest.recipe.latents, vae="1.2.3"))
    (cache / "cache.json").write_bytes(pack(replace(manifest, recipe=recipe)))
    preview(cache)
    assert drawn.warnings == [
        "not decoded by its VAE: the cache was made with a model in the memory of a program, which no file has."
    ]
    with pytest.raises(UserError, match="in the memory of a program"):
        preview(cache, model="tiny")


def test_no_model_is_downloaded_unless_it_was_named(images, tmp_path, drawn, monkeypatch):
    import huggingface_hub

    calls = []

    def download(name, *, local_files_only=False, **_):
        calls.append((name, local_files_only))
        raise OSError("no network in tests")

    assert latentprep.encode(images, tmp_path / "c", **OPTIONS).ok
    storage = Storage(tmp_path / "c")
    manifest = open_manifest(storage)
    other = replace(manifest, made_with=replace(manifest.made_with, model="owner/name"))
    (tmp_path / "c" / "cache.json").write_bytes(pack(other))
    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    preview(tmp_path / "c")
    assert calls == [("owner/name", True)]
    assert "--model owner/name: is not on this machine" in drawn.warnings[0]
    with pytest.raises(UserError, match="the hub cannot be reached"):
        preview(tmp_path / "c", model="owner/name")
    assert calls[-1] == ("owner/name", False)


def test_latents_too_large_to_decode_are_named_on_their_picture(cache, drawn, monkeypatch):
    from latentprep.prepare.models import vae_decoder

    monkeypatch.setattr(vae_decoder, "MAX_PIXELS", 64 * 64 - 1)
    preview(cache)
    assert drawn.by_key["tall0.png"].pictures[2].says == "64x64 is too large to decode, expected at most 4,095 pixels"
    assert drawn.by_key["wide0.png"].pictures[2].image is not None


def test_a_linear_map_finds_the_colours_that_latents_were_made_of():
    rng = np.random.default_rng(0)
    image = rng.integers(0, 256, (16, 24, 3)).astype(np.uint8).repeat(8, 0).repeat(8, 1)
    small = torch.from_numpy(image[::8, ::8].copy()).permute(2, 0, 1).float() / 255
    latents = torch.stack([small[0] - small[1], 2 * small[2] + 1, -3 * small[1], small.sum(0)])
    found = fit_map([(latents, image)])
    assert np.abs(found.paint(latents).astype(int) - image[::8, ::8]).max() <= 1
    assert fit_map([]) is None
    assert fit_map([(torch.full((4, 2, 2), torch.nan), image[:16, :16])]) is None


@pytest.mark.parametrize("channels", [1, 2, 4, 300])
def test_false_colours_are_of_any_number_of_channels_and_the_same_each_time(channels):
    latents = torch.randn(channels, 6, 9, generator=torch.Generator().manual_seed(0))
    one, other = (project([latents, latents]).paint(latents) for _ in range(2))
    assert one.shape == (6, 9, 3)
    assert np.array_equal(one, other)
    assert one.std() > 10
    assert project([torch.full((4, 2, 2), torch.nan)]) is not None


# which samples


def test_the_same_command_gives_the_same_sheet(cache, drawn):
    one, two, other = (preview(cache, num=3, seed=seed) for seed in (5, 5, 6))
    assert one.tobytes() == two.tobytes()
    assert one.tobytes() != other.tobytes()
    assert drawn.heading[1] == "3 samples of 8 images, at random (seed 6)"


def test_show_ranks_by_crop_and_weight(cache, drawn):
    preview(cache, show="weight")
    assert sorted(card.key for card in drawn.cards) == ["tall1.png", "tall3.png"]
    assert all(card.note == "mean weight 0.50" for card in drawn.cards)
    preview(cache, show="crop", num=5)
    losses = {image["key"]: image["cropped_away"] for image in latentprep.inspect(cache)["cropped"]["images"]}
    assert [card.note for card in drawn.cards] == [f"{losses[card.key]:.0%} cropped away" for card in drawn.cards]
    assert drawn.cards[0].note == f"{max(losses.values()):.0%} cropped away"


def test_latents_furthest_from_the_usual_come_first(cache, drawn):
    storage, measures = Storage(cache), {}
    for shard in open_manifest(storage).shards:
        for group, words in zip(shard.open_latents(storage).groups, shard.open_text(storage).groups, strict=True):
            for key, latents in zip(words.key, group.latent_mean[:, 0].double().numpy(), strict=True):
                measures[key] = np.concatenate([latents.mean((1, 2)), latents.std((1, 2))])
    table = np.array(list(measures.values()))
    far = np.sqrt((((table - table.mean(0)) / table.std(0)) ** 2).mean(1))
    wanted = sorted(zip(far, measures, strict=True), reverse=True)[:3]
    preview(cache, show="outliers", num=3)
    assert [(card.key, card.note) for card in drawn.cards] == [
        (key, f"{score:.1f} std from the usual latents") for score, key in wanted
    ]
    assert drawn.heading[1] == "3 samples of 8 images, those with the most unusual latents first"


def test_what_no_image_has_is_said(images, tmp_path):
    assert latentprep.encode(images, tmp_path / "c", **OPTIONS, weights="none").ok
    with pytest.raises(UserError, match=r"^show='weight': every image weighs 1 throughout in "):
        preview(tmp_path / "c", show="weight")
    with pytest.raises(UserError, match=r"^show='best': expected one of random, crop, weight, outliers\.$"):
        preview(tmp_path / "c", show="best")
    assert (RANDOM, *RANKINGS) == SHOWS


def test_latents_that_are_not_finite_stand_out_most():
    measures = np.random.default_rng(0).normal(size=(9, 2, 8))
    measures[4, 1, 3] = np.nan
    found = distances(measures)
    assert found.argmax() == 9
    assert np.isfinite(found).all()
    assert RANKINGS["outliers"].say(found.max()) == "not finite"
    assert (distances(np.ones((3, 1, 4))) == 0).all()


def test_a_pattern_or_a_key_chooses(run, cache, drawn):
    preview(cache, pattern="wide[01]*")
    assert [card.key for card in drawn.cards] == ["wide0.png", "wide1.png"]
    assert run("inspect", cache, "tall*", "--preview", cache.parent / "s.png").code == 0
    assert len(drawn.cards) == 4
    assert run("inspect", cache, "--key", "tall2.png", "--preview", cache.parent / "s.png").code == 0
    assert [card.key for card in drawn.cards] == ["tall2.png"]
    with pytest.raises(UserError, match=r"^pattern='x\*': fits no image of "):
        preview(cache, pattern="x*")
    with pytest.raises(UserError, match=r"^key='x': not in "):
        preview(cache, key="x")
    with pytest.raises(UserError, match=r"^key with pattern: "):
        preview(cache, pattern="x", key="x")


def test_images_that_are_gone_are_not_shown(cache, images, drawn):
    (images / "wide2.png").unlink()
    assert latentprep.encode(images, cache, **OPTIONS).ok
    for show in ("random", "crop", "outliers"):
        preview(cache, show=show)
        assert "wide2.png" not in drawn.by_key


def test_every_image_can_come_by_chance(cache):
    storage = Storage(cache)
    manifest = open_manifest(storage)
    found = {choose_samples(storage, manifest, "random", 1, seed, None, None)[0][0] for seed in range(60)}
    assert len(found) == 8


# sources of other kinds


def draw_sets(folder):
    for name, color in (("dog", (200, 0, 0)), ("cat", (0, 0, 200))):
        for n in range(2):
            (folder / name).mkdir(exist_ok=True)
            Image.new("RGB", (64, 64), color).save(folder / name / f"{n}.png")


def check_sets(cache, drawn, names):
    preview(cache)
    assert drawn.warnings == []
    assert sorted(drawn.by_key) == sorted(f"{name}/{n}.png" for name in names for n in range(2))
    for key, card in drawn.by_key.items():
        assert pixels(card.pictures[0]).mean((0, 1))[0 if "dog" in key else 2] == 200
        assert card.warnings == []


def test_sets_of_a_list_are_found_again(tmp_path, drawn, monkeypatch):
    draw_sets(tmp_path)
    monkeypatch.chdir(tmp_path)
    assert latentprep.encode([{"source": "dog"}, {"source": "cat"}], "c", **OPTIONS).ok
    monkeypatch.chdir("/")
    check_sets(tmp_path / "c", drawn, ["dog", "cat"])
    shutil.rmtree(tmp_path / "cat")
    preview(tmp_path / "c")
    assert drawn.warnings[0].startswith("set cat: --source ")
    assert drawn.by_key["cat/0.png"].pictures[0].says == "FileNotFoundError: [Errno 2] No set of this name: 'cat/0.png'"
    assert drawn.by_key["dog/0.png"].pictures[0].says == ""


def test_sets_of_a_file_and_of_folders_are_found_again(tmp_path, drawn):
    draw_sets(tmp_path)
    (tmp_path / "sets.toml").write_text('[[set]]\nsource = "dog"\n[[set]]\nsource = "cat"\n', encoding="utf-8")
    assert latentprep.encode(tmp_path / "sets.toml", tmp_path / "c", **OPTIONS).ok
    check_sets(tmp_path / "c", drawn, ["dog", "cat"])
    (tmp_path / "sets.toml").rename(tmp_path / "moved.toml")
    preview(tmp_path / "c")
    assert drawn.warnings[0].startswith("no images: ")
    preview(tmp_path / "c", source=tmp_path / "moved.toml")
    assert drawn.warnings == []
    (tmp_path / "all").mkdir()
    for name in ("dog", "cat"):
        (tmp_path / name).rename(tmp_path / "all" / f"2_{name}")
    assert latentprep.encode(tmp_path / "all", tmp_path / "k", **OPTIONS).ok
    check_sets(tmp_path / "k", drawn, open_names(tmp_path / "k"))


def open_names(cache):
    return [facts.name for facts in open_manifest(Storage(cache)).sets]


def test_tars_and_caches_at_urls(images, tmp_path, drawn):
    (tmp_path / "tars").mkdir()
    with tarfile.open(tmp_path / "tars" / "0.tar", "w") as tar:
        for path in sorted(images.iterdir()):
            tar.add(path, path.name)
    url = f"memory://preview{os.getpid()}/c"
    assert latentprep.encode(tmp_path / "tars", url, **OPTIONS).ok
    preview(url)
    assert drawn.warnings == []
    assert {card.pictures[0].says for card in drawn.cards} == {""}
    assert "0.tar/tall1.png" in drawn.by_key


# the command


def test_the_command_writes_the_sheet_and_says_what_it_is(run, cache, tmp_path):
    file = tmp_path / "sheet.png"
    result = run("inspect", cache, "--preview", file, "--num", 2, "--seed", 3)
    assert result.code == 0
    with Image.open(file) as image:
        assert result.out == f"{file}: {image.width}x{image.height} pixels\n"
        assert image.tobytes() == preview(cache, num=2, seed=3).tobytes()
    assert "latents  decoded by the cache's own VAE, tiny\n" in result.err
    assert run("inspect", cache, "--preview", file).code == 0  # an earlier sheet is replaced
    assert sorted(path.name for path in tmp_path.iterdir()) == ["c", "c.log", "images", "sheet.png"]


def test_nothing_but_an_earlier_sheet_is_overwritten(run, cache, images, tmp_path):
    before = (images / "tall0.png").read_bytes()
    (tmp_path / "folder.png").mkdir()
    for name, words in (
        ("images/tall0.png", "is there, and is no sheet of latentprep's"),
        ("folder.png", "is there, and is no sheet of latentprep's"),
        ("no/where.png", "there is no folder"),
        ("sheet.jpg", "expected the name of a .png file"),
    ):
        result = run("inspect", cache, "--preview", tmp_path / name)
        assert (result.code, result.out) == (1, "")
        assert result.err.startswith(f"error: --preview {tmp_path / name}: {words}")
        assert result.err.count("\n") == 1
    assert (images / "tall0.png").read_bytes() == before


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("--num", "3"), "--num: is for --preview and --html. Add one of them, or leave it out."),
        (("--show", "crop", "--list"), "--show: is for --preview. Add --preview FILE.png, or leave it out."),
        (("--preview", "s.png", "--json"), "--json with --preview: one prints, the other draws. Give one of them."),
        (("--preview", "s.png", "--list"), "--list with --preview: one prints, the other draws. Give one of them."),
        (
            ("--preview", "s.png", "--most-cropped", "3"),
            "--most-cropped with --preview: one prints, the other draws. Give one of them.",
        ),
    ],
)
def test_options_that_do_not_go_together_are_refused(run, cache, words, said):
    result = run("inspect", cache, *words)
    shown = json.dumps({"error": said}) if "--json" in words else f"error: {said}"
    assert (result.code, result.out, result.err) == (1, "", f"{shown}\n")


def test_a_number_out_of_range_is_one_line(run, cache):
    result = run("inspect", cache, "--preview", "s.png", "--num", 0)
    assert (result.code, result.err) == (2, "error: --num 0: expected a whole number, 1 to 200.\n")
    with pytest.raises(UserError, match=r"^num=201: expected 1 to 200\.$"):
        preview(cache, num=201)


def test_captions_and_names_of_strangers_are_escaped(run, images, tmp_path, drawn):
    (images / "tall0.txt").write_text("\x1b[31mred \u732b caf\xe9" + " word" * 5000, encoding="utf-8")
    shutil.copy(images / "tall0.png", images / "\x1b[2J\u732b.png")
    assert latentprep.encode(images, tmp_path / "c", **OPTIONS).ok
    result = run("inspect", tmp_path / "c", "--preview", tmp_path / "s.png")
    assert result.code == 0
    assert "\x1b" not in result.err + result.out
    assert len(json.dumps(drawn.by_key["tall0.png"].caption)) > 20000


@pytest.mark.parametrize("name", ["\0", "~nobody-of-this-name/x", "x" * 5000, "", "/dev/null", "//server/share"])
def test_places_that_a_stranger_wrote_end_no_sheet(cache, drawn, name):
    manifest = open_manifest(Storage(cache))
    made_with = replace(manifest.made_with, model=name, source=name)
    (cache / "cache.json").write_bytes(pack(replace(manifest, made_with=made_with)))
    preview(cache)
    assert [line.partition(":")[0] for line in drawn.warnings] == ["no images", "not decoded by its VAE"]


def test_numbers_that_are_not_finite_are_shown_as_far_as_they_go(cache, drawn):
    spoil_latents(cache)
    preview(cache)
    says = [card.pictures[2].says for card in drawn.cards]
    assert says.count("its numbers are not finite") == 2
    assert says.count("") == 6
    preview(cache, show="outliers", num=3)
    assert [card.note == "not finite" for card in drawn.cards] == [True, True, False]
