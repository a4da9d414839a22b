"""latentprep diff: what differs between two caches is said once, and equal ones are told to be equal."""

import json
import os
import shutil

import numpy as np
import pytest
import torch

import latentprep
from latentprep.cache import manifest as manifests
from latentprep.cache.storage import Storage
from latentprep.look import latent_distances
from latentprep.look.catalog import hashes_of, pair_up
from latentprep.recipe_words import describe_set_changes
from tests.conftest import SMALL, gradient, make_model
from tests.test_python_door import SMALL as OPTIONS
from tests.test_verify import put, rewrite

SHARDS = {"shard_size": "30kB"}


def encode(images, cache, **options):
    return latentprep.encode(images, cache, **{**OPTIONS, "progress": False, **options})


def diff(a, b, **options):
    return latentprep.diff(a, b, progress=False, **options)


def differences(result):
    """The fields of a result that say that something differs, but for the numbers."""
    names = ("only_a", "only_b", "changed", "renamed", "captions", "recipe", "latent", "sets", "buckets", "skips")
    return {name: getattr(result, name) for name in (*names, "problems") if getattr(result, name)}


def rows_of(cache):
    """Key -> all of its row of latents, in the order of the cache; no row is dead."""
    storage, found = Storage(cache), {}
    for shard in manifests.open_manifest(storage).shards:
        for words, group in zip(shard.open_text(storage).groups, shard.open_latents(storage).groups, strict=True):
            found |= {key: group.row(n) for n, key in enumerate(words.key)}
    return found


def distances_by_hand(a, b, field="latent_mean"):
    """Key -> distance as README defines it, in plain numpy."""
    mine, theirs = (
        {key: [row[name].double().numpy() for name in ("latent_mean", field)] for key, row in rows_of(cache).items()}
        for cache in (a, b)
    )
    channels = next(iter(mine.values()))[0].shape[1]
    spread = [np.concatenate([mean[:, c].ravel() for mean, _ in mine.values()]).std() for c in range(channels)]
    scale = np.array(spread)[None, :, None, None]
    return {key: np.sqrt((((mine[key][1] - theirs[key][1]) / scale) ** 2).mean()) for key in mine}


@pytest.fixture
def cache(images, tmp_path):
    assert encode(images, tmp_path / "a", flip=True).ok
    return tmp_path / "a"


@pytest.fixture
def other(images, tmp_path):
    """A second folder of the same images."""
    return shutil.copytree(images, tmp_path / "other")


def test_equal_caches_do_not_differ_however_they_are_cut_into_shards(run, images, cache, tmp_path):
    assert encode(images, tmp_path / "b", flip=True, **SHARDS).ok
    result = diff(cache, tmp_path / "b")
    assert result.is_same
    assert differences(result) == {}
    assert (result.num_images, result.num_prompts) == ((8, 8), (0, 0))
    assert (result.latents.num_shared, result.latents.num_compared) == (8, 8)
    assert {name: distance.num for name, distance in result.latents.distances.items()} == {
        "latent_mean": 8, "latent_std": 8, "weight": 4,
    }  # fmt: skip
    assert (result.cond.num_shared, result.cond.num_compared, result.cond.distances["cond"].num) == (8, 8, 9)
    shown = run("diff", cache, tmp_path / "b")
    assert (shown.code, shown.err) == (0, "")
    assert shown.out.rstrip("\n") == repr(result)
    assert shown.out.endswith(f"{cache} and {tmp_path / 'b'}: nothing differs\n")


