"""latentprep verify: every flipped byte is found, and so is every image that is no longer what was encoded."""

import json
import os
import shutil
from dataclasses import asdict

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from latentprep.cache import manifest as manifests
from latentprep.cache.files import METADATA_KEY
from latentprep.cache.storage import Stamp, Storage
from latentprep.errors import UserError
from latentprep.look.verify import verify
from tests.conftest import SMALL, gradient, make_model
from tests.test_encode import files


@pytest.fixture
def cache(run, images, tmp_path):
    (images / "bad.png").write_bytes((images / "wide0.png").read_bytes()[:-40])
    assert run("encode", images, "--out", tmp_path / "c", *SMALL, "--flip", "--shard-size", "60kB").code == 0
    return tmp_path / "c"


def problems(cache):
    _, found = verify(Storage(cache), lambda count: None)
    return {(problem.name, problem.problem) for problem in found}


def test_nothing_wrong(run, cache):
    result = run("verify", cache)
    assert result.code == 0
    assert result.out == f"{cache}: 8 images in 2 shards, nothing wrong\n"


@pytest.mark.slow
def test_every_flipped_byte_is_found(cache):
    random = np.random.default_rng(0)
    num_flips = 0
    for name, data in files(cache).items():
        # every byte of what is small, and of a shard its whole header's length, and places all over it
        places = range(len(data)) if len(data) < 1000 else {0, 7, 8, *random.integers(0, len(data), 60).tolist()}
        for place in places:
            flipped = bytearray(data)
            flipped[place] ^= 1 << int(random.integers(8))
            (cache / name).write_bytes(flipped)
            assert name in {found for found, _ in problems(cache)}, (name, place)
            num_flips += 1
        (cache / name).write_bytes(data)
    assert num_flips > 400
    assert problems(cache) == set()


@pytest.mark.parametrize("change", ["append", "truncate", "delete"])
def test_every_other_damage_to_a_file_is_found(cache, change):
    for name, data in files(cache).items():
        if name == ".readers":  # it holds nothing, and a lock
            continue
        if change == "delete":
            (cache / name).unlink()
        else:
            (cache / name).write_bytes(data + b"\0" if change == "append" else data[:-1])
        kinds = {kind for found, kind in problems(cache) if found == name}
        assert kinds & {"manifest", "size", "missing"}, name
        (cache / name).write_bytes(data)


def test_a_problem_is_a_line_and_the_exit_code_is_1(run, cache):
    path = next((cache / "shards").glob("*.latents.*"))
    data = path.read_bytes()
    place = len(data) // 2  # in latent_mean
    path.write_bytes(data[:place] + bytes([data[place] ^ 1]) + data[place + 1 :])
    result = run("verify", cache)
    assert result.code == 1
    (line, verdict) = result.out.splitlines()
    assert line.startswith(f"hash       shards/{path.name}: blake2b ")
    assert line.endswith(": its bytes have changed")
    assert verdict == f"{cache}: 8 images in 2 shards, 1 problem"
    found = json.loads(run("verify", cache, "--json").out)
    assert [problem["problem"] for problem in found["problems"]] == ["hash"]


def rewrite(cache, kind, change, number=0):
    """A shard file that someone changed, and whose manifest they mended: its hashes are right."""
    path = sorted((cache / "shards").glob(f"*.{kind}.safetensors"))[number]
    stamp = rewrite_file(path, change)
    data = json.loads((cache / "cache.json").read_text())
    (shard,) = [shard for shard in data["shards"] if path.name.startswith(shard["id"])]
    shard[f"{kind}_file"] = stamp
    seal(cache, data)
    return path.name


def rewrite_uncond(cache, change):
    """The same of the cond of the empty prompt."""
    (path,) = cache.glob("uncond.*")
    stamp = rewrite_file(path, change)
    data = json.loads((cache / "cache.json").read_text())
    data["uncond"]["file"] = stamp
    seal(cache, data)
    return path.name


def rewrite_file(path, change):
    """Change a file's tensors and metadata; its new stamp."""
    tensors = load_file(path)
    header = json.loads(path.read_bytes()[8 : 8 + int.from_bytes(path.read_bytes()[:8], "little")])
    metadata = json.loads(header["__metadata__"][METADATA_KEY])
    change(tensors, metadata)
    save_file(tensors, path, {METADATA_KEY: json.dumps(metadata)})
    return asdict(Stamp.of(path.read_bytes()))


