"""The command line as a person meets it: what it prints, what it refuses, and how."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.conftest import SMALL, gradient, make_model
from tests.test_encode import files

OWN_LINES = (
    r"(model|device|source|prompts|encoded|cache|next) | *file names as captions| *waited for|(latents|text) +\d+%  "
)


def encode_once(run, images, cache, *options):
    result = run("encode", images, "--out", cache, *SMALL, *options)
    assert result.code == 0
    return result


def test_encode_says_what_it_chose_what_it_did_and_what_comes_next(run, images, tmp_path):
    (images / "bad.png").write_bytes((images / "wide0.png").read_bytes()[:-40])
    result = encode_once(run, images, tmp_path / "c")
    assert "model    tiny (factor 8)" in result.err
    assert re.search(
        r"device   cpu, float32 \(auto: no GPU that torch can use(; it is built without CUDA)?\)", result.err
    )
    assert f"source   {images}: 9 images; captions: 4 from .txt, 5 from file names" in result.err
    assert re.search(r"encoded  8 images and 9 prompts in \d+\.\d s \(latents at \d+\.\d images/s\)", result.out)
    assert re.search(r"waited for decode [\d.]+ s, encode [\d.]+ s, text [\d.]+ s, write [\d.]+ s", result.out)
    assert "skipped  1 truncated (bad.png: " in result.out
    assert result.out.endswith(f"next     latentprep inspect {tmp_path / 'c'}\n")


def test_a_pass_ends_with_images_per_second_and_waits_and_nothing_of_other_libraries(run, images, tmp_path):
    result = encode_once(run, images, tmp_path / "c")
    assert re.search(
        r"latents  100%  8 of 8, [\d.]+/s, \d+ s, waited: decode \d+s, encode \d+s, text \d+s, write \d+s\n", result.err
    )
    lines = [line for line in re.split(r"[\r\n]+", result.err + result.out) if line]
    assert [line for line in lines if not re.match(OWN_LINES, line)] == []


@pytest.mark.slow
def test_a_new_process_prints_nothing_of_other_libraries_either(images, tmp_path):
    command = [sys.executable, "-m", "latentprep", "encode", str(images), "--out", str(tmp_path / "c"), *SMALL]
    result = subprocess.run(command, capture_output=True, text=True, check=True)
    for line in re.split(r"[\r\n]+", result.stderr + result.stdout):
        assert not line or re.match(OWN_LINES, line), line


def test_a_finished_cache_run_again_does_nothing_and_says_so(run, images, tmp_path):
    encode_once(run, images, tmp_path / "c")
    before = files(tmp_path / "c"), {path: path.stat().st_mtime_ns for path in (tmp_path / "c").rglob("*")}
    result = encode_once(run, images, tmp_path / "c")
    assert f"{tmp_path / 'c'} is complete with 8 images; nothing to do." in result.out
    assert "img/s" not in result.err
    assert before == (files(tmp_path / "c"), {path: path.stat().st_mtime_ns for path in (tmp_path / "c").rglob("*")})


def test_new_images_are_added_and_the_others_left_alone(run, images, tmp_path):
    encode_once(run, images, tmp_path / "c")
    before = files(tmp_path / "c" / "shards")
    gradient(50, 50).save(images / "new.png")
    result = encode_once(run, images, tmp_path / "c")
    assert "encoded  1 image and 1 prompt in" in result.out
    assert before.items() <= files(tmp_path / "c" / "shards").items()
    assert json.loads(run("inspect", tmp_path / "c", "--json").out)["images"] == 9


@pytest.mark.parametrize("change", ["caption", "template", "placeholder"])
def test_changed_text_touches_no_latents(run, images, tmp_path, change):
    template = ("--template", "style_filewords", "--placeholder", "sks")
    encode_once(run, images, tmp_path / "c", *template)
    before = files(tmp_path / "c" / "shards")
    if change == "caption":
        (images / "tall0.txt").write_text("another caption", encoding="utf-8")
    elif change == "template":
        template = ("--template", "subject_filewords", "--placeholder", "sks")
    else:
        template = ("--template", "style_filewords", "--placeholder", "xyz")
    result = encode_once(run, images, tmp_path / "c", *template)
    assert "the text of 8 images is written anew" in result.out
    after = files(tmp_path / "c" / "shards")
    assert {name: data for name, data in after.items() if ".latents." in name}.items() <= before.items()
    assert len(after) == len(before)  # the old text file is gone
    # and it is what a fresh run over the same folder would have written
    encode_once(run, images, tmp_path / "fresh", *template)
    assert files(tmp_path / "fresh") == files(tmp_path / "c")


def test_a_killed_run_is_taken_up_from_its_shards(run, images, tmp_path):
    shards = ("--shard-size", "30kB")
    encode_once(run, images, tmp_path / "whole", *shards)
    encode_once(run, images, tmp_path / "c", *shards)
    # as after a kill: one latents file without its text, one unit not begun, no manifest
    (tmp_path / "c" / "cache.json").unlink()
    (tmp_path / "c" / "skipped.jsonl").unlink()
    names = sorted((tmp_path / "c" / "shards").glob("*.latents.safetensors"))
    next((tmp_path / "c" / "shards").glob(f"{names[0].name.split('.')[0]}.*.text.*")).unlink()
    for path in (tmp_path / "c" / "shards").glob(f"{names[1].name.split('.')[0]}.*"):
        path.unlink()
    result = encode_once(run, images, tmp_path / "c", *shards)
    assert "encoded  2 images" in result.out
    assert "6 images found from an earlier run that did not finish" in result.out
    assert files(tmp_path / "c") == files(tmp_path / "whole")


def test_skips_of_a_killed_run_are_not_forgotten(run, images, tmp_path):
    (images / "bad.png").write_bytes((images / "wide0.png").read_bytes()[:-40])
    encode_once(run, images, tmp_path / "c")
    before = files(tmp_path / "c")
    (tmp_path / "c" / "cache.json").unlink()
    (tmp_path / "c" / "skipped.jsonl").unlink()
    assert "skipped  1 truncated" in encode_once(run, images, tmp_path / "c").out
    assert files(tmp_path / "c") == before


@pytest.mark.slow
def test_ctrl_c_keeps_what_is_finished_and_says_how_to_go_on(run, images, tmp_path):
    for n in range(120):
        shutil.copy(images / "wide0.png", images / f"copy{n}.png")
    options = ["encode", str(images), "--out", str(tmp_path / "c"), *SMALL, "--shard-size", "30kB"]
    process = subprocess.Popen([sys.executable, "-m", "latentprep", *options], stderr=subprocess.PIPE, text=True)
    shards = tmp_path / "c" / "shards"
    deadline = time.monotonic() + 60
    while not (shards.is_dir() and len(list(shards.glob("*.latents.*"))) >= 3):
        assert time.monotonic() < deadline
        assert process.poll() is None
        time.sleep(0.005)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "Traceback" not in err
    assert re.search(
        rf"Stopped; \d+ finished shards.* safe in {tmp_path / 'c'}. To go on, type:\n  latentprep en",
        err,
    )
    assert not list(shards.glob(".*"))
    finished = {name: data for name, data in files(shards).items() if ".latents." in name}
    assert 0 < len(finished) < 60
    result = run(*options)
    assert result.code == 0
    assert finished.items() <= files(shards).items()
    encode_once(run, images, tmp_path / "whole", "--shard-size", "30kB")
    assert files(tmp_path / "whole") == files(tmp_path / "c")


def test_overwrite_starts_anew_and_deletes_nothing_else(run, images, tmp_path):
    encode_once(run, images, tmp_path / "c")
    (tmp_path / "c" / "notes.txt").write_text("mine")
    result = run(
        "encode", images, "--out", tmp_path / "c", "--overwrite", "--model", "tiny", "--width", 64, "--height", 32
    )
    assert result.code == 0
    assert json.loads(run("inspect", tmp_path / "c", "--json").out)["buckets"] == {"64x32": 8}
    assert (tmp_path / "c" / "notes.txt").read_text() == "mine"
    assert len(list((tmp_path / "c" / "shards").iterdir())) == 2


def test_dry_run_shows_the_plan_and_writes_nothing(run, images, tmp_path):
    (images / "bad.jpg").write_text("not a picture")
    result = run("encode", images, "--out", tmp_path / "c", *SMALL, "--dry-run")
    assert result.code == 0
    assert result.out.startswith("new      8 images, such as tall0.png: not in the cache\n")
    assert f"\nplan     {tmp_path / 'c'}: 8 new\n" in result.out
    assert re.search(r"disk: about 8\.\d kB of latents, about 8\d\.\d kB of text, 1 new shard", result.out)
    assert re.search(
        r"time: about 1 s on this machine \(.* images/s at \w+ in batches of 1, .* prompts/s\)", result.out
    )
    assert (
        "skipped  1 not_an_image (bad.jpg: its bytes are of no image format that Pillow knows, whatever its .jpg says)"
        in result.out
    )
    assert re.search(r"96x32 +4 +5\.9% +5\.9%", result.out)
    assert re.search(r"64x64 +4 +20\.0% +20\.0%", result.out)
    assert "nothing was written (--dry-run)" in result.out
    assert not (tmp_path / "c").exists()


def refused(result):
    """The one line that an error is."""
    assert result.code != 0
    (line,) = [line for line in result.err.splitlines() if line.startswith("error: ")]
    assert result.err.endswith(line + "\n")
    return line.removeprefix("error: ")


def test_a_cache_of_another_recipe_is_refused_with_the_fields_that_differ(run, images, tmp_path, model):
    encode_once(run, images, tmp_path / "c")
    before = files(tmp_path / "c")
    line = refused(run("encode", images, "--out", tmp_path / "c", "--model", "tiny", "--resolution", 128, "--flip"))
    assert "holds a cache of another recipe" in line
    assert "--resolution 64 -> 128" in line
    assert "--flip: no -> yes" in line
    assert "--overwrite to start anew" in line
    line = refused(run("encode", images, "--out", tmp_path / "c", "--model", model, *SMALL[2:]))
    assert re.search(r"another VAE .--model, --vae.: [0-9a-f]{32} -> [0-9a-f]{32}", line)
    assert files(tmp_path / "c") == before


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("missing",), "SOURCE missing: no such folder. Give the folder that holds the images."),
        (("empty",), "SOURCE empty: no images (it is empty). Expected files such as .jpg, .png or .webp."),
        (("texts",), "SOURCE texts: no images (1 other files). Expected files such as .jpg, .png or .webp."),
        (("images", "--template", "nope"), "--template nope: neither a file nor a shipped template."),
        (("images", "--template", "style"), "--template uses [name], without a --placeholder."),
        (
            ("images", "--bucket-step", "20", "--model", "tiny"),
            "--bucket-step 20: not a multiple of 8, this model's factor. Try 24.",
        ),
        (("images", "--model", "nowhere/at all"), "--model nowhere/at all: no such folder or file."),
        (("images", "--model", "~nobody.here/x y"), "--model ~nobody.here/x y: no such folder or file."),
        (
            ("images", "--model", "tiny", "--text-encoder", "~nobody.here/x"),
            "--text-encoder ~nobody.here/x: no such file or folder.",
        ),
        (
            ("images", "--model", "tiny", "--template", "~nobody.here/x"),
            "--template ~nobody.here/x: neither a file nor a shipped template.",
        ),
        (("images", "--device", "cuda:x"), "--device cuda:x: expected auto, cuda, cuda:N, mps or cpu."),
        (("images", "--device", "cuda"), "--device cuda: torch"),
        (("images", "--dtype", "int8"), "--dtype int8: expected one of auto, float32, float16, bfloat16."),
        (("images", "--store-dtype", "int8"), "--store-dtype int8: expected one of float32, float16, bfloat16."),
        (("images", "--store", "all"), "--store all: expected one of mean+std, mean."),
        (("images", "--shard-size", "lots"), "--shard-size lots: expected a size such as 256MB or 1GiB."),
        (("images", "--batch-size", "0"), "--batch-size 0: must be at least 1."),
        (("images", "--workers", "0"), "--workers 0: must be at least 1."),
        (("images", "--out", "images"), "--out images: is the image folder itself."),
        (
            ("images", "--out", "images/tall0.txt"),
            "--out images/tall0.txt: is a file, expected a folder for the cache.",
        ),
        (("images", "--word-regex", "("), "--word-regex (: not a regular expression"),
    ],
)
def test_bad_input_is_one_line_and_leaves_nothing_behind(run, images, tmp_path, monkeypatch, arguments, message):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    (tmp_path / "texts").mkdir()
    (tmp_path / "texts" / "a.txt").write_text("x")
    before = files(tmp_path)
    model = () if "--model" in arguments else ("--model", "tiny")
    assert refused(run("encode", *arguments, *model)).startswith(message)
    assert files(tmp_path) == before


def test_unknown_option_is_refused(run, images):
    result = run("encode", images, "--resolutoin", 512)
    assert result.code == 2
    assert result.err.startswith("error: --resolutoin: no such option of latentprep encode. Did you mean --resolution?")


def test_default_model_without_network(run, images, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    import huggingface_hub.constants

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    line = refused(run("encode", images, "--out", tmp_path / "c"))
    assert line.startswith("--model stable-diffusion-v1-5/stable-diffusion-v1-5: not on this machine")
    assert "or try latentprep out with --model tiny." in line


def test_a_read_only_cache_folder(run, images, tmp_path, monkeypatch):
    def read_only(*_, **__):
        raise OSError(30, "Read-only file system")

    monkeypatch.setattr(os, "replace", read_only)
    line = refused(run("encode", images, "--out", tmp_path / "c", *SMALL))
    assert "cannot write (Read-only file system). Nothing was left half-written; mend that, and run" in line
    assert not [path for path in (tmp_path / "c").rglob("*") if path.is_file()]


def test_one_units_bug_stops_only_that_unit(run, images, tmp_path, monkeypatch):
    from latentprep.prepare.models.vae_encoder import VaeEncoder

    whole = VaeEncoder.start

    def encode(self, pixels):
        if pixels.shape[1] == 32:
            raise RuntimeError("a bug")
        return whole(self, pixels)

    monkeypatch.setattr(VaeEncoder, "start", encode)
    options = (*SMALL, "--shard-size", "30kB")
    result = run("encode", images, "--out", tmp_path / "c", *options)
    assert result.code == 1
    assert re.search(r"FAILED   unit [0-9a-f]+: RuntimeError: a bug", result.out)
    assert json.loads(run("inspect", tmp_path / "c", "--json").out)["buckets"] == {"64x64": 4}
    monkeypatch.undo()
    assert run("encode", images, "--out", tmp_path / "c", *options).code == 0
    assert json.loads(run("inspect", tmp_path / "c", "--json").out)["images"] == 8


def test_inspect_shows_what_is_in_it(run, images, tmp_path):
    encode_once(run, images, tmp_path / "c", "--flip")
    result = run("inspect", tmp_path / "c")
    assert result.code == 0
    for words in (
        r"images +8 x 2 views \(plain, flipped\)", r"model +tiny", r"96x32 +4", r"64x64 +4", r"captions +8",
        r"cond +prompt_embeds \[77, 64\]", r"encoded in float32, mean\+std stored as float16", r"cut +none",
    ):  # fmt: skip
        assert re.search(words, result.out), words


def test_inspect_counts_truncated_prompts(run, images, tmp_path):
    (images / "tall0.txt").write_text("long " * 40, encoding="utf-8")
    encode_once(run, images, tmp_path / "c")
    found = json.loads(run("inspect", tmp_path / "c", "--json").out)
    assert found["text"]["truncated_prompts"] == 1
    assert found["text"]["tokens"]["max"] == 162
    assert found["text"]["longest_truncated"] == [{"tokens": 162, "prompt": ("long " * 40).strip()}]
    shown = run("inspect", tmp_path / "c").out
    assert re.search(r"cut +1 prompt, the longest: *\n +162 tokens: 'long long.*\.\.\.' *\n", shown)


def test_inspect_json_has_the_statistics_of_the_latents(run, images, tmp_path):
    from latentprep import LatentDataset

    encode_once(run, images, tmp_path / "c")
    found = json.loads(run("inspect", tmp_path / "c", "--json").out)
    data = LatentDataset(str(tmp_path / "c"), latent_sampling_method="deterministic")
    import torch

    means = torch.cat([data[index].latent_mean[0].flatten(1).double() for index in range(8)], dim=1)
    assert found["latents"]["mean"] == [round(value, 4) for value in means.mean(1).tolist()]
    assert found["latents"]["std"] == pytest.approx(means.std(1, correction=0).tolist(), abs=1e-4)
    assert found["bytes"]["latents"] == sum(
        len(data) for name, data in files(tmp_path / "c").items() if ".latents." in name
    )
    assert found["skipped"] == {}
    assert found["made_with"]["model"] == "tiny"


def test_inspect_one_sample(run, images, tmp_path):
    encode_once(run, images, tmp_path / "c")
    found = json.loads(run("inspect", tmp_path / "c", "--key", "tall1.png", "--json").out)
    assert found["original_size"] == [80, 64]
    assert found["caption"] == ["picture number 1"]
    assert found["weight"]["min"] < 0.2
    assert re.search(r"original size +64x80", run("inspect", tmp_path / "c", "--key", "tall1.png").out)
    (images / "bad.png").write_text("x")
    encode_once(run, images, tmp_path / "d")
    assert "not in" in refused(run("inspect", tmp_path / "d", "--key", "nope.png"))
    assert "was skipped when this cache was made: not_an_image" in refused(
        run("inspect", tmp_path / "d", "--key", "bad.png")
    )


def test_inspect_of_what_is_no_cache(run, tmp_path):
    assert "not a latent cache, it has no cache.json." in refused(run("inspect", tmp_path))
    assert "not a latent cache" in refused(run("inspect", tmp_path / "missing"))


def test_templates_are_listed_with_their_lines(run):
    result = run("templates")
    assert result.code == 0
    assert "subject_filewords\n    a photo of [name], [filewords]\n" in result.out


def test_version(run):
    import latentprep

    assert run("--version").out == f"latentprep {latentprep.__version__}\n"


def test_demo_draws_encodes_and_says_what_to_type(run, tmp_path):
    result = run("demo", tmp_path / "demo")
    assert result.code == 0
    assert "encoded  24 images" in result.out
    assert "4 images turned upright by the EXIF orientation" in result.out
    assert "skipped  1 truncated (broken.jpg" in result.out
    assert result.out.endswith(f"next     latentprep inspect {tmp_path / 'demo' / 'cache'}\n")
    assert "nothing to do" in run("demo", tmp_path / "demo").out


def test_vae_of_its_own(run, images, tmp_path, model):
    other = make_model(tmp_path / "other", seed=1)
    options = ("--model", model, *SMALL[2:])
    for name, vae in {"a": (), "b": ("--vae", other), "c": ("--vae", other / "vae")}.items():
        assert run("encode", images, "--out", tmp_path / name, *options, *vae).code == 0
    recipes = [json.loads((tmp_path / name / "cache.json").read_text())["recipe"] for name in "abc"]
    assert recipes[0]["latents"]["vae"] != recipes[1]["latents"]["vae"] == recipes[2]["latents"]["vae"]
    assert recipes[0]["text"] == recipes[1]["text"]


def test_default_out_is_beside_the_source(run, images):
    assert run("encode", f"{images}/", *SMALL).code == 0
    assert (Path(f"{images}.latents") / "cache.json").is_file()


def test_names_that_are_not_utf_8(run, images, tmp_path):
    folder = os.fsencode(images)
    (images / "wide0.png").rename(os.fsdecode(folder + b"/caf\xe9.png"))
    with open(folder + b"/broken\xff.png", "wb") as file:
        file.write(b"x")
    (images / "metadata.jsonl").write_text('{"file_name": "wide1.png", "text": "half a pair: \\ud83d"}\n')
    result = encode_once(run, images, tmp_path / "c")
    assert "skipped  1 not_an_image (broken\\udcff.png: " in result.out
    assert "is complete with 8 images" in encode_once(run, images, tmp_path / "c").out
    found = json.loads(run("inspect", tmp_path / "c", "--key", os.fsdecode(b"caf\xe9.png"), "--json").out)
    assert found["caption"] == ["caf?"]
    assert run("inspect", tmp_path / "c", "--key", os.fsdecode(b"caf\xe9.png")).code == 0
    assert run("inspect", tmp_path / "c").code == 0


def test_a_cache_of_nothing_but_skips(run, images, tmp_path):
    for path in images.glob("*.png"):
        path.write_bytes(path.read_bytes()[:-40])
    line = refused(run("encode", images, "--out", tmp_path / "c", *SMALL))
    assert f"SOURCE {images}: none of its 8 images can be used (" in line
    assert ": truncated, " in line
    assert not (tmp_path / "c").exists()


def test_a_folder_of_which_nothing_can_be_used(run, images, tmp_path):
    for path in images.glob("*.png"):
        path.write_text("not a picture")
    line = refused(run("encode", images, "--out", tmp_path / "c", *SMALL))
    assert line.startswith(f"SOURCE {images}: none of its 8 images can be used (tall0.png: not_an_image, ")
    assert not (tmp_path / "c").exists()


def test_broken_files_that_come_and_go_are_recorded(run, images, tmp_path):
    encode_once(run, images, tmp_path / "c")
    before = files(tmp_path / "c")
    (images / "bad.png").write_text("x")
    assert "encoded  nothing in " in encode_once(run, images, tmp_path / "c").out
    assert "nothing to do" in encode_once(run, images, tmp_path / "c").out
    assert json.loads(run("inspect", tmp_path / "c", "--json").out)["skipped"] == {"not_an_image": 1}
    (images / "bad.png").unlink()
    encode_once(run, images, tmp_path / "c")
    assert files(tmp_path / "c") == before


def test_no_cond_takes_the_stored_cond_away(run, images, tmp_path):
    encode_once(run, images, tmp_path / "c")
    assert list((tmp_path / "c").glob("uncond.*.safetensors"))
    result = encode_once(run, images, tmp_path / "c", "--no-cond")
    assert "the text of 8 images is written anew" in result.out
    encode_once(run, images, tmp_path / "fresh", "--no-cond")
    assert files(tmp_path / "fresh") == files(tmp_path / "c")


def test_a_terminal_obeys_nothing_that_a_cache_says(run, images, tmp_path):
    (images / "tall0.txt").write_text("\x1b[2Jgone", encoding="utf-8")
    (images / "wide0.png").rename(images / "\x1b[31m.png")
    encode_once(run, images, tmp_path / "c")
    shown = [
        run("inspect", tmp_path / "c"), run("inspect", tmp_path / "c", "--key", "tall0.png"),
        run("inspect", tmp_path / "c", "--key", "\x1b[31m.png"), run("encode", images, "--dry-run", *SMALL),
    ]  # fmt: skip
    for result in shown:
        assert result.code == 0
        assert "\x1b[2J" not in result.out
        assert "\x1b[31m" not in result.out


def test_a_cache_elsewhere_is_made_read_and_updated_too(run, images):
    """fsspec's memory stands for any object store: no lock, no memory maps, one put for each file."""
    where = f"memory://bucket{os.getpid()}/cache"
    encode_once(run, images, where, "--flip")
    gradient(50, 50).save(images / "new.png")
    (images / "wide0.png").unlink()
    assert "1 new, 1 gone" in encode_once(run, images, where, "--flip").out
    assert "nothing to do" in encode_once(run, images, where, "--flip").out
    assert run("verify", where, "--source", images, "--re-encode", 2).code == 0
    assert run("compact", where, "--min-share", 0).code == 0
    assert run("verify", where, "--source", images).code == 0
    assert json.loads(run("inspect", where, "--json").out)["images"] == 8