def test_another_image_a_renamed_one_and_another_caption(run, images, cache, other, tmp_path):
    gradient(50, 50).save(other / "new.png")
    (other / "wide0.png").unlink()
    gradient(128, 40).rotate(90).save(other / "wide1.png")
    (other / "wide2.png").rename(other / "zebra\x1b.png")
    (other / "tall0.txt").write_text("quite another picture")
    assert encode(other, tmp_path / "b", flip=True).ok
    result = diff(cache, tmp_path / "b")
    found = differences(result)
    assert found == {
        "only_a": ("wide0.png",), "only_b": ("new.png",), "changed": ("wide1.png",),
        "renamed": (("wide2.png", "zebra\x1b.png"),), "captions": ("tall0.png", "wide2.png"),
        "buckets": (("96x32", 4, 3), ("64x64", 4, 5)),
    }  # fmt: skip
    assert result.captions_shown[0] == ("tall0.png", "picture number 0", "quite another picture")
    assert result.num_prompts == (3, 3)
    assert (result.latents.num_shared, result.latents.num_compared, result.cond.num_shared) == (6, 6, 5)
    shown = run("diff", cache, tmp_path / "b", "--list")
    assert shown.code == 1
    assert shown.out.splitlines()[:6] == [
        "only in A\twide0.png", "only in B\tnew.png", "changed\twide1.png",
        "renamed\twide2.png\tzebra\\x1b.png", "caption\ttall0.png", "caption\twide2.png",
    ]  # fmt: skip
    assert "\x1b" not in shown.out
    assert "  tall0.png: 'picture number 0' -> 'quite another picture'\n" in shown.out
    assert shown.out.endswith(": they differ\n")


def test_images_that_are_gone_count_no_longer(images, cache, other, tmp_path):
    shutil.copytree(cache, tmp_path / "b")
    (images / "wide0.png").unlink()
    assert encode(images, tmp_path / "b", flip=True).ok
    result = diff(cache, tmp_path / "b")
    assert differences(result) == {"only_a": ("wide0.png",), "buckets": (("96x32", 4, 3),)}
    assert result.num_prompts == (1, 0)


def test_equal_images_meet_one_by_one(images, other, tmp_path):
    for folder, count in ((images, 3), (other, 2)):
        for n in range(count):
            shutil.copy(images / "wide0.png", folder / f"{folder.name}{n}.png")
        encode(folder, tmp_path / f"c{count}")
    result = diff(tmp_path / "c3", tmp_path / "c2")
    assert result.renamed == (("images0.png", "other0.png"), ("images1.png", "other1.png"))
    assert (result.only_a, result.only_b) == (("images2.png",), ())


@pytest.mark.slow
def test_the_distance_of_another_number_type_is_that_of_its_rounding(run, images, tmp_path):
    encode(images, tmp_path / "a", store_dtype="float32", flip=True)
    encode(images, tmp_path / "b", store_dtype="bfloat16", flip=True, **SHARDS)
    result = diff(tmp_path / "a", tmp_path / "b")
    assert result.recipe == ("--store-dtype float32 -> bfloat16", "--cond-dtype float32 -> bfloat16")
    exact, stored = (rows_of(tmp_path / name) for name in "ab")
    assert all(torch.equal(exact[key]["latent_mean"].bfloat16(), stored[key]["latent_mean"]) for key in exact)
    for field in ("latent_mean", "latent_std"):
        wanted = distances_by_hand(tmp_path / "a", tmp_path / "b", field)
        found = result.latents.distances[field]
        assert found.worst == pytest.approx(max(wanted.values()), rel=1e-4)
        assert found.mean == pytest.approx(sum(wanted.values()) / 8, rel=1e-4)
        assert dict(found.most) == pytest.approx({key: wanted[key] for key, _ in found.most}, rel=1e-4)
        assert [value for _, value in found.most] == pytest.approx(sorted(wanted.values(), reverse=True)[:5], rel=1e-4)
    assert 1e-4 < result.latents.distances["latent_mean"].worst < 4e-3  # bfloat16 has 8 bits
    assert 1e-4 < result.cond.distances["cond"].worst < 1e-2
    assert result.latents.distances["weight"].is_zero


def test_cond_in_8_bits_is_compared_as_float32(images, cache, tmp_path):
    encode(images, tmp_path / "b", flip=True, cond_dtype="int8")
    result = diff(cache, tmp_path / "b")
    assert result.recipe == ("--cond-dtype float16 -> int8",)
    assert 1e-3 < result.cond.distances["cond"].worst < 0.02
    assert result.latents.is_zero
    assert all("\n" not in prompt for prompt, _ in result.cond.distances["cond"].most)


def test_one_changed_latent_is_found_and_its_image_named(images, cache, tmp_path):
    shutil.copytree(cache, tmp_path / "b")

    def change(values):
        values[0, 1, 2, 0, 0] += 1
        return values

    rewrite(tmp_path / "b", "latents", put("latent_mean", change))
    result = diff(cache, tmp_path / "b")
    found = result.latents.distances["latent_mean"]
    assert differences(result) == {}
    assert not result.is_same
    assert len(found.most) == 2  # the first row of each group
    assert dict(found.most) == pytest.approx(
        {key: value for key, value in distances_by_hand(cache, tmp_path / "b").items() if value}, rel=1e-4
    )


