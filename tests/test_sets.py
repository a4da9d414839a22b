"""Several sets in one cache: each with its own captions, repeats, weight and masks, from `encode` to the batch."""

import json
import shutil
from collections import Counter

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import DataLoader

import latentprep
from latentprep import BucketBatchSampler, LatentDataset, LatentLoader, LatentMix, UserError
from latentprep.cache.manifest import open_manifest
from latentprep.cache.storage import Storage
from tests.test_encode import files

SMALL = {"model": "tiny", "resolution": 64, "bucket_step": 32, "min_side": 32, "device": "cpu", "progress": False}
TOP = 'model = "tiny"\nresolution = 64\nbucket-step = 32\nmin-side = 32\ndevice = "cpu"\n'


def draw(path, color, size=(64, 64), caption=None):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, color).save(path)
    if caption is not None:
        path.with_suffix(".txt").write_text(caption, encoding="utf-8")


@pytest.fixture
def folders(tmp_path, monkeypatch):
    """./dog with 3 images in two buckets, ./reg with 5; all of other colours."""
    for n in range(3):
        draw(tmp_path / f"dog/{n}.png", (40 * n, 0, 0), (64, 64) if n else (96, 32), f"sitting, tag {n}")
    for n in range(5):
        draw(tmp_path / f"reg/{n}.png", (0, 40 * n, 9), caption=f"other {n}")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def two_sets(**dog):
    return [{"source": "dog", "repeats": 4, "trigger": "sks dog", **dog}, {"source": "reg", "sample_weight": 0.25}]


def encode(sets, out="c", **options):
    result = latentprep.encode(sets, out, **{**SMALL, **options})
    assert result.ok, result
    return result


def count_epoch(loader):
    return Counter(loader.data.key(index) for batch in loader for index in batch.index.tolist())


def test_a_file_of_sets_gives_one_cache_whose_rows_know_their_set(run, folders):
    (folders / "sets.toml").write_text(
        f'{TOP}\n[[set]]\nsource = "dog"\nrepeats = 4\ntrigger = "sks dog"\n'
        '[[set]]\nsource = "reg"\nname = "others"\nsample-weight = 0.25\ncaption-from = "folder"\n',
        encoding="utf-8",
    )
    result = run("encode", "sets.toml")
    assert result.code == 0, result.err
    assert "set      dog: 3 images x 4 repeats (dog)\n" in result.err
    assert "set      others: 5 images, weight 0.25 (reg)\n" in result.err
    data = LatentDataset("sets.latents")
    assert data.sets == ["dog", "others"]
    assert "2 sets dog others" in repr(data)
    loader = LatentLoader(data, batch_size=2)
    for batch in loader:
        for n, index in enumerate(batch.index.tolist()):
            name, _, rest = data.key(index).partition("/")
            assert batch.set[n] == name
            assert batch.sample_weight[n] == (1.0 if name == "dog" else 0.25)
            assert batch.cond_text[n] == ("reg" if name == "others" else f"sks dog, sitting, tag {rest[0]}")
    assert run("encode", "sets.toml").out.startswith("sets.latents is complete with 8 images")
    assert run("verify", "sets.latents", "--source", "sets.toml", "--re-encode", 8).code == 0


@pytest.mark.parametrize("batch_size", [1, 2, 5])
@pytest.mark.parametrize("repeats", [1, 3])
def test_repeats_of_a_set_reach_the_epoch(folders, batch_size, repeats):
    encode(two_sets())
    wanted = {f"dog/{n}.png": 4 * repeats for n in range(3)} | {f"reg/{n}.png": repeats for n in range(5)}
    loader = LatentLoader(LatentDataset("c", repeats=repeats), batch_size=batch_size)
    for _ in range(2):
        assert count_epoch(loader) == wanted
    data = loader.data
    assert len(data) == sum(wanted.values())
    assert Counter(map(data.key, range(len(data)))) == wanted
    own = DataLoader(data, batch_sampler=BucketBatchSampler(data, batch_size), collate_fn=LatentDataset.collate)
    assert Counter(data.key(n) for batch in own for n in batch.index.tolist()) == wanted
    shared = Counter()
    for rank in range(2):
        shared += count_epoch(LatentLoader(data, batch_size=batch_size, rank=rank, world_size=2))
    assert all(0 <= shared[key] - count <= 1 for key, count in wanted.items())


