"""The two passes of encode: latents first and cond afterwards, never both models in memory; and each of them alone."""

import gc
import json
import os
import re
import shutil
import time
import weakref
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

import latentprep
from latentprep import LatentDataset
from latentprep.errors import UserError
from latentprep.prepare import encode as prepare_encode
from latentprep.prepare import survey
from latentprep.prepare.engine import local
from latentprep.prepare.engine.where import Where
from latentprep.prepare.models.text_encoder import TextEncoder
from latentprep.prepare.models.vae_encoder import VaeEncoder
from latentprep.prepare.work import text
from latentprep.prepare.work.cond import CondMaker
from latentprep.progress import Silent
from tests.conftest import SMALL, TINY, gradient
from tests.test_encode import files


def test_vae_and_text_encoder_are_never_in_memory_together(run, images, tmp_path, monkeypatch):
    alive = []
    make_vae, make_text = VaeEncoder.__init__, TextEncoder.__init__

    def init_vae(self, *arguments, **options):
        alive.append(weakref.ref(self))
        make_vae(self, *arguments, **options)

    def init_text(self, *arguments, **options):
        gc.collect()
        assert [reference() for reference in alive] == [None]
        make_text(self, *arguments, **options)
        alive.append(None)

    monkeypatch.setattr(VaeEncoder, "__init__", init_vae)
    monkeypatch.setattr(TextEncoder, "__init__", init_text)
    assert run("encode", images, "--out", tmp_path / "c", *SMALL, "--shard-size", "30kB").code == 0
    assert len(alive) == 2


def made_anew(run, images, tmp_path, shard_size=("--shard-size", "30kB")):
    """The files of a cache that was made in one run."""
    assert run("encode", images, "--out", tmp_path / "other", *SMALL, *shard_size).code == 0
    return files(tmp_path / "other")


def test_latents_and_then_text_is_what_one_run_makes(run, images, tmp_path):
    command = ("encode", images, "--out", tmp_path / "c", *SMALL, "--shard-size", "30kB", "--only")
    result = run(*command, "latents")
    assert result.code == 0
    assert "only     latents: cond, and captions that changed, are left for later\n" in result.err
    assert "encoded  8 images in" in result.out
    assert LatentDataset(tmp_path / "c")[0].cond is None
    assert "nothing to do" in run(*command, "latents").out
    result = run(*command, "text")
    assert result.code == 0
    assert "encoded  9 prompts in" in result.out
    assert "nothing to do" in run(*command, "text").out
    made_anew(run, images, tmp_path)  # in other shards: with cond a row takes more space
    one, other = (LatentDataset(tmp_path / name, latent_sampling_method="deterministic") for name in ("c", "other"))
    place = {other.key(n): n for n in range(8)}
    for n in range(8):
        wanted = other[place[one.key(n)]]
        assert torch.equal(one[n].latent_mean, wanted.latent_mean)
        assert torch.equal(one[n].cond["prompt_embeds"], wanted.cond["prompt_embeds"])


def test_new_images_of_a_cache_with_cond(run, images, tmp_path):
    out = tmp_path / "c"
    command = ("encode", images, "--out", out, *SMALL, "--shard-size", "30kB")
    assert run(*command).code == 0
    gradient(128, 40).save(images / "wide9.png")
    (images / "tall0.txt").write_text("another caption", encoding="utf-8")
    result = run(*command, "--only", "text")
    assert "only     text: 1 image without latents left for later" in result.err
    assert "is written anew" in result.out
    assert json.loads(run("inspect", out, "--json").out)["images"] == 8
    (images / "tall1.txt").write_text("another caption again", encoding="utf-8")
    result = run(*command, "--only", "latents")
    assert "1 new" in result.out
    problems = json.loads(run("verify", out, "--json").out)["problems"]
    assert [problem["problem"] for problem in problems] == ["recipe", "cond"]
    assert len({problem["name"] for problem in problems}) == 1  # the shard that has no cond yet
    data = LatentDataset(out, include_cond=False)
    keys = [data.key(n) for n in range(len(data))]
    assert data[keys.index("wide9.png")].cond is None
    data = LatentDataset(out)
    assert data[keys.index("wide0.png")].cond is not None
    with pytest.raises(
        UserError, match=r"its images have no cond yet.*Run the same latentprep encode with --only text"
    ):
        data[keys.index("wide9.png")]
    assert run(*command).code == 0
    data = LatentDataset(out)
    assert [data[n].cond_text for n in range(len(data)) if data.key(n).startswith("tall1")] == [
        ["another caption again"]
    ]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--only", "text"], "holds no latents yet. Encode them first, with --only latents."),
        (["--only", "text", "--no-cond"], "--only text with --no-cond: one wants cond for the latents that are there"),
        (["--only", "images"], "--only images: expected one of latents, text."),
    ],
)
def test_only_what_there_is(run, images, tmp_path, options, message):
    result = run("encode", images, "--out", tmp_path / "c", *SMALL, *options)
    assert result.code == 1
    assert message in result.err


