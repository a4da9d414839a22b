"""look/report.py, look/render.py, reports.py: one page that shows what is in a cache, and asks for nothing else."""

import base64
import hashlib
import io
import os
import re
import shutil
import sys
from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest
import torch
from bs4 import BeautifulSoup
from PIL import Image

import latentprep
from latentprep import UserError
from latentprep.cache.group import LatentGroup
from latentprep.cache.manifest import open_manifest
from latentprep.cache.storage import Storage
from latentprep.look import alike, histogram, measures, report
from latentprep.look.alike import NEAR, find_near, num_compared
from latentprep.look.cards import cut_all, frame_of
from latentprep.look.findings import list_unusual
from latentprep.look.render import Shot, render
from latentprep.look.report import group_skips
from latentprep.look.samples import choose_samples
from latentprep.prepare import thumbnails
from latentprep.prepare.thumbnails import pack
from latentprep.records import Skip
from latentprep.reports import PICTURE_BYTES
from tests.browser import Browser, find_browser
from tests.conftest import gradient, spoil_latents

OPTIONS = {"model": "tiny", "resolution": 64, "bucket_step": 32, "min_side": 32, "device": "cpu", "progress": False}
HOSTILE = (
    "<script>document.title='owned'</script>", "\"'><img src=x onerror=\"document.title='owned'\">", "]]>", "</script>",
    "<!--", "&lt;b&gt;", "{{ 7 * 7 }}", "javascript:document.title='owned'",
)  # fmt: skip