def test_repetitions_have_draws_and_flips_of_their_own(folders):
    encode(two_sets(repeats=50), flip=True)
    data = LatentDataset("c", latent_sampling_method="random", flip_p=0.5).select(set="dog")
    batches = list(LatentLoader(data, batch_size=10))
    flips = torch.cat([batch.flipped for batch in batches])
    assert 40 < flips.sum() < 110
    draws = torch.cat([batch.latent_sample.flatten(1)[:, 0] for batch in batches])
    assert len(draws.unique()) == 150


def test_parts_and_mixes_keep_the_sets(folders):
    encode(two_sets())
    data = LatentDataset("c")
    dog, reg = data.select(set="dog"), data.select(set=["reg"])
    assert (len(dog), dog.num_images, len(reg), reg.num_images) == (12, 3, 5, 5)
    assert {name for batch in LatentLoader(dog, batch_size=2) for name in batch.set} == {"dog"}
    assert len(data.select("*/1.png", set="dog")) == 4
    assert len(data.select("*/1.png")) == 5
    rest, part = data.split(0.5)
    assert len(rest) + len(part) == 17
    mix = LatentMix([dog, reg], proportions=[1, 1])
    counts = Counter(batch.member for batch in LatentLoader(mix, batch_size=1))
    assert counts == {0: 9, 1: 8} or counts == {0: 8, 1: 9}
    turns = LatentLoader(LatentMix([data, LatentDataset("c")], same_images="in turn"), batch_size=1)
    for _ in range(3):
        assert Counter(data.key(n) for batch in turns for n in batch.index.tolist()) == count_epoch(
            LatentLoader(data, 1)
        )


@pytest.mark.parametrize(
    ("wanted", "words"),
    [
        ({"set": "cat"}, "set='cat': no such set. The cache has dog, reg."),
        ({"set": []}, "set: the list is empty"),
        ({"set": 3}, "set=3: expected the name of a set, or a list of them"),
        ({"set": "dog", "keys": "reg/*"}, "no image here has such a key"),
    ],
)
def test_what_is_no_set_is_one_line(folders, wanted, words):
    encode(two_sets())
    with pytest.raises(UserError, match=words):
        LatentDataset("c").select(**wanted)


def test_a_cache_of_one_source_has_no_sets(folders):
    encode("dog")
    data = LatentDataset("c")
    assert data.sets == []
    assert {name for batch in LatentLoader(data, batch_size=2) for name in batch.set} == {""}
    with pytest.raises(UserError, match="The cache has none: all its images are of one source"):
        data.select(set="dog")


def test_captions_are_left_out_and_views_mirrored_as_the_sets_say(folders):
    sets = two_sets(caption_dropout=1.0)
    sets[1]["flip"] = False
    encode(sets, flip=True)
    for batch in LatentLoader(LatentDataset("c", flip_p=1.0), batch_size=3):
        for name, prompt, flipped in zip(batch.set, batch.cond_text, batch.flipped.tolist(), strict=True):
            assert (prompt == "", flipped) == ((True, True) if name == "dog" else (False, False))
    kept = [prompt for batch in LatentLoader(LatentDataset("c", caption_dropout=0.0), 1) for prompt in batch.cond_text]
    assert "" not in kept


def list_texts(cache="c"):
    """The text files of each set."""
    manifest = open_manifest(Storage(cache))
    return {manifest.sets[shard.sets[0][0]].name: shard.text_name for shard in manifest.shards}


@pytest.mark.parametrize("change", [{"trigger": "a cat"}, {"caption_suffix": "behind"}, {"shuffle_tags": True}])
def test_a_caption_rule_of_one_set_remakes_its_text_alone(folders, change):
    encode(two_sets())
    before, latents = list_texts(), [name for name in files(folders / "c") if ".latents." in name]
    result = encode(two_sets(**change))
    assert (result.num_encoded, result.num_retexted) == (0, 3)
    assert {key.key.partition("/")[0] for key in result.changes} == {"dog"}
    after = list_texts()
    assert after["reg"] == before["reg"]
    assert after["dog"] != before["dog"]
    assert [name for name in files(folders / "c") if ".latents." in name] == latents
    assert latentprep.verify("c", progress=False).ok
    fresh = encode(two_sets(**change), "fresh")
    assert fresh.num_encoded == 8
    texts = [[name for name in files(folders / cache) if ".text." in name] for cache in ("c", "fresh")]
    assert texts[0] == texts[1]