def test_a_number_that_is_none_is_the_worst(run, cache, tmp_path):
    shutil.copytree(cache, tmp_path / "b")

    def spoil(values):
        values[0] = float("nan")
        return values

    rewrite(tmp_path / "b", "latents", put("latent_mean", spoil))
    assert not diff(cache, tmp_path / "b").is_same
    shown = run("diff", cache, tmp_path / "b", "--json")
    assert shown.code == 1
    found = json.loads(shown.out)["latents"]["distances"]["latent_mean"]
    assert (found["worst"], found["most"][0][1]) == (None, None)


def test_another_vae_is_far_away(images, tmp_path):
    for n in range(2):
        encode(images, tmp_path / f"c{n}", model=make_model(tmp_path / f"m{n}", seed=n), no_cond=True)
    result = diff(tmp_path / "c0", tmp_path / "c1")
    (line,) = result.recipe
    assert line.startswith("another VAE (--model, --vae): ")
    assert result.latents.distances["latent_mean"].worst > 0.3
    assert result.cond.why_not == "no cond in A and B"


def test_latents_of_another_shape_are_not_compared(images, cache, tmp_path):
    encode(images, tmp_path / "b", model=make_model(tmp_path / "m", block_out_channels=(8, 8, 16)), no_cond=True)
    result = diff(cache, tmp_path / "b")
    assert "factor: 8 -> 4" in result.latent
    assert "for 8 pixels cannot be compared with those of 4 channels for 4 pixels" in result.latents.why_not
    assert result.cond.why_not == "no cond in B"
    assert "not compared, no cond in B" in repr(result)


def test_only_the_same_crops_are_compared(images, cache, tmp_path):
    encode(images, tmp_path / "b", flip=True, crop="random")
    result = diff(cache, tmp_path / "b")
    assert result.recipe == ("--crop center -> random", "--seed none -> 0")
    crops = [{key: row["crop"].tolist() for key, row in rows_of(folder).items()} for folder in (cache, tmp_path / "b")]
    alike = {key for key, crop in crops[0].items() if crops[1][key] == crop}
    assert 0 < len(alike) + result.latents.num_unlike == 8
    assert len(alike) < 8
    assert result.latents.num_compared == len(alike)
    assert result.latents.is_zero is False
    assert all(distance.is_zero for distance in result.latents.distances.values())
    assert "of another bucket, crop or view: " in repr(result)


def test_another_resolution_has_no_bucket_in_common(images, cache, tmp_path):
    encode(images, tmp_path / "b", flip=True, resolution=128)
    result = diff(cache, tmp_path / "b")
    assert "--resolution 64 -> 128" in result.recipe
    assert (result.latents.num_compared, result.latents.num_unlike, result.latents.distances) == (0, 8, {})


def test_views_that_both_have_are_compared(images, cache, tmp_path):
    encode(images, tmp_path / "b")
    for a, b, shown in ((cache, tmp_path / "b", "yes -> no"), (tmp_path / "b", cache, "no -> yes")):
        result = diff(a, b)
        assert result.recipe == (f"--flip: {shown}",)
        assert result.latents.num_compared == 8
        assert result.latents.is_zero


def test_rows_are_compared_in_parts(images, cache, tmp_path, monkeypatch):
    encode(images, tmp_path / "b", flip=True, store_dtype="bfloat16", **SHARDS)
    whole = diff(cache, tmp_path / "b")
    monkeypatch.setattr(latent_distances, "AT_ONCE", 1)
    assert diff(cache, tmp_path / "b").latents.distances["latent_mean"].worst == pytest.approx(
        whole.latents.distances["latent_mean"].worst
    )


def test_a_weight_that_one_cache_lacks_is_1(images, cache, tmp_path):
    encode(images, tmp_path / "b", flip=True, weights="none", background="keep")
    weight = diff(cache, tmp_path / "b").latents.distances["weight"]
    found = {key for key, value in weight.most if value}
    assert found == {"tall1.png", "tall3.png"}
    rows = rows_of(cache)
    wanted = {key: float((1 - rows[key]["weight"].float()).square().mean().sqrt()) for key in found}
    assert dict(weight.most) == pytest.approx(wanted)


