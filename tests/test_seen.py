"""Prompts that see control images (Qwen-Image-Edit): cond is of a row and a prompt, and the pipeline's own."""

import inspect
import json
import re
import shutil
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

import latentprep
from latentprep import LatentDataset, UserError
from latentprep.cache.manifest import commit, open_manifest
from latentprep.cache.storage import Storage
from latentprep.cache.text import write_text
from latentprep.prepare.models.text_encoder import TextEncoder
from latentprep.prepare.models.text_folder import open_text
from latentprep.prepare.models.vae_encoder import VaeEncoder
from latentprep.prepare.work import seen as seen_images
from tests.miniatures import with_positions
from tests.test_control import draw_before, draw_ref, draw_targets, noise
from tests.test_encode import files

diffusers = pytest.importorskip("diffusers", minversion="0.36")  # of which both pipelines are

slow = pytest.mark.slow
STEMS = ("QwenImageEdit", "QwenImageEditPlus")
SIZES = ("--resolution", 64, "--bucket-step", 32, "--min-side", 32, "--store-dtype", "float32")
CAPTIONS = {"tall0": "make it a red house", "tall1": "", "wide0": "a cat", "wide1": "a cat"}
CAPTIONS_OF = {f"{name}.png": caption for name, caption in CAPTIONS.items()}


@pytest.fixture
def pairs(tmp_path):
    """Targets with captions, and two folders of control images."""
    source = draw_targets(tmp_path / "targets")
    for name, caption in CAPTIONS.items():
        (source / f"{name}.txt").write_text(caption)
    return SimpleNamespace(source=source, before=draw_before(tmp_path / "before"), ref=draw_ref(tmp_path / "ref"))


@pytest.fixture
def edit(run, pairs, miniature, tmp_path):
    """Encodes the pairs with a miniature of Qwen-Image-Edit, or Plus."""

    def encode(*options, stem="QwenImageEdit", out="c", code=0, controls=("before",)):
        control = [part for name in controls for part in ("--control", getattr(pairs, name))]
        model = () if "--model" in options else ("--model", miniature(stem)[1])
        result = run("encode", pairs.source, "--out", tmp_path / out, *SIZES, *model, *control, *options)
        assert result.code == code, result.err
        return result

    return encode


@pytest.fixture
def seen(monkeypatch):
    """What the text encoder is asked for: prompts, each with its images [H,W,3]."""
    found, encode = [], TextEncoder.encode_seeing

    def note(self, prompts, images):
        kept = [list(own) for own in images]
        found.extend(zip(prompts, kept, strict=True))
        return encode(self, prompts, kept)

    monkeypatch.setattr(TextEncoder, "encode_seeing", note)
    return found


def read(cache, **options):
    """key -> batch of one image."""
    data = LatentDataset(cache, latent_sampling_method="deterministic", **options)
    return {data.key(n): data[n] for n in range(len(data))}


def embeds_of(batch):
    """[T,D] of a batch of one."""
    assert batch.cond["prompt_embeds_mask"].all()
    return batch.cond["prompt_embeds"][0]


@torch.inference_mode()
def by_pipeline(miniature, stem, prompt, images):
    """What the pipeline's own __call__ encodes of a prompt and PIL images, with the positions it was trained with."""

    class Done(BaseException):
        pass

    pipeline = with_positions(miniature(stem)[0])
    encode, returned = type(pipeline).encode_prompt, []

    def hear(**options):
        returned.append(encode(pipeline, **options))
        raise Done

    pipeline.encode_prompt = hear
    with pytest.raises(Done):
        pipeline(image=images[0] if stem == "QwenImageEdit" else images, prompt=prompt)
    ((embeds, mask),) = returned
    assert mask is None
    return embeds[0]


# --- cond