def test_another_weight_or_repeats_write_no_file_but_the_manifest(folders):
    encode(two_sets())
    before = files(folders / "c")
    sets = two_sets(repeats=9, sample_weight=2)
    result = encode(sets)
    assert (result.num_encoded, result.num_retexted, result.changes) == (0, 0, ())
    assert {name for name in files(folders / "c") if files(folders / "c")[name] != before.get(name)} == {"cache.json"}
    data = LatentDataset("c")
    assert len(data) == 27 + 5
    assert {float(weight) for batch in LatentLoader(data, 1) for weight in batch.sample_weight} == {2.0, 0.25}


def test_an_image_that_moves_to_another_set_is_not_encoded_again(folders):
    encode(two_sets())
    shutil.move("dog/1.png", "reg/moved.png")
    shutil.move("dog/1.txt", "reg/moved.txt")
    result = encode(two_sets())
    assert result.num_encoded == 0
    assert [(change.key, change.what) for change in result.changes] == [("reg/moved.png", "renamed")]
    data = LatentDataset("c")
    assert count_epoch(LatentLoader(data, 2)) == {
        "dog/0.png": 4, "dog/2.png": 4, "reg/moved.png": 1, **{f"reg/{n}.png": 1 for n in range(5)}
    }  # fmt: skip
    names = {
        data.key(n): (name, prompt)
        for batch in LatentLoader(data, 2)
        for n, name, prompt in zip(batch.index.tolist(), batch.set, batch.cond_text, strict=True)
    }
    assert names["reg/moved.png"] == ("reg", "sitting, tag 1")
    assert latentprep.verify("c", progress=False).ok
    # a rule of the other set now concerns a file that both have rows in: only its own images are named
    result = encode([*two_sets()[:1], {**two_sets()[1], "caption_prefix": "new"}])
    assert {change.key.partition("/")[0] for change in result.changes} == {"reg"}
    assert latentprep.verify("c", progress=False).ok
    # and once its dead rows are gone, there is still nothing to do
    (folders / "dog/2.png").unlink()
    encode([*two_sets()[:1], {**two_sets()[1], "caption_prefix": "new"}], allow_gone=True)
    assert latentprep.compact("c", min_share=0).num_rows == 1
    assert latentprep.verify("c", progress=False).ok
    again = encode([*two_sets()[:1], {**two_sets()[1], "caption_prefix": "new"}])
    assert (again.num_encoded, again.num_retexted) == (0, 0)
    assert len(LatentDataset("c")) == 4 + 6


def test_a_set_comes_and_goes(folders):
    encode(two_sets())
    draw(folders / "cat/0.png", "white", caption="a cat")
    sets = [{"source": "cat", "repeats": 2}, *two_sets()]  # it comes first: the others get other numbers
    result = encode(sets)
    assert (result.num_encoded, result.num_retexted) == (1, 0)
    assert count_epoch(LatentLoader(LatentDataset("c"), 1))["cat/0.png"] == 2
    result = encode(two_sets(), allow_gone=True)
    assert [(change.key, change.what) for change in result.changes] == [("cat/0.png", "gone")]
    assert len(LatentDataset("c")) == 17
    assert latentprep.verify("c", progress=False).ok


def test_one_source_becomes_sets_and_one_source_again_without_encoding(folders):
    shutil.copytree("dog", "all/dog")
    shutil.copytree("reg", "all/reg")
    encode("all")
    result = encode([{"source": "all/dog", "repeats": 2}, {"source": "all/reg"}], allow_gone=True)
    assert result.num_encoded == 0
    assert len(LatentDataset("c")) == 11
    result = encode("all")
    assert result.num_encoded == 0
    assert (len(LatentDataset("c")), LatentDataset("c").sets) == (8, [])