def seal(cache, data):
    """Write cache.json anew, with a hash that fits."""
    data.pop("blake2b")
    body = json.dumps(data)[:-1] + ",\n"
    (cache / "cache.json").write_text(body + manifests._seal(body))


def put(name, value):
    """A change of every tensor whose name ends so."""

    def change(tensors, metadata):
        for full, tensor in list(tensors.items()):
            if full == name or full.endswith(f"/{name}"):
                changed = value(tensor.clone())
                if changed is None:
                    del tensors[full]
                else:
                    tensors[full] = changed.contiguous()

    return change


def meta(name, value):
    return lambda tensors, metadata: metadata.update({name: value})


def first_row(tensor, value):
    tensor[0] = value
    return tensor


@pytest.mark.parametrize(
    ("kind", "change", "found"),
    [
        ("latents", put("latent_mean", lambda t: first_row(t, float("nan"))), "non_finite"),
        ("latents", put("latent_std", lambda t: -t), "range"),
        ("latents", put("latent_std", lambda t: None), "std"),
        ("latents", put("latent_mean", lambda t: t.bfloat16()), "dtype"),
        ("latents", put("latent_mean", lambda t: t.int()), "structure"),
        ("latents", put("latent_mean", lambda t: t[:1]), "structure"),
        ("latents", put("digest", lambda t: t[:, :8]), "structure"),
        ("latents", put("flipped", lambda t: t * 0), "views"),
        ("latents", meta("normalization", {"patch": 1, "shift": [0.0], "scale": [9.0]}), "header"),
        ("latents", meta("recipe", {}), "recipe"),
        ("latents", meta("groups", [["x", -1]]), "structure"),
        ("latents", meta("groups", {"a": 1}), "structure"),
        ("latents", meta("kind", "text"), "structure"),
        ("latents", meta("format", 99), "structure"),
        ("text", put("prompt_embeds", lambda t: first_row(t, float("inf"))), "non_finite"),
        ("text", put("prompt_embeds", lambda t: None), "cond"),
        ("text", put("prompt_embeds", lambda t: t[:0]), "structure"),
        ("text", put("prompt_of", lambda t: t + 1000), "structure"),
        ("text", put("prompt_of", lambda t: t - 1), "structure"),
        ("text", put("prompt_of", lambda t: t.long()), "structure"),
        ("text", put("key_offsets", lambda t: t * 1000), "structure"),
        ("text", put("key_offsets", lambda t: t.flip(0)), "structure"),
        ("text", put("prompt_offsets", lambda t: t - 5), "structure"),
        ("text", put("caption_rows", lambda t: t * 2), "structure"),
        ("text", put("key", lambda t: t.float()), "structure"),
        ("text", put("key", lambda t: t * 0 + ord("a")), "duplicate"),
        ("text", put("num_tokens", lambda t: t[:-1]), "structure"),
        ("text", put("num_tokens", lambda t: -t), "range"),
        ("text", meta("max_tokens", "many"), "structure"),
        ("text", meta("max_tokens", -75), "range"),
        ("text", meta("recipe", []), "recipe"),
    ],
)
def test_crafted_shards_are_found_and_no_reader_follows_them(run, images, tmp_path, kind, change, found):
    cache = tmp_path / "c"
    assert run("encode", images, "--out", cache, *SMALL, "--flip").code == 0
    name = rewrite(cache, kind, change)
    result = json.loads(run("verify", cache, "--json").out)
    assert found in {problem["problem"] for problem in result["problems"]}
    if found == "structure":
        for command in (("inspect", cache), ("inspect", cache, "--key", "tall0.png")):
            result = run(*command)
            assert result.code == 1
            assert name in result.err


def make_ragged(tensors, metadata):
    """Cond as of prompts that have lengths of their own."""
    value = tensors["cond/prompt_embeds"]
    tensors["cond/prompt_embeds"] = value.flatten(0, 1).contiguous()
    tensors["cond/prompt_embeds_offsets"] = torch.arange(len(value) + 1) * value.shape[1]


def add_cond(tensors, metadata):
    tensors["cond/pooled"] = tensors["cond/prompt_embeds"][:, 0].clone()


OTHER_CONDS = {
    "another name": (add_cond, "pooled [64] and prompt_embeds [77, 64]"),
    "fewer tokens": (put("prompt_embeds", lambda t: t[:, :76]), "prompt_embeds [76, 64]"),
    "another width": (put("prompt_embeds", lambda t: t[..., :32]), "prompt_embeds [77, 32]"),
    "another kind": (make_ragged, "prompt_embeds [T, 64]"),
}