@pytest.mark.parametrize("stem", STEMS)
def test_cond_is_what_the_pipelines_own_call_encodes(edit, pairs, miniature, stem, tmp_path):
    controls = ("before", "ref")[: 1 + (stem == "QwenImageEditPlus")]
    for n, name in enumerate(CAPTIONS):  # of the size of its bucket: the VAE sees these pixels
        size = (64, 64) if name.startswith("tall") else (96, 32)
        for folder in controls:
            for old in getattr(pairs, folder).glob(f"{name}.*"):
                old.unlink()
            noise(*size, n).save(getattr(pairs, folder) / f"{name}.png")
    edit(stem=stem, controls=controls)
    found = read(tmp_path / "c")
    assert len(found) == 4
    for key, batch in found.items():
        images = [Image.open(getattr(pairs, folder) / key) for folder in controls]
        wanted = by_pipeline(miniature, stem, CAPTIONS[key.partition(".")[0]], images)
        assert torch.equal(embeds_of(batch), wanted), key
        assert batch.cond_text == [CAPTIONS[key.partition(".")[0]]]
    assert not torch.equal(embeds_of(found["wide0.png"]), embeds_of(found["wide1.png"]))  # one prompt, two images


@slow
@pytest.mark.parametrize(
    "options", [(), ("--crop", "random"), ("--fit", "pad"), ("--control-size", "own", "--crop", "random")], ids=str
)
def test_a_prompt_sees_images_as_the_vae_saw_them(edit, seen, monkeypatch, options):
    shown, start = [], VaeEncoder.start

    def note(self, pixels):
        shown.extend(np.asarray(pixels))
        return start(self, pixels)

    monkeypatch.setattr(VaeEncoder, "start", note)
    edit(*options, stem="QwenImageEditPlus", controls=("before", "ref"))
    assert len(seen) == 4
    for _, images in seen:
        assert len(images) == 2
        assert all(any(np.array_equal(image, other) for other in shown) for image in images)


@slow
def test_a_renamed_image_is_seen_as_it_was_cut(edit, pairs, seen, tmp_path):
    """A key decides random crops, and that of a control image of another shape is its target's."""
    options = ("--crop", "random")
    for path in pairs.before.glob("wide*"):
        noise(64, 200, 7).save(path)
    edit(*options)
    before = [pixels for prompt, (pixels,) in seen if prompt == "a cat"]
    for folder in (pairs.source, pairs.before):
        for path in [*folder.glob("wide*")]:
            path.rename(path.with_name(f"other {path.name}"))
    for path in pairs.source.glob("other*.txt"):
        path.write_text("a dog")
    seen.clear()
    edit(*options)
    after = [pixels for prompt, (pixels,) in seen if prompt == "a dog"]
    assert len(after) == 2
    assert all(np.array_equal(one, other) for one, other in zip(before, after, strict=True))


@slow
@pytest.mark.parametrize("store", ["int8", "float16"])
def test_cond_is_stored_in_other_types(edit, tmp_path, store):
    edit(out="whole")
    edit("--cond-dtype", store)
    for key, batch in read(tmp_path / "c").items():
        whole = embeds_of(read(tmp_path / "whole")[key])
        assert 0 < (embeds_of(batch) - whole).abs().max() < 0.05


# --- runs


def test_a_caption_that_changes_takes_the_others_over(edit, pairs, seen, tmp_path):
    edit()
    before = read(tmp_path / "c")
    seen.clear()
    (pairs.source / "wide0.txt").write_text("a dog")
    edit()
    assert [prompt for prompt, _ in seen] == ["a dog"]
    after = read(tmp_path / "c")
    for key in ("wide1.png", "tall0.png", "tall1.png"):
        assert torch.equal(embeds_of(before[key]), embeds_of(after[key]))
    edit(out="fresh")
    assert torch.equal(embeds_of(after["wide0.png"]), embeds_of(read(tmp_path / "fresh")["wide0.png"]))
    seen.clear()
    assert "nothing to do" in edit().out
    assert not seen


@slow
def test_a_control_image_that_changes_makes_its_row_anew(edit, pairs, seen, tmp_path):
    edit()
    before = read(tmp_path / "c")
    seen.clear()
    noise(128, 40, 9).save(pairs.before / "wide0.png")
    edit()
    assert [prompt for prompt, _ in seen] == ["a cat"]
    after = read(tmp_path / "c")
    assert [key for key in before if not torch.equal(embeds_of(before[key]), embeds_of(after[key]))] == ["wide0.png"]