def test_masks_are_those_of_the_set(run, folders):
    for n in range(3):
        image = Image.new("L", (64, 64) if n else (96, 32), 0)
        image.paste(255, (0, 0, 32, 32))
        (folders / "masks").mkdir(exist_ok=True)
        image.save(folders / f"masks/{n}.png")
    result = encode(two_sets(weights="masks"))
    assert result.num_encoded == 8
    for batch in LatentLoader(LatentDataset("c", use_weight="raw"), batch_size=1):
        assert (float(batch.weight.mean()) < 1) == (batch.set == ["dog"])
    (folders / "sets.toml").write_text('[[set]]\nsource = "dog"\nweights = "masks"\n[[set]]\nsource = "reg"\n')
    assert latentprep.verify("c", source="sets.toml", re_encode=8, progress=False).ok
    result = run("encode", "sets.toml", "--out", "d", "--model", "tiny", "--resolution", 64, "--dry-run")
    assert "masks    set reg: none, so the images weigh evenly\n" in result.err
    Image.new("L", (64, 64), 0).save(folders / "masks/1.png")
    assert encode(two_sets(weights="masks")).num_encoded == 1


@pytest.mark.slow
def test_ranks_passes_and_processes_make_the_same_cache(folders):
    sets = two_sets(shuffle_tags=True)
    encode(sets, "whole", shard_size="20kB")
    whole = files(folders / "whole")
    first = latentprep.encode(sets, "ranks", **SMALL, shard_size="20kB", rank=0, world_size=2)
    assert first.absent == (1,)
    encode(sets, "ranks", shard_size="20kB", rank=1, world_size=2)
    encode(sets, "passes", shard_size="20kB", only="latents")
    encode(sets, "passes", shard_size="20kB", only="text")
    encode(sets, "processes", shard_size="20kB", device="auto", devices="cpu,cpu")
    encode(sets, "memory://sets/c", shard_size="20kB")
    for other in ("ranks", "processes"):  # without text, units are cut otherwise
        found = files(folders / other)
        assert {name: found[name] for name in found if name != "cache.json"} == {
            name: whole[name] for name in whole if name != "cache.json"
        }
    wanted = count_epoch(LatentLoader(LatentDataset("whole"), 2))
    for other in ("ranks", "passes", "processes", "memory://sets/c"):
        assert count_epoch(LatentLoader(LatentDataset(other), 2)) == wanted


def test_a_run_that_was_stopped_goes_on_with_its_sets(folders):
    encode(two_sets(), shard_size="20kB")
    whole = files(folders / "c")
    (folders / "c/cache.json").unlink()  # as if it had been killed before its commit
    for name in [name for name in whole if ".text." in name][:1]:
        (folders / "c" / name).unlink()
    result = encode(two_sets(), shard_size="20kB")
    assert (result.num_encoded, files(folders / "c")) == (0, whole)
    (folders / "c/cache.json").unlink()
    shutil.move("dog/1.png", "reg/7.png")  # what was left is taken up, and another set has an image of it now
    result = encode(two_sets(), shard_size="20kB")
    assert result.num_encoded == 0
    assert count_epoch(LatentLoader(LatentDataset("c"), 2))["reg/7.png"] == 1
    assert latentprep.verify("c", progress=False).ok


def test_what_stands_at_the_top_or_is_typed_is_for_all_sets(run, folders):
    (folders / "s.toml").write_text(
        f'{TOP}exclude = "2.*"\ncaption_prefix = "all"\n[[set]]\nsource = "dog"\nexclude = "1.*"\n'
        '[[set]]\nsource = "reg"\ncaption_prefix = "own"\n',
        encoding="utf-8",
    )
    assert run("encode", "s.toml").code == 0
    data = LatentDataset("s.latents")
    keys = {"dog/0.png", *(f"reg/{n}.png" for n in (0, 1, 3, 4))}
    assert {data.key(n): data.caption(n)[0].split()[0] for n in range(len(data))} == {
        key: "all" if "dog" in key else "own" for key in keys
    }
    assert run("verify", "s.latents", "--source", "s.toml").code == 0
    assert run("encode", "s.toml", "--exclude", "4.*", "--caption-prefix", "typed").code == 0  # in place of the top's
    assert run("verify", "s.latents", "--source", "s.toml").code == 0
    data = LatentDataset("s.latents")
    assert {data.key(n): data.caption(n)[0].split()[0] for n in range(len(data))} == {
        "dog/0.png": "typed", "dog/2.png": "typed", **{f"reg/{n}.png": "own" for n in range(4)}
    }  # fmt: skip