@pytest.mark.slow
def test_control_images_are_compared(images, other, tmp_path):
    encode(images, tmp_path / "a", control=other)
    for path in other.glob("*.png"):
        gradient(*(128, 40) if "wide" in path.name else (64, 80)).save(path)
    encode(images, tmp_path / "b", control=other)
    result = diff(tmp_path / "a", tmp_path / "b")
    assert result.changed  # a control image is content
    encode(images, tmp_path / "c", control=other, store_dtype="bfloat16")
    found = diff(tmp_path / "b", tmp_path / "c").latents.distances
    assert 0 < found["control_1"].worst < 0.01
    assert "control_1      mean" in repr(diff(tmp_path / "b", tmp_path / "c"))


@pytest.mark.slow
def test_sets_are_compared_by_name(images, other, tmp_path):
    def sets(**options):
        return [{"name": "one", "source": images, **options}, {"name": "two", "source": other}]

    encode(sets(), tmp_path / "a")
    encode(sets(repeats=3, trigger="sks"), tmp_path / "b")
    encode([*sets()[:1], {"name": "three", "source": other}], tmp_path / "c")
    result = diff(tmp_path / "a", tmp_path / "b")
    assert "one: repeats 1 -> 3" in result.sets
    assert result.captions == tuple(sorted(f"one/{path.name}" for path in images.glob("*.png")))
    result = diff(tmp_path / "a", tmp_path / "c")
    assert result.sets == ("three: only in B", "two: only in A")
    assert len(result.renamed) == 8


def test_text_recipes_differ_in_the_words_of_options(images, cache, tmp_path):
    (tmp_path / "lines.txt").write_text("a photo of [filewords]")
    encode(images, tmp_path / "b", flip=True, template=tmp_path / "lines.txt", shuffle_tags=True, max_tokens=150)
    result = diff(cache, tmp_path / "b")
    assert result.recipe == (
        "--max-tokens none -> 150", "--seed none -> 0", "--shuffle-tags: no -> yes",
        '--template none -> ["a photo of [filewords]"]',
    )  # fmt: skip
    assert result.num_prompts == (8, 8)


def test_cond_of_another_length_is_not_compared(images, cache, tmp_path):
    encode(images, tmp_path / "b", flip=True, max_tokens=150)
    result = diff(cache, tmp_path / "b")
    assert result.recipe == ("--max-tokens none -> 150",)
    assert (result.cond.num_compared, result.cond.num_unlike) == (0, 9)
    assert "with cond of other names or shapes: 9: " in repr(result)


@pytest.mark.slow
def test_another_text_encoder_is_named(images, tmp_path):
    models = [make_model(tmp_path / f"m{seed}", seed=seed) for seed in range(2)]
    encode(images, tmp_path / "a", model=models[0])
    encode(images, tmp_path / "b", model=models[0], text_encoder=models[1] / "text_encoder")
    result = diff(tmp_path / "a", tmp_path / "b")
    assert any(line.startswith("another text encoder (--model, --text-encoder): ") for line in result.recipe)
    assert result.latents.is_zero
    assert not result.cond.is_zero


def test_cond_that_one_cache_borrows_is_the_same(images, tmp_path):
    for n, path in enumerate(sorted(images.glob("*.png"))):
        path.with_suffix(".txt").write_text(("a dog", "a cat")[n % 2])
    encode(images, tmp_path / "a", **SHARDS)
    encode(images, tmp_path / "b")
    assert manifests.open_manifest(Storage(tmp_path / "a")).cond_files
    assert not manifests.open_manifest(Storage(tmp_path / "b")).cond_files
    result = diff(tmp_path / "a", tmp_path / "b")
    assert result.is_same
    assert result.cond.num_compared == 2