@slow
def test_a_row_that_comes_back_has_its_own_cond(edit, pairs, tmp_path):
    """While it was gone it pointed to the prompt of another row."""
    for path in pairs.source.glob("*.txt"):
        path.write_text("a cat")
    edit()
    before = read(tmp_path / "c")
    path = pairs.source / "wide0.png"
    path.rename(tmp_path / "away.png")
    edit()
    (pairs.source / "tall0.txt").write_text("a dog")
    edit("--allow-gone")
    (tmp_path / "away.png").rename(path)
    edit()
    assert torch.equal(embeds_of(read(tmp_path / "c")["wide0.png"]), embeds_of(before["wide0.png"]))


@slow
def test_two_passes_and_ranks_give_the_same_bytes(edit, tmp_path):
    edit("--shard-size", 1, out="whole")
    edit("--shard-size", 1, "--only", "latents")
    edit("--shard-size", 1, "--only", "text")
    assert files(tmp_path / "c") == files(tmp_path / "whole")
    for rank in (1, 0):
        edit("--shard-size", 1, "--rank", rank, "--world-size", 2, out="ranks")
    assert files(tmp_path / "ranks") == files(tmp_path / "whole")
    assert not [name for name in files(tmp_path / "whole") if "uncond" in name or ".cond." in name]


@slow
def test_an_image_that_changes_after_the_plan_fails_its_text_alone(edit, pairs, tmp_path, monkeypatch):
    load = seen_images.load_controls

    def change(item, *others):
        if item.key == "tall0.png":
            noise(32, 40, 9).save(pairs.before / "tall0.webp", lossless=True)
        return load(item, *others)

    monkeypatch.setattr(seen_images, "load_controls", change)
    result = edit("--shard-size", 1, code=1)
    assert (
        "tall0.png: changed, its content, or that of its mask or control images, is not what was encoded" in result.out
    )
    assert "Traceback" not in result.out + result.err
    assert read(tmp_path / "c").keys() == CAPTIONS_OF.keys() - {"tall0.png"}
    monkeypatch.undo()
    edit("--shard-size", 1)
    edit(out="fresh")
    for key, batch in read(tmp_path / "c").items():
        assert torch.equal(embeds_of(batch), embeds_of(read(tmp_path / "fresh")[key]))


@slow
def test_a_control_image_that_is_gone_after_the_plan_fails_its_text_alone(edit, pairs, tmp_path, monkeypatch):
    load = seen_images.load_controls

    def lose(item, *others):
        (pairs.before / "wide1.png").unlink(missing_ok=True)
        return load(item, *others)

    monkeypatch.setattr(seen_images, "load_controls", lose)
    assert "wide1.png: io_error, its control image" in edit("--shard-size", 1, code=1).out
    assert len(read(tmp_path / "c")) == 3


@slow
def test_several_devices_give_the_same_bytes(edit, tmp_path):
    for out, device in (("whole", ("--device", "cpu")), ("c", ("--devices", "cpu,cpu"))):
        edit("--shard-size", 1, *device, out=out)
    whole, found = files(tmp_path / "whole"), files(tmp_path / "c")
    assert whole.pop("cache.json") != found.pop("cache.json")  # it names the devices
    assert found == whole


# --- the empty prompt


def test_each_image_has_its_own_empty_prompt(edit, miniature, tmp_path, seen):
    edit("--image-uncond")
    assert len(seen) == 7  # one of the four prompts is empty itself
    dropped, kept = (read(tmp_path / "c", caption_dropout=share) for share in (1.0, 0.0))
    wanted = [
        by_pipeline(miniature, "QwenImageEdit", "", [Image.fromarray(pixels) for pixels in images])
        for prompt, images in seen
        if not prompt
    ]
    found = [embeds_of(batch) for batch in dropped.values()]
    assert [[torch.equal(one, other) for other in wanted].count(True) for one in found] == [1, 1, 1, 1]
    for key, batch in dropped.items():
        assert batch.cond_text == [""]
        assert torch.equal(embeds_of(batch), embeds_of(kept[key])) == (CAPTIONS_OF[key] == "")
    data = LatentDataset(tmp_path / "c", caption_dropout=0.5)
    assert data.uncond() is None
    assert not data[0].fields
    mixed = data.__getitems__([0, 0])
    assert mixed.cond["prompt_embeds"].shape[0] == 2


@slow
def test_the_empty_prompt_of_each_image_is_made_later_too(edit, seen, tmp_path):
    edit()
    seen.clear()
    edit("--image-uncond")
    assert [prompt for prompt, _ in seen] == [""] * 3
    edit("--image-uncond", out="fresh")
    assert files(tmp_path / "fresh") == files(tmp_path / "c")