def test_a_run_that_stops_between_the_passes_goes_on_with_text(run, images, tmp_path, monkeypatch):
    command = ("encode", images, "--out", tmp_path / "c", *SMALL, "--shard-size", "30kB")

    def stop(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(TextEncoder, "__init__", stop)
        assert run(*command).code == 130
    with monkeypatch.context() as patched:
        patched.setattr(VaeEncoder, "__init__", stop)  # no image is encoded again
        result = run(*command)
    assert result.code == 0
    assert "8 images found from an earlier run that did not finish" in result.out
    assert files(tmp_path / "c") == made_anew(run, images, tmp_path)


def fails(*_arguments, **_options):
    raise RuntimeError("no")


@pytest.mark.parametrize("place", [(CondMaker, "make"), (text, "write_uncond")], ids=["made", "written"])
def test_an_empty_prompt_that_failed_is_made_by_the_next_run(run, images, tmp_path, monkeypatch, place):
    command = ("encode", images, "--out", tmp_path / "c", *SMALL)
    owner, name = place
    make = getattr(owner, name)
    with monkeypatch.context() as patch:
        patch.setattr(owner, name, lambda *a, **o: fails() if name != "make" or a[1] == [""] else make(*a, **o))
        result = run(*command)
    assert (result.code, "FAILED   empty prompt: RuntimeError: no" in result.out) == (1, True)
    result = run(*command)
    assert (result.code, "nothing to do" in result.out) == (0, False)
    assert files(tmp_path / "c") == made_anew(run, images, tmp_path, shard_size=())
    assert "nothing to do" in run(*command).out


def test_a_text_that_failed_leaves_the_one_that_is_there(run, images, tmp_path, monkeypatch):
    command = ("encode", images, "--out", tmp_path / "c", *SMALL)
    assert run(*command).code == 0
    (images / "wide0.txt").write_text("a river")
    with monkeypatch.context() as patch:
        patch.setattr(CondMaker, "make", fails)
        (tmp_path / "c" / next(n for n in files(tmp_path / "c") if n.startswith("uncond"))).unlink()
        result = run(*command)
    assert result.code == 1
    assert "FAILED   text of " in result.out
    assert "FAILED   empty prompt: " in result.out
    assert "none of that is in the cache yet; run the same command again" in result.out
    assert run(*command).code == 0
    assert files(tmp_path / "c") == made_anew(run, images, tmp_path, shard_size=())


def test_the_time_of_the_text_encoder_is_told(run, images, tmp_path, monkeypatch):
    encode = TextEncoder.encode

    def slow(self, prompts):
        time.sleep(0.3)
        return encode(self, prompts)

    monkeypatch.setattr(TextEncoder, "encode", slow)
    out = run("encode", images, "--out", tmp_path / "c", *SMALL).out
    assert float(re.search(r"text ([\d.]+) s", out)[1]) >= 0.6  # the captions, and the empty prompt


def test_text_device_is_where_the_second_pass_runs_in_one_process(images, tmp_path, monkeypatch):
    seen, said = [], []

    def note(worker, tasks, where):
        seen.append((type(worker).__name__, where.devices))
        return local.run(worker, tasks, replace(where, devices=where.devices[:1]))

    class Lines(Silent):
        def say(self, text):
            said.append(text)

    monkeypatch.setattr(prepare_encode, "run", note)
    small = {"model": "tiny", "resolution": 64, "bucket_step": 32, "min_side": 32}
    options = {**small, "devices": "cpu,cpu", "progress": Lines()}
    assert latentprep.encode(images, tmp_path / "c", **options, text_device="cpu").ok
    assert seen == [("LatentsWorker", ("cpu", "cpu")), ("TextWorker", ("cpu",))]
    assert "         the text encoders on cpu, float32 (asked for)" in said
    del seen[:], said[:]
    assert latentprep.encode(images, tmp_path / "other", **options).ok
    assert seen == [("LatentsWorker", ("cpu", "cpu")), ("TextWorker", ("cpu", "cpu"))]
    assert not any("the text encoders" in line for line in said)
    made = (files(tmp_path / name / "shards") for name in ("c", "other"))
    assert next(made) == next(made)


def test_text_device_is_remembered_and_names_itself_in_errors(run, images, tmp_path):
    command = ("encode", images, "--out", tmp_path / "c", *SMALL, "--text-device")
    assert run(*command, "cpu").code == 0
    assert json.loads((tmp_path / "c" / "cache.json").read_text())["made_with"]["again"]["text_device"] == "cpu"
    (images / "tall0.txt").write_text("another")
    assert "the text encoders on cpu" in run("encode", "--again", tmp_path / "c").err
    assert "error: --text-device cuda: torch" in (refused := run(*command, "cuda").err)
    assert "or use --text-device cpu." in refused
    assert "error: --text-device cpu,cpu: expected auto, cuda, cuda:N, mps or cpu." in run(*command, "cpu,cpu").err


@pytest.mark.parametrize(("asked", "dtype"), [("auto", "float32"), ("bfloat16", "bfloat16")])
def test_the_number_type_is_that_of_the_text_device(asked, dtype):
    asks = {"needs_text_encoder": True, "dtype": asked, "rank": None, "world_size": None}
    on_cuda, said = (Where(("cuda:0", "cuda:1")), "float16"), []
    chosen = survey.choose_text_where(SimpleNamespace(text_device="cpu", **asks), *on_cuda, said.append)
    assert chosen == (Where(("cpu",)), dtype)
    assert said == [f"         the text encoders on cpu, {dtype} (asked for)"]
    assert survey.choose_text_where(SimpleNamespace(text_device=None, **asks), *on_cuda, said.append) == on_cuda
    assert len(said) == 1


def test_latents_on_one_machine_and_text_on_another(run, images, tmp_path, monkeypatch):
    """Cache, images and model lie elsewhere by then, with other times: the model is known by its content."""
    one, two = tmp_path / "one", tmp_path / "two"
    shutil.copytree(TINY, one / "model")
    images = images.rename(one / "images")
    small = ("--resolution", "64", "--bucket-step", "32", "--min-side", "32", "--shard-size", "30kB")
    command = ("encode", images, "--model", one / "model", "--out", one / "cache", *small, "--only")
    assert run(*command, "latents").code == 0
    assert run(*command, "text").code == 0
    whole = LatentDataset(one / "cache")
    wanted = {whole.key(n): whole[n].cond["prompt_embeds"].clone() for n in range(8)}
    shutil.rmtree(one / "cache")
    assert run(*command, "latents").code == 0
    two.mkdir()
    for name, other in (("cache", "cache"), ("images", "photos"), ("model", "encoders")):
        (one / name).rename(two / other)
    for path in (two / "photos").iterdir():
        os.utime(path, ns=(1, path.stat().st_size))
    monkeypatch.setattr(VaeEncoder, "__init__", fails)
    options = ("--model", two / "encoders", "--out", two / "cache", *small, "--only", "text")

    (two / "captions").mkdir()
    (two / "captions" / "tall0.txt").write_text("a caption")
    needs = "--only text needs the images too, beside their captions"
    result = run("encode", two / "captions", *options)
    assert f"error: SOURCE {two / 'captions'}: no images (1 other files). " in result.err
    assert needs in result.err
    shutil.copy(two / "photos" / "tall0.png", two / "captions")
    assert needs in run("encode", two / "captions", *options).err
    assert needs in run("encode", "--again", two / "cache", "--only", "text").err  # the old folder

    result = run("encode", two / "photos", *options)
    assert (result.code, "encoded  9 prompts in" in result.out) == (0, True), result.err
    assert "nothing to do" in run("encode", two / "photos", *options).out
    data = LatentDataset(two / "cache")
    assert {data.key(n) for n in range(8)} == wanted.keys()
    assert all(torch.equal(data[n].cond["prompt_embeds"], wanted[data.key(n)]) for n in range(8))