@pytest.mark.parametrize(("change", "found"), OTHER_CONDS.values(), ids=OTHER_CONDS)
def test_an_uncond_that_is_not_like_the_cond_of_the_shards_is_named(cache, change, found):
    name = rewrite_uncond(cache, change)
    one, other = sorted(path.name for path in (cache / "shards").glob("*.text.*"))
    (problem,) = verify(Storage(cache), lambda count: None)[1]
    assert (problem.name, problem.problem) == (name, "cond")
    assert problem.detail in {f"{found}, expected prompt_embeds [77, 64] as in shards/{path}" for path in (one, other)}


def test_an_uncond_of_nothing_is_named(cache):
    name = rewrite_uncond(cache, put("prompt_embeds", lambda t: None))
    ((file, detail),) = [(problem.name, problem.detail) for problem in verify(Storage(cache), lambda count: None)[1]]
    assert file == name
    # safetensors 0.4 reads no file without tensors
    assert detail.startswith("no cond, expected prompt_embeds [77, 64]") or "damaged, or no shard" in detail


@pytest.mark.parametrize("number", [0, 1])
@pytest.mark.parametrize(("change", "found"), OTHER_CONDS.values(), ids=OTHER_CONDS)
def test_a_shard_whose_cond_is_not_like_that_of_the_others_is_named(cache, change, found, number):
    name = rewrite(cache, "text", change, number)
    (problem,) = verify(Storage(cache), lambda count: None)[1]
    assert (problem.name, problem.problem) == (f"shards/{name}", "cond")
    assert problem.detail.startswith(f"{found}, expected prompt_embeds [77, 64] as in ")


def test_names_of_pad_to_that_no_cond_has_are_named(cache):
    data = json.loads((cache / "cache.json").read_text())
    data["recipe"]["text"]["pad_to"] = {"prompt_embeds": 77, "prompt_embed": 77}
    seal(cache, data)
    found = verify(Storage(cache), lambda count: None)[1]
    details = [problem.detail for problem in found if (problem.name, problem.problem) == ("cache.json", "cond")]
    assert details == ["pad_to names prompt_embed, which no cond has"]


@pytest.mark.parametrize("key", ["../../../etc/passwd", "/etc/passwd", "a/../../b", "nul\0l", ""])
def test_keys_that_lead_outside_are_refused(run, cache, images, key):
    data = np.frombuffer(key.encode(), np.uint8)

    def change(tensors, metadata):
        for name in [name for name in tensors if name.endswith("/key")]:
            count = len(tensors[f"{name}_offsets"]) - 1
            tensors[name] = torch.from_numpy(np.tile(data, count).copy())
            tensors[f"{name}_offsets"] = torch.arange(count + 1) * len(data)

    name = rewrite(cache, "text", change)
    for command in (("verify", cache, "--source", images), ("inspect", cache)):
        result = run(*command)
        assert result.code == 1
        assert name in result.out + result.err
        assert "leads outside the image folder" in result.out + result.err or key == ""


def test_source_tells_changed_gone_and_new_images_apart(run, cache, images):
    gradient(64, 64).save(images / "new.png")
    (images / "wide0.png").unlink()
    status = (images / "tall1.png").stat()
    data = bytearray((images / "tall1.png").read_bytes())
    data[-20] ^= 1
    (images / "tall1.png").write_bytes(data)
    os.utime(images / "tall1.png", ns=(status.st_atime_ns, status.st_mtime_ns))  # as by a tool that keeps times
    found = json.loads(run("verify", cache, "--source", images, "--json").out)["problems"]
    assert {(p["name"], p["problem"]) for p in found} == {
        ("tall1.png", "changed"), ("wide0.png", "gone"), ("new.png", "new"),
    }  # fmt: skip


def test_source_says_renamed_as_encode_does(run, cache, images):
    (images / "wide0.png").rename(images / "other.png")
    (images / "tall0.png").write_bytes((images / "tall2.png").read_bytes())
    (images / "tall2.png").unlink()
    gradient(200, 200).save(images / "new.bmp")  # larger than what is gone
    found = json.loads(run("verify", cache, "--source", images, "--json").out)["problems"]
    assert [(p["name"], p["problem"]) for p in found] == [
        ("tall0.png", "changed"), ("tall2.png", "gone"), ("other.png", "renamed"), ("new.bmp", "new"),
    ]  # fmt: skip
    assert found[2]["detail"] == "was wide0.png, with the same content"
    changes = run("encode", images, "--out", cache, *SMALL, "--flip", "--dry-run", "--list").out
    assert "renamed  other.png  (was wide0.png)\n" in changes