def test_captions_are_not_dropped_without_it(edit, tmp_path):
    edit()
    with pytest.raises(UserError, match=r"has no cond of the empty prompt, which .* Encode with --image-uncond"):
        LatentDataset(tmp_path / "c", caption_dropout=0.1)
    assert LatentDataset(tmp_path / "c", caption_dropout=1.0, include_cond=False)[0].cond_text == [""]


@slow
def test_compact_keeps_cond_with_its_rows(edit, pairs, run, tmp_path):
    edit("--image-uncond")
    before = read(tmp_path / "c", caption_dropout=1.0), read(tmp_path / "c")
    (pairs.source / "tall0.png").unlink()
    edit("--image-uncond", "--allow-gone")
    assert run("compact", tmp_path / "c").code == 0
    after = read(tmp_path / "c", caption_dropout=1.0), read(tmp_path / "c")
    for old, new in zip(before, after, strict=True):
        assert new.keys() == old.keys() - {"tall0.png"}
        assert all(torch.equal(embeds_of(batch), embeds_of(old[key])) for key, batch in new.items())


def test_sets_have_their_own_control_images_and_dropout(edit, pairs, run, miniature, tmp_path):
    lines = []
    for name, control, dropout in (("one", "before", 1.0), ("two", "ref", 0.0)):
        options = {"name": name, "source": str(pairs.source), "control": str(getattr(pairs, control))}
        lines += ["[[set]]", *(f"{key} = {json.dumps(value)}" for key, value in options.items())]
        lines.append(f"caption_dropout = {dropout}")
    (tmp_path / "sets.toml").write_text("\n".join(lines))
    encode = (
        "encode",
        tmp_path / "sets.toml",
        *SIZES,
        "--model",
        miniature("QwenImageEdit")[1],
        "--out",
        tmp_path / "s",
    )
    assert run(*encode, "--image-uncond").code == 0
    found = read(tmp_path / "s")
    assert len(found) == 8
    assert {key: batch.cond_text for key, batch in found.items()} == {
        f"{name}/{key}": [caption if name == "two" else ""]
        for name in ("one", "two")
        for key, caption in CAPTIONS_OF.items()
    }
    assert not torch.equal(embeds_of(found["one/tall1.png"]), embeds_of(found["two/tall1.png"]))
    assert run(*encode).code == 0
    with pytest.raises(UserError, match="Encode with --image-uncond"):
        LatentDataset(tmp_path / "s")


# --- looking at it


@slow
def test_verify_encodes_it_again(edit, pairs, run, tmp_path):
    edit("--image-uncond")
    verify = ("verify", tmp_path / "c", "--source", pairs.source, "--re-encode", 4, "--device", "cpu")
    assert run(*verify).code == 0
    manifest = open_manifest(Storage(tmp_path / "c"))
    assert manifest.uncond is None
    (shard,) = manifest.shards
    text = shard.open_text(Storage(tmp_path / "c"))
    prompts = [*text.prompt]
    text.cond["prompt_embeds"].values.mul_(1.5)  # another cond, and hashes that fit
    stamp = write_text(Storage(tmp_path / "c"), shard.id, shard.text_id, text)
    commit(Storage(tmp_path / "c"), replace(manifest, shards=[replace(shard, text_file=stamp)]), [])
    result = run(*verify)
    assert result.code == 1
    assert f"of {prompts[0]!r}" in result.out


@slow
def test_a_dry_run_counts_the_tokens_of_images(edit, tmp_path):
    said = edit("--dry-run", "--image-uncond").out
    assert "prompts: 1 per image, 7 to encode" in said
    assert not (tmp_path / "c").exists()
    edit("--image-uncond")
    storage = Storage(tmp_path / "c")
    (shard,) = open_manifest(storage).shards
    text = shard.open_text(storage)
    assert f"tokens: {text.num_tokens.max():,} in the longest prompt, with those of its images; none is cut" in said
    assert np.diff(text.cond["prompt_embeds"].offsets).tolist() == text.num_tokens.tolist()
    (size,) = re.findall(r"about ([\d.]+) kB of text", said)
    assert abs(float(size) * 1000 - shard.text_file.nbytes) < 5000