@pytest.fixture
def folder(images):
    """Eight images, and beside them copies, a broken file, tags and a long caption."""
    shutil.copy(images / "wide0.png", images / "same.png")
    Image.open(images / "tall0.png").save(images / "near.jpg", quality=80)
    (images / "wide1.txt").write_text("cat, red hat, night", encoding="utf-8")
    (images / "wide2.txt").write_text("dog, red hat", encoding="utf-8")
    (images / "near.txt").write_text("cat " * 200, encoding="utf-8")
    (images / "wide3.txt").write_text("", encoding="utf-8")
    gradient(90, 60).save(images / "small.png")
    data = (images / "wide3.png").read_bytes()
    (images / "broken.png").write_bytes(data[: len(data) // 2])
    gradient(8, 2400).save(images / "thin.png")
    return images


@pytest.fixture
def cache(folder, tmp_path):
    assert latentprep.encode(folder, tmp_path / "c", **OPTIONS).num_cached == 11
    return tmp_path / "c"


def make(cache, **options):
    return BeautifulSoup(latentprep.report(cache, **{"progress": False, **options}), "html.parser")


def words(part):
    return " ".join(part.get_text(" ").split())


def cards(page):
    """Key -> item of the gallery."""
    return {item["data-key"]: item for item in page.select("#cards > li")}


def rows(page, part):
    return [[words(cell) for cell in row.select("th, td")] for row in page.select(f"{part} tbody tr")]


def facts(item):
    return {words(name): words(name.find_next_sibling("dd")) for name in item.select("dt")}


def picture(item):
    """The picture of an item [H,W,3], and its style as numbers."""
    data = base64.b64decode(item.img["src"].removeprefix("data:image/jpeg;base64,"))
    style = {name: float(value) for name, value in re.findall(r"--(\w):([^;]+)", item.select_one(".frame")["style"])}
    return np.asarray(Image.open(io.BytesIO(data))).astype(float), style


def color_of(image, box):
    """Mean colour of the part (left, top, width, height), in percent."""
    height, width, _ = image.shape
    left, top, right, bottom = box[0] * width, box[1] * height, (box[0] + box[2]) * width, (box[1] + box[3]) * height
    return image[round(top / 100) : round(bottom / 100), round(left / 100) : round(right / 100)].mean((0, 1))


# what it says


def test_the_page_shows_what_is_in_the_cache(cache):
    page = make(cache)
    assert page.title.string == "c - latentprep report"
    assert {words(tile.dt): words(tile.dd) for tile in page.select(".tiles div")}["images"] == "11"
    summary = latentprep.inspect(cache)
    assert [row[:2] for row in rows(page, "#buckets")] == [[size, str(n)] for size, n in summary["buckets"].items()]
    assert {tuple(row) for row in rows(page, "#captions .bars")} == {("cat", "2", ""), ("red hat", "2", "")} - {
        ("cat", "2", "")
    }
    assert rows(page, "#recipe")[0][0].startswith("recipe.")
    assert ["made_with.model", "tiny"] in rows(page, "#recipe")
    assert facts(page.select_one("#recipe"))["model"] == "tiny"
    assert set(cards(page)) == {row["key"] for row in list_rows(cache)}


def list_rows(cache):
    from latentprep.runs import run_list

    return run_list(str(cache), "*")


def test_a_card_has_caption_prompt_and_numbers(folder, tmp_path):
    assert latentprep.encode(
        folder, tmp_path / "c", **OPTIONS, template="subject_filewords", placeholder="sks", flip=True
    ).num_cached
    page = make(tmp_path / "c")
    for key, item in cards(page).items():
        sample = latentprep.inspect(tmp_path / "c", key=key)
        top, left, height, width = sample["crop"][0]
        found = facts(item)
        assert found["crop"] == f"{width}x{height} at left {left}, top {top}"
        assert found["own size"] == "x".join(map(str, reversed(sample["original_size"])))
        assert found["tokens"] == ", ".join(map(str, sample["tokens"]))
        assert found["views"] == "2, of which this is the first"
        assert found["content hash"] == sample["digest"]
        assert words(item.select_one(".caption")) == (sample["caption"][0].strip() or "(empty caption)")
        assert words(item.select_one(".prompt")) == f"prompt {sample['prompt'][0].strip()}"
        weight = sample["weight"]["mean"] if sample["weight"] else 1
        assert float(item["data-weight"]) == pytest.approx(weight, abs=1e-3)
        assert item["data-bucket"] == f"{width}x{height}"


def test_what_calls_for_a_look_comes_first_and_leads_on(cache):
    page = make(cache)
    lines = {words(link): link["href"] for link in page.select(".warnings a")}
    assert lines == {
        "2 files of the source are not in the cache.": "#skipped",
        "2 images in 1 group have the same content.": "#duplicates",
        "1 image loses more than a quarter to its crop.": "#crops",
        "3 images are nearly the same as another.": "#duplicates",
        "1 caption is empty.": "#captions",
        "1 prompt is cut: longer than 77 tokens.": "#captions",
        **{line: href for line, href in lines.items() if line.startswith("Far from")},
    }
    for link in page.select("a"):
        assert "=" in link["href"] or page.select_one(link["href"]) is not None, link


def test_the_worst_crops_come_first(cache):
    page = make(cache)
    losses = {row["key"]: float(item["data-loss"]) for row in list_rows(cache) for item in [cards(page)[row["key"]]]}
    shown = [words(name) for name in page.select("#crops .row .name")]
    assert shown[0] == max(losses, key=losses.get)
    assert [losses[key] for key in shown] == sorted(filter(None, losses.values()), reverse=True)[:12]
    named = latentprep.inspect(cache)["cropped"]["images"][0]
    assert losses[named["key"]] == pytest.approx(named["cropped_away"], abs=1e-3)
    counts = [int(row[1]) for row in rows(page, "#crops")]
    assert sum(counts) == 11


def test_outliers_are_those_of_previews(cache):
    storage = Storage(str(cache))
    manifest = open_manifest(storage)
    samples, _ = choose_samples(storage, manifest, "outliers", 3, 0, None, None)
    expected = [manifest.shards[s.shard].open_text(storage).groups[s.group].key[s.row] for s in samples]
    page = make(cache)
    assert [words(name) for name in page.select("#outliers .row .name")][:3] == expected
    scores = sorted((-float(item["data-score"]), key) for key, item in cards(page).items())
    assert [key for _, key in scores[:3]] == expected


def test_duplicates_are_named_with_their_pictures(cache):
    page = make(cache)
    exact, near = page.select("#duplicates .row")
    assert [words(name) for name in exact.select(".name")] == ["same.png", "wide0.png"]
    pairs = [{words(name) for name in pair.select(".name")} for pair in near.find_all("li")]
    assert {"near.jpg", "tall0.png"} in pairs
    away = [float(words(note).removesuffix(" apart")) for note in near.select(".note")]
    assert away == sorted(away)
    assert away[-1] < NEAR
    assert len(page.select("#duplicates img")) == 2 + 2 * len(away)
    assert "All images were compared" in words(page.select_one("#duplicates"))


def test_skips_are_shown_by_reason_with_pictures_of_those_that_open(cache, folder):
    page = make(cache)
    items = page.select(".skips li")
    assert {words(item.bdi): item.img is not None for item in items} == {"broken.png": False, "thin.png": True}
    (thin,) = [item for item in items if item.img]
    data = base64.b64decode(thin.img["src"].removeprefix("data:image/jpeg;base64,"))
    assert Image.open(io.BytesIO(data)).height == 192
    assert {words(head.code) for head in page.select("#skipped h3")} == {"truncated", "extreme_aspect"}
    shutil.rmtree(folder)
    assert not make(cache).select(".skips img")


def test_sets_have_a_table_and_a_filter(folder, tmp_path):
    for name in ("a cat", "dog"):
        (tmp_path / "all" / f"3_{name}").mkdir(parents=True)
        gradient(64, 64).save(tmp_path / "all" / f"3_{name}" / f"{name}.png")
    assert latentprep.encode(tmp_path / "all", tmp_path / "c", **OPTIONS).ok
    page = make(tmp_path / "c")
    assert [row[:3] for row in rows(page, "#sets")] == [["3_a cat", "1", "3"], ["3_dog", "1", "3"]]
    assert [option["value"] for option in page.select("select[name=set] option")] == ["", "3_a cat", "3_dog"]
    assert cards(page)["3_dog/dog.png"]["data-set"] == "3_dog"
    assert page.select_one("#sets a")["href"] == "#set=3_a%20cat"


def test_the_gallery_is_a_part_chosen_by_chance_and_says_so(cache, monkeypatch):
    monkeypatch.setattr("latentprep.look.findings.NUM_WORST", 1)
    whole, part, other = make(cache), make(cache, num=3, seed=1), make(cache, num=3, seed=2)
    assert "All 11 images." in words(whole.select_one("#gallery"))
    named = len(cards(part)) - 3
    assert f"3 of 11 images, chosen at random (seed 1), and {named} that are named above." in words(
        part.select_one("#gallery")
    )
    assert set(cards(part)) < set(cards(whole))
    assert set(cards(part)) != set(cards(other))
    assert set(cards(part)) == set(cards(make(cache, num=3, seed=1)))
    for page in (part, other):
        for link in page.select(".row a"):
            assert page.select_one(link["href"]) is not None


def test_of_large_caches_some_latents_are_read_and_the_page_says_so(cache, monkeypatch):
    monkeypatch.setattr(report, "MOST_LOOKED", 5)
    page = make(cache, num=2)
    assert "over all pixels of 5 of 11 images, chosen at random" in words(page.select_one("#latents"))
    assert "A sample was compared: 5 of 11 images, each with each." in words(page.select_one("#duplicates"))
    assert len([item for item in cards(page).values() if item["data-score"]]) <= 5


def test_a_cache_without_images_has_a_page(images, tmp_path):
    assert latentprep.encode(images, tmp_path / "c", **OPTIONS).ok
    for path in images.glob("*.png"):
        path.write_bytes(b"x")
    assert latentprep.encode(images, tmp_path / "c", **OPTIONS, allow_gone=True).num_cached == 0
    page = make(tmp_path / "c")
    assert cards(page) == {}
    assert "There are none" in words(page.select_one("#latents"))


def test_tables_of_many_rows_are_cut_and_say_so(images, cache, monkeypatch):
    monkeypatch.setattr("latentprep.look.render.MOST_BUCKETS", 1)
    monkeypatch.setattr("latentprep.look.render.MOST_VALUES", 3)
    monkeypatch.setattr(report, "NUM_REASONS", 1)
    page = make(cache)
    sizes = latentprep.inspect(cache)["buckets"]
    assert [row[0] for row in rows(page, "#buckets")] == [max(sizes, key=sizes.get)]
    assert f"The 1 of most images are shown, of {len(sizes)}." in words(page.select_one("#buckets"))
    assert len(rows(page, "#recipe")) == 3
    assert len(page.select(".skips")) == 1


def test_skips_are_grouped_by_their_reason():
    skips = [Skip(f"{n}", "b" if n % 3 else "a", "") for n in range(30)]
    (count, first), (other, second) = group_skips(skips)
    assert (count, [skip.key for skip in first]) == (20, ["1", "2", "4", "5"])
    assert (other, [skip.key for skip in second]) == (10, ["0", "3", "6", "9"])


def test_caches_at_urls_without_cond_and_without_std(images):
    url = f"memory://report{os.getpid()}/c"
    assert latentprep.encode(images, url, **OPTIONS, no_cond=True, store="mean").ok
    page = make(url)
    assert len(cards(page)) == 8
    assert "tokens" not in facts(cards(page)["tall0.png"])
    assert "posterior" not in words(page.select_one("#latents"))


# numbers


def test_channels_are_those_of_normalized_latents(cache):
    storage = Storage(str(cache))
    manifest = open_manifest(storage)
    groups = [g for shard in manifest.shards for g in shard.open_latents(storage).groups]
    seen = torch.cat([
        manifest.latent.normalization.apply(g.latent_mean[:, 0].float()).transpose(0, 1).flatten(1) for g in groups
    ], dim=1)  # fmt: skip
    shown = [[float(cell) for cell in row[:3]] for row in rows(make(cache), "#latents .tall")]
    assert np.array(shown) == pytest.approx(
        np.stack([range(4), seen.mean(1), seen.std(1, correction=0)], axis=1), abs=0.006
    )


def test_channels_that_are_far_from_a_unit_normal_are_named():
    channels = measures.Channels(1, np.array([0, 2, 0, 0]), np.array([1, 1, 0.1, 3]), None, np.zeros(60), 0)
    assert list_unusual(channels) == [1, 2, 3]
    assert list_unusual(replace(channels, num_rows=0)) == []


def test_numbers_that_are_not_finite_are_counted_and_left_out(cache):
    spoil_latents(cache)
    page = make(cache)
    assert any("latents that are not finite" in words(line) for line in page.select(".warnings li"))
    assert all("nan" not in row for row in rows(page, "#latents .tall"))
    assert "not finite" in {words(note) for note in page.select("#outliers .note")}


def test_near_pairs_are_those_that_a_comparison_of_all_finds(monkeypatch):
    rng = np.random.default_rng(0)
    averaged = rng.normal(size=(300, 64)).astype(np.float32) * rng.uniform(0.1, 9, 64).astype(np.float32)
    digests = rng.integers(0, 256, (300, 16)).astype(np.uint8)
    for n in range(0, 60, 3):
        averaged[n + 200] = averaged[n] + 0.1 * n / 60 * averaged.std(0) * rng.normal(size=64)
    averaged[299], digests[299] = averaged[1], digests[1]  # the same content
    averaged[298] = np.nan
    z = averaged[:298] / averaged[:298].std(0)
    away = np.sqrt(np.square(z[:, None] - z[None]).mean(2))
    expected = {(i, j) for j in range(1, 298) for i in [int(away[j, :j].argmin())] if away[j, i] < NEAR}
    for block in (7, 1024):
        monkeypatch.setattr(alike, "BLOCK", block)
        pairs, found = find_near(averaged, digests)
        assert set(map(tuple, pairs.tolist())) == expected
        assert len(expected) == 20
        assert found == pytest.approx([away[i, j] for i, j in pairs], abs=1e-3)
        assert (np.diff(found) >= 0).all()
    assert [len(part) for part in find_near(averaged[:0], digests[:0])] == [0, 0]
    assert len(find_near(np.ones((3, 64), np.float32), digests[:3])[0]) == 2  # flat images are alike


@pytest.mark.parametrize("size", [64, 256, 512, 8192])
def test_the_work_of_a_comparison_is_bounded(size):
    count = num_compared(10**6, size)
    assert 1000 < count**2 * size / 1e6 <= 1.5e5
    assert num_compared(100, size) == 100


def test_histograms_count_every_value_once():
    values = np.array([0, 0, 0.01, 0.05, 0.0501, 1])
    bars = histogram.of_shares(values)
    assert (bars.counts[:3], bars.total, len(bars.counts)) == ([2, 2, 1], 6, 21)
    assert (bars.labels[0], bars.labels[1], bars.labels[20], bars.high) == ("0%", "0% to 5%", "95% to 100%", "100%")
    assert histogram.of_shares(np.zeros(0)).total == 0
    for most in (0, 1, 23, 24, 25, 1000, 123_456_789):
        bars = histogram.of_counts(np.array([0, most, most // 2]))
        assert bars.total == 3
        assert len(bars.counts) <= histogram.MOST_BARS
        assert bars.counts[-1] >= 1
    assert histogram.of_counts(np.array([47])).labels[-1] == "46 to 47"


def test_a_long_text_is_cut_and_says_so():
    assert cut_all(["a b", "c"], 10) == ["a b", "c"]
    assert cut_all(["a" * 50, "b", "c"], 10) == [f"{'a' * 10}... (50 characters) (and 2 more)"]
    assert cut_all(["\u732b" * 50], 10) == ["\u732b\u732b\u732b... (50 characters)"]


# pictures


def test_a_thumbnail_is_what_the_crop_keeps_and_the_open_card_shows_the_box(folder, tmp_path):
    image = Image.new("RGB", (192, 64), (220, 30, 30))
    image.paste((30, 30, 220), (64, 0, 128, 64))
    image.save(folder / "stripes.png")
    shape = {"width": 64, "height": 64, **{name: OPTIONS[name] for name in ("model", "device", "progress")}}
    latentprep.encode(folder, tmp_path / "c", **shape)
    item = cards(make(tmp_path / "c"))["stripes.png"]
    pixels, style = picture(item)
    assert (style["r"], style["R"]) == (1, 3)
    assert (style["l"], style["t"], style["w"], style["h"]) == pytest.approx((-100, 0, 300, 100))
    assert (style["L"], style["T"], style["W"], style["H"]) == pytest.approx((0, 0, 100, 100))
    box = (style["x"], style["y"], style["a"], style["b"])
    assert box == pytest.approx((33.33, 0, 33.33, 100))
    assert color_of(pixels, box) == pytest.approx((30, 30, 220), abs=25)
    assert color_of(pixels, (0, 0, 25, 100)) == pytest.approx((220, 30, 30), abs=25)
    assert facts(item)["picture"] == "source image"


def test_weights_are_shown_of_those_images_that_have_some(images, tmp_path):
    alpha = Image.new("L", (64, 64), 255)
    alpha.paste(0, (0, 0, 32, 64))
    half = gradient(64, 64)
    half.putalpha(alpha)
    half.save(images / "half.png")
    gradient(64, 64).save(images / "opaque.png")  # in the same bucket
    latentprep.encode(images, tmp_path / "c", **OPTIONS)
    found = cards(make(tmp_path / "c"))
    uneven = {key for key, item in found.items() if float(item["data-weight"]) < 1}
    assert {key for key, item in found.items() if item.select_one(".weight")} == uneven >= {"half.png", "tall1.png"}
    data = found["half.png"].select_one(".weight img")["src"].removeprefix("data:image/jpeg;base64,")
    weight = np.asarray(Image.open(io.BytesIO(base64.b64decode(data)))).astype(float)
    assert weight.shape == (8, 8)
    assert weight[:, :3].max() < 40
    assert weight[:, 5:].min() > 215
    assert words(found["half.png"].figcaption) == "loss weights of the crop: white 1, black 0"


def test_weights_are_part_of_the_bytes_that_a_picture_may_take():
    rng = np.random.default_rng(0)
    weight = torch.from_numpy(rng.random((1, 1, 128, 128), np.float32)).half()
    group = LatentGroup(
        "h1024w1024", weight=weight, latent_mean=torch.zeros(1, 1, 4, 128, 128),
        original_size=torch.tensor([[1024, 1024]]), resized_size=torch.tensor([[[1024, 1024]]]),
        crop=torch.tensor([[[0, 0, 1024, 1024]]]),
    )  # fmt: skip
    noise = Image.fromarray(rng.integers(0, 256, (192, 192, 3)).astype(np.uint8))
    row = thumbnails.StoredRow("a.png", 1, [""], group)
    shown = thumbnails.Shown(noise, np.zeros((1, 1, 3), np.uint8), False)
    for limit in (4000, 16_000):
        made = thumbnails.make_thumbnail(row, shown, None, limit)
        assert limit // 8 < len(made.weight) <= limit // 4
        assert len(made.jpeg) + len(made.weight) <= limit


def test_padding_lies_outside_of_the_picture(images, tmp_path):
    shape = {"width": 64, "height": 64, **{name: OPTIONS[name] for name in ("model", "device", "progress")}}
    latentprep.encode(images, tmp_path / "c", **shape, fit="pad")
    _, style = picture(cards(make(tmp_path / "c"))["wide0.png"])
    assert (style["r"], style["R"]) == (1, 1)
    assert (style["l"], style["w"]) == (0, 100)
    assert style["t"] == pytest.approx((100 - style["h"]) / 2, abs=1)
    assert style["h"] == pytest.approx(100 * 40 / 128, abs=2)
    assert (style["x"], style["y"], style["a"], style["b"]) == (0, 0, 100, 100)


@pytest.mark.parametrize(
    ("resized", "crop"),
    [
        ((0, 5), (0, 0, 8, 8)),
        ((8, 8), (0, 0, 0, 8)),
        ((8, 8), (9, 0, 8, 8)),
        ((8, 8), (0, -8, 8, 8)),
        ((-1, -1), (0, 0, 8, 8)),
    ],
)
def test_numbers_that_fit_no_image_have_no_frame(resized, crop):
    assert frame_of(resized, crop, (0, 0, *resized)) is None


def test_without_its_source_the_latents_are_decoded(cache, folder):
    before = cards(make(cache))
    shutil.rmtree(folder)
    page = make(cache)
    remarks = [words(line) for line in page.select("#look li")]
    assert any(line.startswith("no images: ") for line in remarks)
    assert "pictures of latents: decoded by the cache's own VAE, tiny" in remarks
    for key, item in cards(page).items():
        assert facts(item)["picture"] == "latents: decoded"
        pixels, style = picture(item)
        assert (style["l"], style["t"], style["w"], style["h"]) == (0, 0, 100, 100)  # it is the crop alone
        own, where = picture(before[key])
        box = -where["l"] / where["w"] * 100, -where["t"] / where["h"] * 100, 1e4 / where["w"], 1e4 / where["h"]
        assert color_of(pixels, (0, 0, 100, 100)) == pytest.approx(color_of(own, box), abs=30), key


def test_without_source_and_vae_the_colours_are_said_to_be_false(images, tmp_path):
    folder = tmp_path / "model"
    from tests.conftest import make_model

    make_model(folder)
    assert latentprep.encode(images, tmp_path / "c", **{**OPTIONS, "model": folder}, no_cond=True).ok
    shutil.rmtree(folder)
    shutil.rmtree(images)
    page = make(tmp_path / "c")
    remarks = [words(line) for line in page.select("#look li")]
    assert any(line.startswith("not decoded by its VAE: ") for line in remarks)
    assert any(line.startswith("pictures of latents: false colours") for line in remarks)
    assert {facts(item)["picture"] for item in cards(page).values()} == {"latents: false colours"}


def test_on_a_cpu_the_vae_decodes_some_and_a_map_the_others(cache, folder, monkeypatch):
    shutil.rmtree(folder)
    monkeypatch.setattr(thumbnails, "MAX_DECODED", 3 * 64 * 96)
    page = make(cache)
    origins = [facts(item)["picture"] for item in cards(page).values()]
    assert 2 <= origins.count("latents: decoded") <= 6
    assert origins.count("latents: linear map, fitted to decoded latents") == 11 - origins.count("latents: decoded")
    assert any("in the colours of a map" in words(line) for line in page.select("#look li"))


def test_one_bad_image_is_named_and_the_others_are_shown(cache, folder):
    (folder / "tall0.png").write_bytes(b"no image")
    (folder / "tall2.png").unlink()
    gradient(64, 80).rotate(90, expand=True).resize((64, 80)).save(folder / "wide1.png")
    gradient(128, 40).point(lambda value: 255 - value).save(folder / "wide2.png")
    found = {key: facts(item)["picture"] for key, item in cards(make(cache)).items()}
    assert found["tall0.png"].startswith("latents: decoded. changed since: ")
    assert found["tall2.png"].startswith("latents: decoded. ")
    assert found["wide1.png"].startswith("latents: decoded. changed since: ")
    assert found["wide2.png"] == "source image. changed since it was encoded"
    assert found["tall1.png"] == "source image"


def test_a_jpeg_is_as_good_as_its_bytes_allow():
    rng = np.random.default_rng(0)
    image = Image.fromarray(rng.integers(0, 256, (192, 128, 3)).astype(np.uint8))
    sizes = [len(pack(image, limit)) for limit in (10**6, 8000, 4000, 2500)]
    assert sizes == sorted(sizes, reverse=True)
    assert all(size <= limit for size, limit in zip(sizes, (10**6, 8000, 4000, 2500), strict=True))
    assert Image.open(io.BytesIO(pack(image, 10**6))).size == (128, 192)


def test_two_thousand_samples_with_long_captions_stay_below_20_megabytes(cache, monkeypatch):
    kept = {}
    monkeypatch.setattr("latentprep.look.render.render", lambda *given: kept.update(given=given) or "")
    latentprep.report(cache, progress=False)
    found, shots, skipped, remarks = kept["given"]
    (shot,) = shots[:1]
    count = 2100
    text = "\u732b" * (report.TEXT_BYTES // count // 2 // 3)
    card = replace(found.cards[0], key="k" * 300, captions=[text], prompts=[text])
    many = replace(found, cards=[replace(card, number=n) for n in range(count)])
    big = replace(shot, jpeg=base64.b64encode(os.urandom(PICTURE_BYTES // count)).decode())
    page = render(many, [big] * count, skipped, remarks)
    assert 15e6 < len(page.encode()) < 20e6
    assert isinstance(big, Shot)


# strangers


def test_what_strangers_wrote_is_text(tmp_path):
    images = tmp_path / "<b>images"
    names = [
        "<svg onload=alert(1)>",
        "\"quotes' & more",
        "rtl\u202eabc",
        os.fsdecode(b"lone\xff"),
        "{{ 7*7 }}",
        "line\nend",
    ]
    for n, name in enumerate(names):
        part = images / f"3_<i>{n % 2}\"'"
        part.mkdir(parents=True, exist_ok=True)
        gradient(64 + 20 * n, 64).save(part / f"{name}.png")
        if n:
            (part / f"{name}.txt").write_text(", ".join(HOSTILE) + "\u202e\u2066", encoding="utf-8")
    (images / "3_<i>0\"'" / "<u>broken.png").write_bytes(b"x")
    assert latentprep.encode(images, tmp_path / "c", **OPTIONS, folders="sets").num_cached == len(names)
    text = latentprep.report(tmp_path / "c", progress=False)
    text.encode("utf-8")  # no lone surrogate is left
    assert not set(text) & set("\u202e\u2066\x1b\0")
    page = BeautifulSoup(text, "html.parser")
    clean = make_clean(tmp_path)
    assert {tag.name for tag in page.find_all()} <= {tag.name for tag in clean.find_all()} | {"em"}
    assert len(page.find_all("script")) == 1
    allowed = {"".join(sorted(tag.attrs)) for tag in clean.find_all()}
    assert {"".join(sorted(tag.attrs)) for tag in page.find_all()} <= allowed
    assert not [name for tag in page.find_all() for name in tag.attrs if name.startswith("on")]
    item = cards(page)["3_<i>1\"'/\"quotes' & more.png"]
    assert words(item.select_one(".caption")).startswith(", ".join(HOSTILE))
    assert "49" not in {words(tag) for tag in item.find_all("bdi")}
    assert any("\\udcff" in key for key in cards(page))
    assert any("\\u202e" in key for key in cards(page))
    assert "3_<i>0\"'" in [option["value"] for option in page.select("select[name=set] option")]
    assert "3_<i>0\"'/<u>broken.png" in words(page.select_one(".skips"))


def make_clean(tmp_path):
    """The page of a cache like it, without any such words."""
    for n in range(6):
        part = tmp_path / "clean" / f"3_{n % 2}"
        part.mkdir(parents=True, exist_ok=True)
        gradient(64 + 20 * n, 64).save(part / f"{n}.png")
        (part / f"{n}.txt").write_text("a, b, c", encoding="utf-8")
    (tmp_path / "clean" / "3_0" / "x.png").write_bytes(b"x")
    latentprep.encode(tmp_path / "clean", tmp_path / "k", **OPTIONS, folders="sets", flip=True)
    return make(tmp_path / "k")


def test_the_page_may_run_its_own_script_alone_and_ask_nobody(cache):
    page = make(cache)
    (script,) = page.find_all("script")
    digest = base64.b64encode(hashlib.sha256(script.string.encode()).digest()).decode()
    rules = page.select_one("meta[http-equiv=Content-Security-Policy]")["content"].split("; ")
    assert rules[:4] == [
        "default-src 'none'", "img-src data:", "style-src 'unsafe-inline'", f"script-src 'sha256-{digest}'",
    ]  # fmt: skip
    for tag in page.find_all(["img", "script", "link", "iframe", "image", "use"]):
        assert tag.get("src", "data:").startswith("data:image/jpeg;base64,") or tag.name == "script"
        assert not tag.get("href")
    assert "http" not in re.sub(r"http-equiv", "", str(page)).replace("https://", "http")[:2000]
    assert "url(" not in page.style.string


# doors


def test_without_jinja2_it_is_one_line(run, cache, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "jinja2", None)
    result = run("inspect", cache, "--html", tmp_path / "r.html")
    said = "--html: needs jinja2, which is not installed. Type: pip install 'latentprep[report]'"
    assert (result.code, result.err, result.out) == (1, f"error: {said}\n", "")
    assert not (tmp_path / "r.html").exists()
    with pytest.raises(UserError, match="needs jinja2"):
        latentprep.report(cache, progress=False)


def test_the_command_writes_the_page_and_nothing_else_is_overwritten(run, cache, tmp_path):
    file = tmp_path / "r.html"
    result = run("inspect", cache, "--html", file, "--num", 4)
    assert result.code == 0
    assert file.read_text(encoding="utf-8") == latentprep.report(cache, num=4, progress=False)
    assert result.out.startswith(f"{file}: ")
    assert run("inspect", cache, "--html", file, "--num", 4).code == 0  # an earlier page is replaced
    (tmp_path / "own.html").write_text("<p>mine", encoding="utf-8")
    for name, said in (
        ("own.html", "is there, and is no report of latentprep's"), ("no/r.html", "there is no folder"),
        ("r.txt", "expected the name of a .html file"),
    ):  # fmt: skip
        result = run("inspect", cache, "--html", tmp_path / name)
        assert result.code == 1
        assert result.err.startswith(f"error: --html {tmp_path / name}: {said}")
    assert (tmp_path / "own.html").read_text() == "<p>mine"


@pytest.mark.parametrize(
    ("more", "code", "said"),
    [
        (("--key", "a"), 1, "--key with --html: a page is about the whole cache. Leave it out."),
        (("x*",), 1, "PATTERN with --html: a page is about the whole cache. Leave it out."),
        (("--show", "crop"), 1, "--show with --html: a page is about the whole cache. Leave it out."),
        (("--list",), 1, "--list with --html: one prints, the other makes a page. Give one of them."),
        (
            ("--preview", "a.png"),
            1,
            "--preview with --html: one draws a sheet, the other makes a page. Give one of them.",
        ),
        (("--num", "0"), 2, "--num 0: expected a whole number, 1 to 5000."),
    ],
)
def test_options_that_do_not_go_with_it_are_refused(run, tmp_path, more, code, said):
    result = run("inspect", tmp_path, *more, "--html", tmp_path / "r.html")
    assert (result.code, result.err) == (code, f"error: {said}\n")


# in a browser


@pytest.fixture
def browser(tmp_path):
    program = find_browser()
    if program is None:
        pytest.skip("there is no Chromium")
    with Browser(program, tmp_path / "profile") as opened:
        yield opened


CONTRAST = """(() => {  // the least of all words against what is behind them
  const parse = (color) => color.match(/[\\d.]+/g).map(Number);
  const light = (color) => {
    const [r, g, b] = color.map((v) => (v /= 255) <= .04045 ? v / 12.92 : ((v + .055) / 1.055) ** 2.4);
    return .2126 * r + .7152 * g + .0722 * b;
  };
  const ground = (e) => {
    for (; e; e = e.parentElement) {
      const color = parse(getComputedStyle(e).backgroundColor);
      if (color.length < 4 || color[3] > 0) return color;
    }
    return [255, 255, 255];
  };
  const kinds = "h1, h2, h3, h4, p, a, th, td, dt, dd, label, input, select, button, summary, caption, em, span";
  const seen = [...document.querySelectorAll(kinds)].filter((e) => e.textContent.trim() && e.offsetParent);
  return Math.min(...seen.map((e) => {
    const pair = [parse(getComputedStyle(e).color), ground(e)].map(light).sort((a, b) => b - a);
    return (pair[0] + .05) / (pair[1] + .05);
  }));
})()"""
SHOWN = "[...document.querySelectorAll('#cards > li')].filter(i => i.offsetParent !== null).map(i => i.dataset.key)"


def write_page(cache, tmp_path, **options):
    file = tmp_path / "r.html"
    file.write_text(latentprep.report(cache, progress=False, **options), encoding="utf-8")
    return file.as_uri()


@pytest.mark.slow
def test_filters_sort_and_links_in_a_browser(browser, cache, tmp_path):
    address = write_page(cache, tmp_path)
    browser.open(address)
    assert len(browser.run(SHOWN)) == 11
    browser.run("document.querySelector('[name=key]').focus()")
    browser.type("WIDE")
    assert set(browser.run(SHOWN)) == {f"wide{n}.png" for n in range(4)}
    assert browser.run("document.querySelector('.status').textContent") == "4 of 11 images"
    browser.run("document.querySelector('[name=tag]').focus()")
    browser.type("red hat")  # a tag of the list: whole parts alone
    assert browser.run(SHOWN) == ["wide1.png", "wide2.png"]
    assert browser.run("location.hash") == "#key=WIDE&tag=red%20hat"
    browser.run("document.querySelector('.reset').click()")
    assert len(browser.run("new Promise(d => setTimeout(() => d(" + SHOWN + ")))")) == 11
    browser.run("document.querySelector('[href=\"#tag=red%20hat\"]').click()")
    assert browser.run(SHOWN) == ["wide1.png", "wide2.png"]
    for name, sign in (("loss", -1), ("weight", 1), ("score", -1)):
        browser.open("about:blank")
        browser.open(f"{address}#sort={name}")
        values = browser.run(f"[...document.querySelectorAll('#cards > li')].map(i => +i.dataset.{name})")
        assert values == sorted(values, key=lambda value: sign * value), name
    browser.open("about:blank")
    browser.open(f"{address}#bucket=96x32&sort=key")
    assert browser.run(SHOWN) == sorted(key for key in browser.run(SHOWN))
    assert set(
        browser.run("[...document.querySelectorAll('#cards > li:not([hidden])')].map(i => i.dataset.bucket)")
    ) == {"96x32"}
    assert browser.messages == []
    assert set(browser.requests) == {address}


@pytest.mark.slow
def test_a_sample_opens_by_keys_and_by_links(browser, cache, tmp_path):
    address = write_page(cache, tmp_path)
    browser.open(address)
    browser.run("document.querySelector('#cards summary').focus()")
    browser.press("Tab")
    assert browser.run("document.activeElement.tagName") == "SUMMARY"
    browser.press("Enter")
    opened = "[...document.querySelectorAll('#cards details[open]')].map(d => d.parentElement.dataset.key)"
    (key,) = browser.run(opened)
    part = "document.querySelector('details[open] {}')".format
    width, box = browser.run(f"[{part('.frame')}.offsetWidth, {part('i')}.offsetWidth]")
    height = browser.run(f"{part('dl')}.offsetHeight")
    assert width == browser.run(f"{part('.frame img')}.naturalWidth")  # the whole image, and not enlarged
    assert 0 < box <= width
    assert height > 100
    browser.press("Escape")
    assert browser.run(opened) == []
    assert browser.run("document.activeElement.tagName") == "SUMMARY"
    assert browser.run("getComputedStyle(document.activeElement).outlineStyle") == "solid"
    browser.run("location.hash = '#key=tall'")
    link = browser.run("(a => (a.click(), a.getAttribute('href')))(document.querySelector('#duplicates a'))")
    assert len(browser.run(opened)) == 1  # though the filter had hidden it
    assert browser.run(f"document.querySelector('{link}').contains(document.activeElement)")
    assert browser.messages == []
    assert key


@pytest.mark.slow
@pytest.mark.parametrize("side", [40, 96, 600])
def test_no_picture_is_shown_larger_than_it_is(browser, images, tmp_path, side):
    gradient(3 * side, side).save(images / "wide.png")
    gradient(8, 2400).save(images / "thin.png")  # a skip
    latentprep.encode(images, tmp_path / "c", **{**OPTIONS, "resolution": max(64, side // 32 * 32)})
    browser.resize(1280, 800, "light")
    browser.open(write_page(tmp_path / "c", tmp_path))
    browser.run("document.querySelectorAll('img').forEach(i => i.decode())")
    larger = """[...document.querySelectorAll('img')].filter(i => !i.closest('.weight') && i.offsetParent).filter(i =>
        getComputedStyle(i).objectFit !== 'scale-down' && i.getBoundingClientRect().width > i.naturalWidth + 1)
        .map(i => i.alt)"""
    assert browser.run(larger) == []
    browser.run("document.querySelectorAll('#cards details').forEach(d => d.open = true)")
    assert browser.run(larger) == []
    seen = """[...document.querySelectorAll('#cards .frame img')].map(i => {
        const [own, frame] = [i, i.parentElement].map(e => e.getBoundingClientRect());
        const skew = i.naturalWidth / i.naturalHeight - own.width / own.height;
        return [own.width, own.width / frame.width, own.height / frame.height, skew];
    })"""
    for width, across, down, skew in browser.run(seen):
        assert width > 20
        assert (across, down) == pytest.approx((1, 1), abs=0.02)  # all of it is in the frame
        assert skew == pytest.approx(0, abs=0.1)


@pytest.mark.slow
def test_no_words_of_strangers_run_in_a_browser(browser, tmp_path):
    (tmp_path / "images").mkdir()
    for n, text in enumerate(HOSTILE):
        name = text.replace("/", "\u2215")
        gradient(64 + 8 * n, 64).save(tmp_path / "images" / f"{name}.png")
        (tmp_path / "images" / f"{name}.txt").write_text(f"{text}, {text}, tag", encoding="utf-8")
    latentprep.encode(tmp_path / "images", tmp_path / "c", **OPTIONS)
    address = write_page(tmp_path / "c", tmp_path)
    browser.open(address)
    assert browser.run("document.title") == "c - latentprep report"
    assert browser.run("document.querySelectorAll('#cards > li').length") == len(HOSTILE)
    assert browser.messages == []
    for refused in ("eval('1')", "fetch('data:,x')"):
        assert browser.run(f"new Promise(d => d({refused})).then(() => 'ran', () => 'refused')") == "refused"


@pytest.mark.slow
def test_without_scripts_all_can_be_read(browser, cache, tmp_path):
    address = write_page(cache, tmp_path)
    browser.without_scripts()
    browser.open(address)
    browser.without_scripts(False)
    assert len(browser.run(SHOWN)) == 11
    assert browser.run("document.querySelector('.filters').offsetParent") is None
    browser.run("document.querySelector('#cards summary').focus()")
    browser.press("Enter")
    assert browser.run("document.querySelector('details[open] dl').offsetHeight") > 100


@pytest.mark.slow
@pytest.mark.parametrize("width", [360, 1280])
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_it_fits_the_window_and_its_words_can_be_read(browser, cache, tmp_path, width, scheme):
    browser.resize(width, 800, scheme)
    browser.open(write_page(cache, tmp_path))
    assert browser.run("document.documentElement.scrollWidth") <= width
    assert browser.run(CONTRAST) >= 4.5  # WCAG 2, AA
    levels = [
        int(name[1]) for name in browser.run("[...document.querySelectorAll('h1, h2, h3, h4')].map(h => h.tagName)")
    ]
    assert levels[0] == 1
    assert all(after - before <= 1 for before, after in pairwise(levels))
    assert browser.run("[...document.querySelectorAll('img')].every(i => i.alt !== '' || i.closest('.skips'))")


@pytest.mark.slow
def test_two_thousand_samples_open_within_seconds(browser, cache, tmp_path, monkeypatch):
    kept = {}
    monkeypatch.setattr("latentprep.look.render.render", lambda *given: kept.update(given=given) or "")
    latentprep.report(cache, progress=False)
    found, shots, skipped, remarks = kept["given"]
    count = 2000
    data = io.BytesIO()
    Image.fromarray(np.random.default_rng(0).integers(60, 190, (192, 144, 3)).astype(np.uint8)).save(
        data, "JPEG", quality=12
    )
    shot = replace(shots[0], jpeg=base64.b64encode(data.getvalue()).decode())
    many = [replace(found.cards[n % 11], number=n) for n in range(count)]
    page = render(replace(found, cards=many), [shot] * count, skipped, remarks)
    assert len(page) > 8e6
    (tmp_path / "r.html").write_text(page, encoding="utf-8")
    seconds = browser.open((tmp_path / "r.html").as_uri())
    assert len(browser.run(SHOWN)) == count
    assert seconds < 10  # 2 on a machine that does nothing else
    done = "new Promise(d => setTimeout(() => d(performance.now() - t)))"
    spent = f"(t => (location.hash = '#sort=loss', {done}))(performance.now())"
    assert browser.run(spent) < 5000