@pytest.mark.slow
def test_skips_are_compared_by_reason(images, cache, other, tmp_path):
    data = (other / "wide0.png").read_bytes()
    (other / "bad.png").write_bytes(data[:-40])
    encode(other, tmp_path / "b", flip=True)
    (other / "bad.png").write_bytes(b"no image at all")
    encode(other, tmp_path / "c", flip=True)
    assert diff(cache, tmp_path / "b").skips == (("bad.png", "", "truncated"),)
    assert diff(tmp_path / "b", tmp_path / "c").skips == (("bad.png", "truncated", "not_an_image"),)
    assert "bad.png (truncated -> not_an_image)" in repr(diff(tmp_path / "b", tmp_path / "c"))


@pytest.mark.parametrize("kind", ["latents", "text"])
def test_a_damaged_shard_is_one_line_and_the_rest_is_compared(run, images, cache, tmp_path, kind):
    encode(images, tmp_path / "b", flip=True, **SHARDS)
    path = sorted((tmp_path / "b" / "shards").glob(f"*.{kind}.*"))[0]
    path.write_bytes(path.read_bytes()[:50])
    for a, b, which in ((cache, tmp_path / "b", "B"), (tmp_path / "b", cache, "A")):
        shown = run("diff", a, b)
        assert shown.code == 1
        (line,) = [line for line in shown.out.splitlines() if path.name in line]
        assert line.startswith(f"unreadable in {which}: ")
        result = diff(a, b)
        assert differences(result).keys() == {"problems"}  # keys are known from the other file
        assert 0 < result.latents.num_compared < 8 or kind == "text"
        assert 0 < result.cond.num_compared < 8 or kind == "latents"
    assert repr(result).endswith(": nothing differs in what was compared") or kind == "text"


def test_a_shard_without_a_file_that_can_be_read_is_not_there(images, cache, tmp_path):
    encode(images, tmp_path / "b", flip=True, **SHARDS)
    shard = manifests.open_manifest(Storage(tmp_path / "b")).shards[0]
    for name in shard.files():
        (tmp_path / "b" / name).unlink()
    result = diff(cache, tmp_path / "b")
    assert len(result.only_a) == shard.num_images
    assert f"its {shard.num_images} images count as not there" in repr(result)
    assert [which for which, _ in result.problems] == ["B"] * 3


def test_damaged_cond_is_one_line(images, cache, tmp_path):
    shutil.copytree(cache, tmp_path / "b")
    (path,) = (tmp_path / "b").glob("uncond.*")
    path.write_bytes(b"")
    result = diff(cache, tmp_path / "b")
    assert [problem.name for _, problem in result.problems] == [path.name]
    assert (result.cond.num_compared, result.cond.distances["cond"].num) == (8, 8)
    assert "8 compared, and the empty one" in repr(diff(cache, cache))
    assert "empty" not in repr(result)


def test_a_damaged_cond_file_is_one_line_however_many_shards_borrow_from_it(images, tmp_path):
    for path in images.glob("*.png"):
        path.with_suffix(".txt").write_text("a dog" if "tall" in path.name else "a cat")
    encode(images, tmp_path / "a", **SHARDS)
    shutil.copytree(tmp_path / "a", tmp_path / "b")
    (path,) = (tmp_path / "b" / "shards").glob("*.cond.*")
    path.write_bytes(path.read_bytes()[:100])
    result = diff(tmp_path / "a", tmp_path / "b")
    assert [which for which, _ in result.problems] == ["B"]
    assert repr(result).count(path.name) == 1
    assert (result.cond.num_shared, result.cond.num_compared, result.cond.distances["cond"].num) == (2, 0, 1)


def test_the_summary_of_much_damage_fits_on_a_screen(images, cache, tmp_path):
    encode(images, tmp_path / "b", flip=True, shard_size=1)
    for path in (tmp_path / "b" / "shards").iterdir():
        path.write_bytes(b"")
    result = diff(cache, tmp_path / "b")
    assert len(result.problems) == 24
    assert repr(result).count("unreadable") == 12
    assert "and 12 more that cannot be read" in repr(result)


def test_samples_are_random_and_said(run, images, cache, tmp_path):
    encode(images, tmp_path / "b", flip=True, store_dtype="bfloat16", **SHARDS)
    chosen = set()
    for seed in range(8):
        result = diff(cache, tmp_path / "b", samples=2, seed=seed)
        assert (result.latents.num_shared, result.latents.num_compared, result.cond.num_compared) == (8, 2, 2)
        chosen |= {key for key, _ in result.latents.distances["latent_mean"].most}
    assert len(chosen) > 4
    shown = run("diff", cache, cache, "--samples", 3)
    assert shown.code == 0
    assert "8 images of the same content in both, 3 compared" in shown.out
    assert shown.out.endswith(": nothing differs in what was compared\n")
    assert run("diff", cache, cache, "--samples", 0).code == 0
    assert (
        run("diff", cache, cache, "--samples", -1).err == "error: --samples -1: expected a whole number, at least 0.\n"
    )