@slow
def test_a_dry_run_knows_what_is_taken_over(edit, pairs):
    edit()
    (pairs.source / "wide0.txt").write_text("a dog")
    assert "1 to encode" in edit("--dry-run").out
    assert "4 to encode" in edit("--dry-run", "--image-uncond").out


def test_verify_finds_empty_prompts_that_are_not_there(edit, run, tmp_path):
    edit("--image-uncond")
    storage = Storage(tmp_path / "c")
    manifest = open_manifest(storage)
    (shard,) = manifest.shards
    text = shard.open_text(storage)
    for group in text.groups:
        del group.columns["uncond_of"]
    stamp = write_text(storage, shard.id, shard.text_id, text)
    commit(storage, replace(manifest, shards=[replace(shard, text_file=stamp)]), [])
    assert "an empty prompt of each image where the others have none, or none" in run("verify", tmp_path / "c").out
    with pytest.raises(UserError, match=r"has no cond of the empty prompt\. Run latentprep verify"):
        read(tmp_path / "c", caption_dropout=1.0)


@slow
def test_diff_compares_images_with_their_own_cond(edit, tmp_path):
    edit(out="a")
    edit("--shard-size", 1, out="b")
    found = latentprep.diff(tmp_path / "a", tmp_path / "b", progress=False).cond
    assert (found.num_compared, found.num_unlike) == (4, 0)
    assert found.distances["cond"].worst < 1e-5


# --- what is refused


@pytest.mark.parametrize(
    ("options", "controls", "line"),
    [
        (
            (),
            (),
            "the prompts of Qwen-Image-Edit see control images, and there are none. Give them to encode with --control",
        ),
        ((), ("before", "ref"), "2 control images of each image, but a prompt of Qwen-Image-Edit sees at most 1"),
        (("--flip",), ("before",), "--flip: a prompt of Qwen-Image-Edit sees its control images in one view alone"),
        (("--crop", "random", "--crops", 2), ("before",), "--crops 2: a prompt of Qwen-Image-Edit sees"),
        (("--max-tokens", 100), ("before",), "--max-tokens 100: its pipeline takes none for Qwen-Image-Edit"),
    ],
)
def test_what_prompts_cannot_see_is_refused_before_anything_is_written(edit, tmp_path, options, controls, line):
    result = edit(*options, controls=controls, code=1)
    assert line in " ".join(result.err.split())
    assert not (tmp_path / "c").exists()
    if "--max-tokens" not in options:
        edit(*options, "--no-cond", controls=controls)


def test_bench_leaves_it_out(run, images, miniature, tmp_path):
    bench = ("bench", images, "--model", miniature("QwenImageEdit")[1], "--resolution", 64, "--out", tmp_path / "c")
    assert "leave cond out with --no-cond" in " ".join(run(*bench).err.split())


def test_other_models_have_no_empty_prompt_of_each_image(run, images, tmp_path):
    result = run("encode", images, "--out", tmp_path / "c", "--model", "tiny", "--resolution", 64, "--image-uncond")
    assert result.code == 1
    assert "--image-uncond: the prompts of Stable Diffusion 1 and 2 see no images" in " ".join(result.err.split())


def test_the_token_of_an_image_in_a_caption_is_one_line(edit, pairs):
    (pairs.source / "wide0.txt").write_text("a <|image_pad|> cat")
    line = " ".join(edit(code=1).err.split())
    assert "the prompt 'a <|image_pad|> cat' has <|image_pad|>, which stands for an image." in line


# --- the files of a model are a stranger's


def spoil(folder, tmp_path, **changes):
    """A copy of a model whose image processor's config says something else."""
    made = tmp_path / "spoilt"
    shutil.copytree(folder, made)
    path = made / "processor" / "preprocessor_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))
    return made