def test_auto_repeats_give_a_set_as_many_samples_as_the_others(folders):
    sets = two_sets()
    sets[1]["repeats"] = "auto"
    encode(sets)
    assert [own["repeats"] for own in latentprep.inspect("c")["sets"]] == [4, 2]  # 12 of the one, 10 of the other


BAD = [
    ([{"source": "dog", "repeat": 3}, {"source": "reg"}], "set dog: repeat: no such key. Did you mean repeats?"),
    ([{"repeats": 3}], "set 1: source: expected a folder, or a tar."),
    ([{"source": "dog"}, {"source": "dog"}], "set dog: name: another set is called dog too."),
    ([{"source": "dog", "name": "a/b"}], "set a/b: name = 'a/b': expected a text without a slash, of at most 255"),
    ([{"source": "dog", "name": ".."}], "set ..: name = '..': expected a text without a slash"),
    ([{"source": "dog", "name": "x" * 256}], "expected a text without a slash, of at most 255"),
    ([{"source": "dog", "name": "\ud800"}], "expected a text without a slash"),
    ([{"source": "dog\0"}], "can be no path."),
    ([{"source": "/"}], "name = '': expected a text without a slash"),
    ([{"source": "dog", "sample_weight": 2**2000}], "expected a number of 0 or more"),
    ([{"source": "dog", "repeats": 0}], "set dog: repeats = 0: expected a whole number of at least 1"),
    ([{"source": "dog", "repeats": True}], "set dog: repeats = True: expected"),
    (
        [{"source": "dog", "sample_weight": float("nan")}],
        "set dog: sample_weight = nan: expected a number of 0 or more.",
    ),
    ([{"source": "dog", "caption_dropout": 2}], "set dog: caption_dropout = 2: expected a probability"),
    ([{"source": "dog", "shuffle_tags": "yes"}], "set dog: shuffle_tags='yes': expected True or False."),
    ([{"source": "dog", "keep_tags": 2}], "set dog: keep_tags=2: nothing is shuffled or dropped."),
    ([{"source": "dog", "model": "tiny"}], "set dog: model: no such key."),
    ([{"source": "no"}, {"source": "reg"}], "set no: source no: no such folder"),
    ([{"source": "dog", "weights": "alpha"}, {"source": "reg", "weights": "none"}], "set dog: weights = .alpha., and"),
    ([], "the list of sets is empty"),
    (["dog"], "expected a text or a path. A list of sets has dicts"),
    (3, "source=3: expected a text or a path."),
]


@pytest.mark.parametrize(("sets", "words"), BAD)
def test_what_is_no_list_of_sets_is_one_line(folders, sets, words):
    with pytest.raises(UserError, match=words.replace("(", r"\(")):
        latentprep.encode(sets, "c", **SMALL)
    assert not (folders / "c").exists()


def test_a_manifest_whose_sets_contradict_it_is_refused(folders):
    encode(two_sets())
    good = json.loads((folders / "c/cache.json").read_text())
    from latentprep.cache.manifest import Manifest, msgspec

    for change in (
        lambda m: m["sets"].pop(),
        lambda m: m["sets"].append(m["sets"][0]),
        lambda m: m["shards"][0].update(sets=[]),
        lambda m: m["shards"][0].update(sets=[[0, 10**9]]),
        lambda m: m["sets"][0].update(repeats=0),
        lambda m: m["sets"][0].update(name="a/b"),
        lambda m: m["sets"][0].update(name=".."),
        lambda m: m["sets"][0].update(name="a\\b"),
        lambda m: m["made_with"]["again"].update(a=[[[[[1]]]]]),
        lambda m: m["sets"][0].update(caption_dropout=2),
        lambda m: m.update(sets=[]),
    ):
        bad = json.loads(json.dumps(good))
        change(bad)
        with pytest.raises(ValueError, match=r"set|rows|Expected|nested"):
            msgspec.convert(bad, Manifest)
    assert msgspec.convert(good, Manifest).sets[0].name == "dog"