def test_json_is_one_object_with_all_that_the_result_has(run, cache, other, tmp_path):
    for n in range(6):
        gradient(40 + n, 40).save(other / f"new{n}.png")
    encode(other, tmp_path / "b", flip=True)
    shown = run("diff", cache, tmp_path / "b", "--json")
    assert shown.code == 1
    found = json.loads(shown.out)
    assert found == json.loads(json.dumps(diff(cache, tmp_path / "b").to_json()))
    assert found["only_b"] == [f"new{n}.png" for n in range(6)]
    assert (found["same"], found["images"]) == (False, {"a": 8, "b": 14})
    assert "only in B        6: new0.png, new1.png, new2.png, ...\n" in run("diff", cache, tmp_path / "b").out
    assert json.loads(run("diff", cache, cache, "--json").out)["same"] is True


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("{cache}",), "B: is missing, expected: The cache to compare it with. Type: latentprep diff A B"),
        (("{cache}", "nowhere"), "nowhere: not a latent cache"),
        (("foo://x", "{cache}"), "foo://x: cannot open this location"),
        (("{cache}", "{cache}", "{cache}"), "not expected here"),
        (("{cache}", "{cache}", "--list", "--json"), "--list with --json"),
        (("{cache}", "{cache}", "--sample"), "--sample: no such option"),
    ],
)
def test_what_cannot_be_compared_is_one_line_and_exit_code_2(run, cache, words, said):
    shown = run("diff", *(word.format(cache=cache) for word in words))
    assert (shown.code, shown.out) == (2, "")
    assert said in shown.err
    assert shown.err.count("\n") == 1


def test_caches_at_urls_are_compared(run, images, other):
    places = [f"memory://diff{os.getpid()}/{name}" for name in "ab"]
    (other / "tall0.txt").write_text("another")
    for folder, where in zip((images, other), places, strict=True):
        assert run("encode", folder, "--out", where, *SMALL, "--shard-size", "30kB").code == 0
    shown = run("diff", *places)
    assert shown.code == 1
    assert "caption          1: tall0.png\n" in shown.out
    assert run("diff", places[0], places[0]).code == 0


def test_an_empty_cache_has_nothing_in_common(cache, tmp_path):
    (tmp_path / "b").mkdir()
    manifests.commit(Storage(tmp_path / "b"), manifests.open_manifest(Storage(cache)).having([]), [])
    shutil.copy(*cache.glob("uncond.*"), tmp_path / "b")
    result = diff(cache, tmp_path / "b")
    assert len(result.only_a) == 8
    assert diff(tmp_path / "b", tmp_path / "b").is_same


def test_pairs_are_those_of_a_dictionary():
    random = np.random.default_rng(0)
    for _ in range(50):
        numbers = [random.integers(0, 12, random.integers(0, 30)).tolist() for _ in range(2)]
        one, other = (hashes_of(bytes([n]) for n in part) for part in numbers)
        places = {}
        for number, value in enumerate(other.tolist()):
            places.setdefault(value, []).append(number)
        wanted = [(n, places[value].pop(0)) for n, value in enumerate(one.tolist()) if places.get(value)]
        assert list(map(tuple, pair_up(one, other).tolist())) == wanted


def test_what_changed_in_a_set_is_told_in_words():
    before = {"name": "a", "repeats": 1, "sample_weight": 1.0, "caption_dropout": 0.0, "flip": True}
    after = {"name": "a", "repeats": 3, "sample_weight": 0.5, "caption_dropout": 0.25, "flip": False}
    assert list(describe_set_changes(before, after)) == [
        "repeats 1 -> 3", "weight of the loss 1 -> 0.5", "captions left out 0% -> 25%", "may be mirrored yes -> no",
    ]  # fmt: skip
    assert not list(describe_set_changes(before, before))