def test_source_names_captions_that_differ(run, images, tmp_path):
    cache, options = tmp_path / "c", (*SMALL, "--trigger", "sks", "--caption-encoding", "cp1252")
    (images / "tall3.txt").write_bytes(b"caf\xe9")
    assert run("encode", images, "--out", cache, *options).code == 0
    assert run("verify", cache, "--source", images).code == 0
    (images / "tall0.txt").write_text("another one\x1b")
    (images / "tall1.txt").write_bytes(b"\0")
    (images / "wide2.txt").write_text("a new one")
    (images / "tall2.txt").unlink()
    result = run("verify", cache, "--source", images, "--json")
    found = {p["name"]: (p["problem"], p["detail"]) for p in json.loads(result.out)["problems"]}
    assert found == {
        "tall0.png": ("caption", "'sks, picture number 0' in the cache, 'sks, another one\\\\x1b' now"),
        "tall1.png": ("caption", found["tall1.png"][1]),
        "tall2.png": ("caption", "'sks, picture number 2' in the cache, 'sks, tall2' now"),
        "wide2.png": ("caption", "'sks, wide2' in the cache, 'sks, a new one' now"),
    }
    assert found["tall1.png"][1].startswith("tall1.txt: not a text file")
    assert result.code == 1


def test_captions_of_sets_are_found_as_each_set_says(run, images, tmp_path):
    shutil.copytree(images, tmp_path / "b")
    sets = f"[[set]]\nsource = {str(images)!r}\n[[set]]\nsource = 'b'\ncaption_from = 'name'\n"
    (tmp_path / "s.toml").write_text(f'trigger = "sks"\n{sets}')
    cache = tmp_path / "s.latents"
    assert run("encode", tmp_path / "s.toml", *SMALL).code == 0
    assert run("verify", cache, "--source", tmp_path / "s.toml").code == 0
    for folder in (images, tmp_path / "b"):
        (folder / "tall0.txt").write_text("another")
    result = run("verify", cache, "--source", tmp_path / "s.toml")
    assert [line.split(":")[0].split() for line in result.out.splitlines()[:-1]] == [["caption", "images/tall0.png"]]
    (tmp_path / "s.toml").rename(tmp_path / "t.toml")
    result = run("verify", cache, "--source", tmp_path / "t.toml")
    assert f"captions not compared: SOURCE {tmp_path / 's.toml'}: cannot be read" in result.err
    assert result.code == 0


def test_reencode_gives_what_is_stored(run, cache, images):
    result = run("verify", cache, "--source", images, "--re-encode", 5)
    assert result.code == 0
    assert "encoded again: at most 0.000" in result.out
    found = json.loads(run("verify", cache, "--source", images, "--re-encode", 50, "--json").out)
    assert 0 < found["largest_difference"] < 0.001


def test_reencode_finds_latents_that_are_not_of_their_image(run, cache, images):
    def exchange(tensors, metadata):
        for name in [name for name in tensors if name.endswith("/latent_mean")]:
            tensors[name] = tensors[name].flip(0)

    rewrite(cache, "latents", exchange)
    assert run("verify", cache, "--source", images).code == 0  # no hash can know
    result = run("verify", cache, "--source", images, "--re-encode", 8)
    assert result.code == 1
    assert "standard deviations from what is stored, allowed 0.003" in result.out


def test_reencode_with_another_model_is_refused(run, cache, images, tmp_path):
    other = make_model(tmp_path / "other", seed=3)
    result = run("verify", cache, "--source", images, "--re-encode", 1, "--model", other)
    assert result.code == 1
    assert "this cache was made with" in result.err
    assert "give their folder with --source" in run("verify", cache, "--re-encode", 1).err


@pytest.mark.parametrize("images_part", [{"draft": 1}, {"background": None}, [], "auto"])
def test_a_recipe_of_other_types_is_no_manifest(cache, images_part):
    data = json.loads((cache / "cache.json").read_text())
    data["recipe"]["latents"]["images"] = images_part
    seal(cache, data)
    with pytest.raises(UserError, match=r"not a complete manifest \(.*images"):
        manifests.open_manifest(Storage(cache))


def test_what_is_no_cache(run, tmp_path):
    result = run("verify", tmp_path)
    assert result.code == 1
    assert "not a latent cache" in result.out