@pytest.mark.parametrize(
    "change",
    [
        lambda manifest: manifest["sets"][0].update(name="zz"),
        lambda manifest: [shard["sets"][0].__setitem__(0, 1 - shard["sets"][0][0]) for shard in manifest["shards"]],
    ],
    ids=["name", "number"],
)
def test_verify_finds_images_that_are_given_to_another_set(folders, change):
    encode(two_sets())
    manifest = json.loads((folders / "c/cache.json").read_text())
    from latentprep.cache.manifest import Manifest, msgspec, pack

    change(manifest)
    (folders / "c/cache.json").write_bytes(pack(msgspec.convert(manifest, Manifest)))
    assert "sets" in [problem.problem for problem in latentprep.verify("c", progress=False).problems]


def test_numpys_numbers_will_do_and_absurd_ones_will_not(folders):
    encode([{"source": "dog", "repeats": np.int64(3), "sample_weight": np.float32(0.5)}])
    assert len(LatentDataset("c")) == 9
    with pytest.raises(UserError, match=r"repeats=.*: expected"):
        LatentDataset("c", repeats=2**62)


def test_rows_that_no_file_can_hold_take_no_memory(folders):
    encode(two_sets())
    manifest = json.loads((folders / "c/cache.json").read_text())
    from latentprep.cache.manifest import Manifest, msgspec, pack

    shard = manifest["shards"][0]
    shard["latents_file"]["nbytes"] = 2**40
    shard["groups"][0][1] = 2**39
    shard["sets"] = [[0, sum(rows for _, rows, _ in shard["groups"])]]
    (folders / "c/cache.json").write_bytes(pack(msgspec.convert(manifest, Manifest)))
    with pytest.raises(UserError, match=r"latents.safetensors has [\d,]+ bytes, expected 1,099,511,627,776"):
        LatentDataset("c")


def test_a_cache_is_compared_with_a_file_that_names_its_sets(run, folders):
    encode(two_sets())
    encode("dog", "one")
    (folders / "other.toml").write_text('[[set]]\nsource = "dog"\nname = "x"\n', encoding="utf-8")
    result = run("verify", "c", "--source", "other.toml")
    assert "--source other.toml: is not what this cache was made from, which has sets dog, reg." in result.err
    result = run("verify", "c", "--source", "dog")
    assert "--source dog: holds none of the cache's sets (dog, reg). Give their .toml file." in result.err
    assert run("verify", "c", "--source", ".").code == 0  # here are the folders of both
    result = run("verify", "one", "--source", "other.toml")
    assert "which has one source, without sets." in result.err


def test_sets_that_overlap_and_sets_without_masks_are_said(run, folders):
    (folders / "dog/in").mkdir()
    draw(folders / "dog/in/9.png", "white")
    (folders / "sets.toml").write_text('[[set]]\nsource = "dog"\n[[set]]\nsource = "dog/in"\n', encoding="utf-8")
    result = run("encode", "sets.toml", "--model", "tiny", "--resolution", 64, "--dry-run")
    assert "note     1 image is in set in and set dog: exclude from one what is not to come twice\n" in result.err
    (folders / "sets.toml").write_text('[[set]]\nsource = "dog"\nexclude = "in"\n[[set]]\nsource = "dog/in"\n', "utf-8")
    result = run("encode", "sets.toml", "--model", "tiny", "--resolution", 64, "--dry-run")
    assert "come twice" not in result.err
    (folders / "sets.toml").write_text("".join(f'[[set]]\nsource = "reg"\nname = "{n}"\n' for n in range(60)), "utf-8")
    result = run("encode", "sets.toml", "--model", "tiny", "--resolution", 64, "--dry-run")
    assert result.err.count("come twice") == 5
    assert "and so on: at least 100 pairs of sets share images" in result.err
    assert "         and 10 more sets\n" in result.err


def test_a_position_is_of_its_sets(folders):
    encode(two_sets())
    loader = LatentLoader(LatentDataset("c"), batch_size=2)
    seen = Counter()
    for number, batch in enumerate(loader):
        seen.update(loader.data.key(index) for index in batch.index.tolist())
        if number == 3:
            break
    state = json.loads(json.dumps(loader.state_dict()))
    resumed = LatentLoader(LatentDataset("c"), batch_size=3)
    resumed.load_state_dict(state)
    assert seen + count_epoch(resumed) == count_epoch(LatentLoader(LatentDataset("c"), batch_size=2))
    encode(two_sets(repeats=5))
    with pytest.raises(UserError, match="load_state_dict: saved with"):
        LatentLoader(LatentDataset("c"), batch_size=2).load_state_dict(state)