@pytest.mark.parametrize(
    ("changes", "line"),
    [
        ({"image_processor_type": "Evil"}, "says that it is a Evil, expected Qwen2VLImageProcessor or"),
        (
            {"size": {"shortest_edge": 10**12, "longest_edge": 10**13}},
            "says min_pixels is 1000000000000, expected 1 to",
        ),
        ({"size": {"shortest_edge": 4, "longest_edge": 3}}, "says max_pixels is 3, expected 4 or more"),
        ({"size": "large"}, "says min_pixels is None, expected 1 to"),
        ({"patch_size": 16}, "says patch_size is 16, expected 14"),
        ({"merge_size": [2]}, "says merge_size is [2], expected 2"),
        ({"resample": 0}, "says resample is 0, expected 3"),
        ({"do_resize": False}, "says do_resize is False, expected True"),
        ({"rescale_factor": 1.0}, "says rescale_factor is 1.0, expected 1/255"),
        ({"image_mean": [0.5, 0.5]}, "says image_mean is [0.5, 0.5], expected three numbers above 0"),
        ({"image_std": [1, 1, float("inf")]}, "says image_std is [1, 1, inf], expected three numbers above 0"),
    ],
    ids=str,
)
def test_a_processor_of_another_kind_is_refused(miniature, tmp_path, changes, line):
    folder = spoil(miniature("QwenImageEdit")[1], tmp_path, **changes)
    with pytest.raises(UserError, match=re.escape(line)):
        open_text(folder)


@pytest.mark.parametrize("value", [0, -1, "14", 2**40])
def test_a_vision_tower_of_no_size_is_refused(miniature, tmp_path, value):
    folder = spoil(miniature("QwenImageEdit")[1], tmp_path)
    path = folder / "text_encoder" / "config.json"
    config = json.loads(path.read_text())
    config["vision_config"]["patch_size"] = value
    path.write_text(json.dumps(config))
    with pytest.raises(UserError) as caught:
        open_text(folder)
    assert "\n" not in str(caught.value)


def test_a_processor_may_be_saved_in_one_file_and_belongs_to_the_digest(miniature, tmp_path):
    folder = spoil(miniature("QwenImageEdit")[1], tmp_path)
    whole = open_text(folder)
    path = folder / "processor" / "preprocessor_config.json"
    config = json.loads(path.read_text())
    path.unlink()
    (folder / "processor" / "processor_config.json").write_text(json.dumps({"image_processor": config}))
    assert open_text(folder).processor == whole.processor
    config["size"]["longest_edge"] += 1
    (folder / "processor" / "processor_config.json").write_text(json.dumps({"image_processor": config}))
    assert open_text(folder).digest != whole.digest


def test_a_model_without_its_processor_is_one_line(miniature, tmp_path):
    folder = spoil(miniature("QwenImageEdit")[1], tmp_path)
    (folder / "processor" / "preprocessor_config.json").unlink()
    with pytest.raises(UserError, match="not a diffusers folder, it has no preprocessor_config"):
        open_text(folder)
    shutil.rmtree(folder / "processor")
    with pytest.raises(UserError, match="has no text_encoder and processor folders"):
        open_text(folder)


def test_a_tokenizer_that_knows_no_images_is_refused(miniature, tmp_path):
    folder = spoil(miniature("QwenImageEdit")[1], tmp_path)
    path = folder / "text_encoder" / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "image_token_id": 3}))
    with pytest.raises(UserError, match=r"has <.image_pad.> as number \d+, but its text encoder knows images by 3"):
        open_text(folder).check()


@pytest.mark.parametrize("side", ["left", "right"])
def test_either_side_of_padding_gives_the_same(miniature, tmp_path, side):
    folder = spoil(miniature("QwenImageEdit")[1], tmp_path)
    path = folder / "processor" / "tokenizer_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "padding_side": side}))
    pixels = [np.asarray(noise(64, 64))]
    one, other = (
        open_text(model).open(torch.device("cpu"), torch.float32).encode_seeing(["a cat"], [pixels])["prompt_embeds"]
        for model in (folder, miniature("QwenImageEdit")[1])
    )
    assert torch.equal(one.values, other.values)


def test_positions_of_images_are_mended_as_long_as_diffusers_leaves_them_out(miniature):
    """When this fails, mend_positions can go: https://github.com/huggingface/diffusers/issues/14194."""
    pipeline = miniature("QwenImageEdit")[0]
    (image,) = [Image.fromarray(np.asarray(noise(64, 64)))]
    with torch.inference_mode():
        plain, right = (made.encode_prompt("a cat", image=image)[0] for made in (pipeline, with_positions(pipeline)))
    is_asked = "mm_token_type_ids" in inspect.signature(type(pipeline.text_encoder).forward).parameters
    assert torch.equal(plain, right) != is_asked
