"""recheck_text.py: verify --re-encode finds cond that is not of its prompts, though every hash is right."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from diffusers import AutoencoderKL
from safetensors.torch import save_file

from latentprep import LatentDataset
from latentprep.cache.cond import open_uncond, write_uncond
from latentprep.cache.distance import difference_of
from latentprep.cache.manifest import Uncond, commit, open_manifest, read_skips
from latentprep.cache.storage import Storage
from latentprep.cache.text import write_text
from latentprep.errors import UserError
from latentprep.prepare.images.pillow import limit_pixels
from latentprep.prepare.models.text_encoder import TextEncoder
from latentprep.prepare.models.text_folder import open_text as open_encoder
from latentprep.prepare.recheck_text import TOLERANCES, compare_cond, find_text, reencode_text
from tests.conftest import SMALL, gradient, make_model
from tests.test_families import CPU, make_mini
from tests.test_single_file import ldm_vae

SIZE = ("--resolution", "64", "--bucket-step", "32", "--min-side", "32")
PROMPTS = ("a red house, snow", "a red house, snoo", "a cat on a sofa", "")


@pytest.fixture
def photos(tmp_path):
    """Four small images with captions, of which the first two differ by a letter and the last is empty."""
    folder = tmp_path / "images"
    folder.mkdir()
    for n, prompt in enumerate(PROMPTS):
        gradient(64, 64).rotate(90 * n).save(folder / f"{n}.png")
        (folder / f"{n}.txt").write_text(prompt)
    return folder


@pytest.fixture
def cache(run, photos, tmp_path):
    assert run("encode", photos, "--out", tmp_path / "c", *SMALL).code == 0
    return tmp_path / "c"


@pytest.fixture
def check(run, photos, tmp_path):
    """Problems of verify --re-encode as (name, problem), and the details in one text; the exit code goes with them."""

    def check_cache(cache=tmp_path / "c", *options):
        result = run("verify", cache, "--source", photos, "--re-encode", 4, "--json", *options)
        found = json.loads(result.out)
        assert result.code == (1 if found["problems"] else 0)
        pairs = [(problem["name"], problem["problem"]) for problem in found["problems"]]
        return pairs, " | ".join(problem["detail"] for problem in found["problems"]), found

    return check_cache


def rewrite(cache, change=lambda text: text, uncond=lambda cond: cond, **recipe):
    """Text files and manifest written anew by the cache's own writers, so that every seal and every hash is right."""
    storage = Storage(cache)
    manifest = open_manifest(storage)
    text_recipe = replace(manifest.recipe.text, **recipe)
    shards = []
    for entry in manifest.shards:
        text = change(entry.open_text(storage))
        text = replace(text, metadata={**text.metadata, "recipe": text_recipe.to_json()})
        shards.append(entry.with_text(entry.text_id, write_text(storage, entry.id, entry.text_id, text)))
    metadata, cond = open_uncond(storage, manifest.uncond.id)
    stamp = write_uncond(storage, manifest.uncond.id, uncond(cond), metadata)
    recipe = replace(manifest.recipe, text=text_recipe)
    made = replace(manifest, recipe=recipe, shards=shards, uncond=Uncond(manifest.uncond.id, stamp))
    commit(storage, made, read_skips(storage))


def changed(name, value):
    """A change of one tensor of the cond."""
    return lambda text: replace(text, cond={**text.cond, name: value(text.cond[name].clone()).contiguous()})


def one_row(row, value):
    def change(cond):
        cond[row] = value(cond[row])
        return cond

    return change


def prompt_number(cache, prompt):
    storage = Storage(cache)
    (entry,) = open_manifest(storage).shards
    return list(entry.open_text(storage).prompt).index(prompt)


def test_a_healthy_cache_and_how_near_it_comes(run, cache, photos, check):
    pairs, _, found = check()
    assert pairs == []
    assert found["largest_cond_difference"] < 1e-5
    result = run("verify", cache, "--source", photos, "--re-encode", 2)
    assert result.code == 0
    first, second, _ = result.out.splitlines()
    assert first.startswith("encoded again: at most ")
    assert second.startswith("cond encoded again: at most ")
    assert second.endswith(" standard deviations from what is stored")


@pytest.mark.parametrize(
    "change",
    [
        torch.zeros_like,
        lambda cond: cond * 1.1,
        lambda cond: cond.roll(1, 0),  # another's
        lambda cond: one_row((slice(None), 0), torch.zeros_like)(cond),  # one token of 77
        lambda cond: torch.randn(cond.shape, generator=torch.Generator().manual_seed(0)).to(cond.dtype),
    ],
    ids=["zeros", "scaled", "exchanged", "one token", "garbage"],
)
def test_cond_that_is_not_of_its_prompts_is_found(run, cache, photos, check, change):
    rewrite(cache, changed("prompt_embeds", change))
    assert run("verify", cache).code == 0  # no hash can know
    assert run("verify", cache, "--source", photos).code == 0
    pairs, details, _ = check()
    assert sorted(pairs) == [(f"{n}.png", "cond") for n in range(4)]
    assert "of 'a cat on a sofa': prompt_embeds " in details
    assert " standard deviations from what is stored, allowed 0.003" in details


def test_one_row_of_garbage_among_good_ones_is_named(cache, check):
    rewrite(cache, changed("prompt_embeds", one_row(prompt_number(cache, PROMPTS[2]), torch.zeros_like)))
    assert check()[0] == [("2.png", "cond")]


def test_every_prompt_of_an_image_is_compared(run, photos, tmp_path, check):
    (photos / "2.txt").write_text("one\ntwo\nthree")
    options = ("--caption-lines", "--prompts-per-image", 3)
    assert run("encode", photos, "--out", tmp_path / "c", *SMALL, *options).code == 0
    for prompt in ("one", "two", "three"):
        rewrite(
            tmp_path / "c", changed("prompt_embeds", one_row(prompt_number(tmp_path / "c", prompt), lambda v: v + 1))
        )
        pairs, details, _ = check()
        assert ("2.png", "cond") in pairs
        assert f"of {prompt!r}: " in details


def test_images_that_are_gone_are_not_compared(run, cache, photos, check):
    number = prompt_number(cache, PROMPTS[2])
    (photos / "2.png").unlink()
    assert run("encode", photos, "--out", cache, *SMALL).code == 0
    assert open_manifest(Storage(cache)).num_dead == 1
    rewrite(cache, changed("prompt_embeds", one_row(number, torch.zeros_like)))
    assert check()[0] == []
    rewrite(cache, changed("prompt_embeds", torch.zeros_like))
    assert sorted(check()[0]) == [(f"{n}.png", "cond") for n in (0, 1, 3)]


@pytest.mark.parametrize("change", [torch.zeros_like, lambda cond: cond.flip(1)])
def test_the_empty_prompt_is_compared_whatever_images_are_chosen(run, cache, photos, change):
    rewrite(cache, uncond=lambda cond: {name: change(value).contiguous() for name, value in cond.items()})
    assert run("verify", cache).code == 0
    for seed in range(2):
        result = run("verify", cache, "--source", photos, "--re-encode", 1, "--seed", seed)
        assert result.code == 1
        assert result.out.startswith(f"cond       {next(cache.glob('uncond.*')).name}: of '': prompt_embeds ")


@pytest.mark.parametrize("recipe", [{"clip_skip": 2}, {"emphasis": True}, {"max_tokens": 150}])
def test_cond_of_another_recipe_is_found(run, cache, photos, check, recipe):
    if "emphasis" in recipe:
        (photos / "2.txt").write_text("a (cat:1.3)")
        assert run("encode", photos, "--out", cache, *SMALL).code == 0
    rewrite(cache, **recipe)
    assert run("verify", cache).code == 0
    pairs, details, _ = check()
    assert ("2.png", "cond") in pairs
    if "max_tokens" in recipe:
        assert "numbers for a prompt, expected " in details
    if "clip_skip" in recipe:
        assert {name for name, _ in pairs} > {"0.png", "1.png", "2.png", "3.png"}


@pytest.mark.parametrize(
    "options", [("--clip-skip", 2), ("--emphasis",), ("--max-tokens", 150), ("--store-dtype", "bfloat16"),
                ("--dtype", "bfloat16"), ("--dtype", "float16"), ("--store-dtype", "float32"),
                ("--template", "style", "--placeholder", "x", "--prompts-per-image", 3, "--seed", 5),
                ("--shuffle-tags", "--tag-drop-out", "0.5", "--keep-tags", 1, "--wildcards", "--flip")],
)  # fmt: skip
def test_what_encode_can_be_told_is_done_again(run, photos, tmp_path, check, options):
    (photos / "2.txt").write_text("a (cat:1.3), {big|small}, " + "on a sofa, " * 20)
    assert run("encode", photos, "--out", tmp_path / "c", *SMALL, *options).code == 0
    pairs, _, found = check()
    assert pairs == []
    assert found["largest_cond_difference"] < 1e-3


def test_rows_that_point_to_others_prompts_are_found(run, cache, check):
    def turn(text):
        (group,) = text.groups
        return replace(text, groups=[group.having(prompt_of=group.prompt_of[::-1].copy())])

    rewrite(cache, turn)
    assert run("verify", cache).code == 0
    pairs, details, _ = check()
    assert sorted(pairs) == [(f"{n}.png", "prompt") for n in range(4)]
    assert "'a cat on a sofa', but its caption and the recipe give 'a red house, snoo'" in details


def test_a_row_without_a_caption_is_found_and_a_prompt_of_several_images_is_named_once(run, cache, photos, check):
    (photos / "1.txt").write_text(PROMPTS[2])
    assert run("encode", photos, "--out", cache, *SMALL).code == 0
    rewrite(cache, changed("prompt_embeds", one_row(prompt_number(cache, PROMPTS[2]), torch.zeros_like)))
    assert check()[0] == [("1.png", "cond")]

    def empty(text):  # no writer leaves a row so
        (group,) = text.groups
        return replace(text, groups=[group.having(caption=[[], *list(group.caption)[1:]])])

    rewrite(cache, empty)
    assert check()[0] == [("0.png", "caption"), ("0.png", "prompt"), ("1.png", "cond")]


def test_a_recipe_that_made_other_prompts_is_found(cache, check):
    rewrite(cache, template=["a photo of [filewords]"])
    pairs, details, _ = check()
    assert sorted(pairs) == [(f"{n}.png", "prompt") for n in range(4)]
    assert "'', but its caption and the recipe give 'a photo of '" in details
    rewrite(cache, template=None, prompts_per_image=10**9)
    assert {problem for _, problem in check()[0]} == {"prompt"}


@pytest.mark.parametrize(
    "recipe",
    [{"clip_skip": "2"}, {"max_tokens": 7.5}, {"dtype": "int8"}, {"dtype": []}, {"seed": "x"}, {"template": [1]},
     {"template": []}, {"placeholder": 5}, {"tag_drop_out": None}, {"emphasis": 1}],
)  # fmt: skip
def test_a_recipe_of_other_types_is_one_line(run, cache, photos, recipe):
    rewrite(cache, **recipe)
    result = run("verify", cache, "--source", photos, "--re-encode", 1)
    assert (result.code, len(result.out.splitlines())) == (1, 2)
    assert "cache.json: not a complete manifest (" in result.out


@pytest.mark.parametrize("recipe", [{"clip_skip": 99}, {"max_tokens": 7}, {"prompts_per_image": 0}])
def test_a_recipe_that_nobody_understands_is_one_line(run, cache, photos, recipe):
    rewrite(cache, **recipe)
    result = run("verify", cache, "--source", photos, "--re-encode", 1)
    assert (result.code, len(result.err.splitlines())) == (1, 1)
    assert f"error: {cache}: its recipe does not say how prompts become cond (" in result.err


def test_a_cache_without_cond_says_nothing_of_it(run, photos, tmp_path, check):
    assert run("encode", photos, "--out", tmp_path / "c", *SMALL, "--no-cond").code == 0
    pairs, _, found = check()
    assert pairs == []
    assert "largest_cond_difference" not in found
    assert "cond encoded" not in run("verify", tmp_path / "c", "--source", photos, "--re-encode", 1).out


@pytest.mark.parametrize("name", ["sd2", "sdxl", "sd3", "flux"])
def test_families(run, photos, tmp_path, check, name):
    model, cache = make_mini(name, tmp_path).folder, tmp_path / "c"
    few = ("--max-tokens", 40) if name in ("sd3", "flux") else ()
    assert run("encode", photos, "--out", cache, "--model", model, *SIZE, *few).code == 0
    pairs, _, found = check()
    assert pairs == []
    assert found["largest_cond_difference"] < 1e-3
    embeds = [tensor for tensor in LatentDataset(cache)[0].cond if tensor != "text_ids"]
    assert len(embeds) == (1 if name == "sd2" else 2)
    for tensor in embeds:  # each of them by itself
        intact = open_manifest(Storage(cache)), {path: path.read_bytes() for path in (cache / "shards").iterdir()}
        rewrite(cache, changed(tensor, lambda cond: cond.roll(1, 0)))
        pairs, details, _ = check()
        assert len(pairs) == 4
        assert f": {tensor} " in details
        for path, data in intact[1].items():
            path.write_bytes(data)
        commit(Storage(cache), intact[0], [])
    if name == "flux":  # numbers that are no embeddings: to the last bit
        rewrite(cache, changed("text_ids", one_row((0, 0, 0), lambda value: value + 1)))
        pairs, details, _ = check()
        assert (len(pairs), "text_ids is not what is stored" in details) == (1, True)


def test_a_tensor_that_is_missing_or_of_another_shape_is_found(run, photos, tmp_path, check):
    """In all files alike: else verify finds it without a model."""
    model, cache = make_mini("sdxl", tmp_path).folder, tmp_path / "c"
    assert run("encode", photos, "--out", cache, "--model", model, *SIZE).code == 0

    def change_all(change):
        rewrite(cache, lambda text: replace(text, cond=change(text.cond)), change)

    def turn(conds):
        return {**conds, "prompt_embeds": conds["prompt_embeds"].transpose(1, 2).contiguous()}

    def join(conds):  # as many numbers, in one tensor
        return {"prompt_embeds": torch.cat([value.flatten(1) for value in conds.values()], 1)}

    change_all(turn)
    assert "prompt_embeds is [80, 77], expected [77, 80]" in check()[1]
    change_all(turn)
    change_all(join)
    assert "prompt_embeds are stored, expected prompt_embeds, pooled_prompt_embeds" in check()[1]
    change_all(lambda conds: {"prompt_embeds": conds["prompt_embeds"][:, 1:].contiguous()})
    assert "6,207 numbers for a prompt, expected 6,208" in check()[1]


def test_numbers_that_are_not_finite_when_encoded_again_are_a_problem(cache, check, monkeypatch):
    """A device on which half precision overflows."""
    encode = TextEncoder.encode
    monkeypatch.setattr(
        TextEncoder, "encode", lambda *arguments: {name: v * torch.nan for name, v in encode(*arguments).items()}
    )
    pairs, details, found = check()
    assert len(pairs) == 5
    assert details.count("prompt_embeds nan standard deviations from what is stored") == 5
    assert found["largest_cond_difference"] is None


def test_a_text_encoder_that_does_not_fit_is_one_line(run, cache, photos, monkeypatch):
    def fail(self, prompts):
        raise torch.cuda.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(TextEncoder, "encode", fail)
    result = run("verify", cache, "--source", photos, "--re-encode", 1)
    assert result.code == 1
    assert "error: --device cpu: the text encoder does not fit into its memory" in result.err.splitlines()[-1]


@pytest.mark.parametrize("name", list(TOLERANCES))
def test_another_precision_is_within_its_tolerance_and_a_letter_is_not(model, name):
    """The noise of a whole precision, of which another device or batch size makes a part."""
    facts = open_encoder(model)
    whole = TextEncoder(facts, CPU, torch.float32).encode(list(PROMPTS))["prompt_embeds"]
    found = TextEncoder(facts, CPU, getattr(torch, name)).encode(list(PROMPTS))["prompt_embeds"]
    assert max(map(difference_of, found, whole)) < TOLERANCES[name] / 5
    assert difference_of(found[0], whole[1]) > TOLERANCES[name]


def test_a_model_that_is_gone_or_another_is_one_line_and_nothing_is_compared(run, photos, tmp_path):
    model, moved, cache = make_model(tmp_path / "m"), tmp_path / "moved", tmp_path / "c"
    assert run("encode", photos, "--out", cache, "--model", model, *SIZE).code == 0

    def ask(*options):
        result = run("verify", cache, "--source", photos, "--re-encode", 1, *options)
        return result.code, result.out if result.code == 0 else result.err

    model.rename(moved)
    code, line = ask()
    assert (code, f"error: --model {model}: no such folder or file." in line) == (1, True)
    assert ask("--model", moved)[0] == 0
    shutil.copytree(moved, model)
    shutil.copytree(make_model(tmp_path / "other", seed=3) / "text_encoder", model / "text_encoder", dirs_exist_ok=True)
    code, line = ask()  # the same VAE, and another text encoder
    assert (code, len(line.splitlines())) == (1, 1)
    wanted = open_manifest(Storage(cache)).recipe.text.text_encoder
    found = open_encoder(model).digest
    assert (
        line == f"error: --model {model}: its text encoder is {found}, this cache was made with {wanted}. "
        "Give that one, or compare latents alone with --no-cond.\n"
    )
    code, out = ask("--no-cond")
    assert code == 0
    assert "cond" not in out
    shutil.rmtree(model / "text_encoder")
    code, line = ask()
    assert (code, "has no text_encoder and tokenizer folders" in line) == (1, True)
    code, line = ask("--model", moved / "vae")
    assert (code, line.endswith("so no text encoder. Give a pipeline folder, or --no-cond.\n")) == (1, True)


def test_a_cache_with_a_vae_of_its_own(run, photos, tmp_path):
    """--model is where its VAE is, as --vae is; with both, --model is where its text encoders are."""
    model, cache, file = make_model(tmp_path / "m"), tmp_path / "c", tmp_path / "vae.safetensors"
    torch.manual_seed(6)
    save_file(ldm_vae(AutoencoderKL.from_config(AutoencoderKL.load_config(model / "vae"))), file)
    assert run("encode", photos, "--out", cache, "--model", model, "--vae", file, *SIZE).code == 0

    def ask(*options):
        result = run("verify", cache, "--source", photos, "--re-encode", 1, *options)
        return "cond encoded again" in result.out if result.code == 0 else result.err

    moved, moved_vae = tmp_path / "moved", tmp_path / "moved.safetensors"
    assert ask() is True
    file.rename(moved_vae)
    assert f"--vae {file}: no such" in ask("--vae", file)
    assert ask("--model", moved_vae) is True
    assert ask("--vae", moved_vae) is True
    model.rename(moved)
    assert f"error: --model {model}: no such folder" in ask("--vae", moved_vae)
    assert "Give that one with --vae." in ask("--model", moved, "--no-cond")
    assert ask("--model", moved, "--vae", moved_vae) is True
    assert "--vae" in ask("--model", moved, "--vae", moved)


def test_a_checkpoint_s_text_encoders(run, photos, tmp_path, model):
    """As those of a folder, by its configs; see test_single_file.py for the files."""
    from tests.test_single_file import configs_of, make_sd1, unet

    folder, texts = make_sd1(tmp_path, model)
    file, cache = tmp_path / "a.safetensors", tmp_path / "c"
    save_file(ldm_vae(AutoencoderKL.from_pretrained(folder / "vae"), "first_stage_model.") | texts | unet(), file)
    configs = configs_of(folder, tmp_path / "configs")
    assert run("encode", photos, "--out", cache, "--model", file, "--config", configs, *SIZE).code == 0
    ask = ("verify", cache, "--source", photos, "--re-encode", 4)
    assert "cond encoded again: at most " in run(*ask).out
    rewrite(cache, clip_skip=2)
    assert run(*ask).code == 1
    shutil.rmtree(configs)
    assert f"error: --config {configs}: no such folder" in run(*ask).err


def test_prompts_are_taken_from_the_shards_of_the_chosen_images(run, photos, tmp_path):
    cache = tmp_path / "c"
    assert run("encode", photos, "--out", cache, *SMALL, "--shard-size", "1kB").code == 0
    storage = Storage(cache)
    manifest = open_manifest(storage)
    assert len(manifest.shards) == 4
    rewrite(cache, changed("prompt_embeds", torch.zeros_like))
    source = find_text(manifest, None, None)
    for count in range(1, 5):
        problems, _ = reencode_text(storage, manifest, source, count, seed=1, device="cpu")
        assert len({problem.name for problem in problems}) == count
    with pytest.raises(UserError, match="--device tpu: expected auto"):
        reencode_text(storage, manifest, source, 1, seed=0, device="tpu")
    assert Path(manifest.made_with.source) == photos


def test_one_wrong_token_counts_however_many_there_are():
    fresh = torch.randn(333, 64, generator=torch.Generator().manual_seed(0))
    stored = fresh.clone()
    stored[200] = 0
    assert 0.8 < difference_of(fresh, stored) < 1.2
    assert difference_of(fresh * 50, stored * 50) == pytest.approx(difference_of(fresh, stored))
    assert difference_of(fresh[0], fresh[1]) > 1
    assert difference_of(torch.zeros(3, 4), torch.ones(3, 4)) == 1  # without deviation: the difference itself


def test_the_largest_difference_is_of_all_tensors():
    fresh = {"prompt_embeds": torch.randn(9, 8), "pooled_prompt_embeds": torch.randn(8)}
    for name in fresh:
        worst, wrong = compare_cond(fresh, {**fresh, name: fresh[name] + 1}, 0.1)
        assert worst == pytest.approx(1 / float(fresh[name].std()), rel=1e-3)
        assert wrong.startswith(f"{name} ")
    assert compare_cond(fresh, fresh, 0.1) == (0.0, "")


@pytest.mark.parametrize("name", ["prompt_embeds", "prompt_embeds_2", "prompt_embeds_t5", "prompt_embeds_llama3"])
def test_embeddings_of_every_name_may_differ_by_rounding(name):
    fresh = {name: torch.randn(9, 8), f"{name}_mask": torch.ones(9), "text_ids": torch.zeros(9, 3)}
    worst, wrong = compare_cond(fresh, {**fresh, name: fresh[name] + 1e-5}, 0.003)
    assert (0 < worst < 0.001, wrong) == (True, "")
    assert compare_cond(fresh, {**fresh, name: fresh[name] + 1}, 0.003)[1].startswith(f"{name} ")
    for exact in (f"{name}_mask", "text_ids"):
        assert compare_cond(fresh, {**fresh, exact: fresh[exact] + 1e-5}, 0.003)[1] == f"{exact} is not what is stored"


def test_cond_of_another_dtype_is_found_without_encoding(run, cache):
    rewrite(cache, changed("prompt_embeds", lambda cond: cond.to(torch.bfloat16)))
    result = run("verify", cache)
    assert result.code == 1
    assert "cond/prompt_embeds: torch.bfloat16, expected float16" in result.out


def test_a_shard_whose_cond_has_another_width_is_not_read_with_the_others(run, photos, tmp_path):
    assert run("encode", photos, "--out", tmp_path / "c", *SMALL, "--shard-size", "30kB").code == 0
    texts = []

    def narrow(text):
        texts.append(text)
        cond = text.cond["prompt_embeds"]
        return replace(text, cond={"prompt_embeds": cond[..., :-1].contiguous() if len(texts) == 2 else cond.clone()})

    rewrite(tmp_path / "c", narrow)
    assert len(texts) > 1
    data = LatentDataset(tmp_path / "c")
    with pytest.raises(UserError, match="this shard and its text do not fit the others"):
        list(map(data.__getitem__, range(len(data))))


@pytest.mark.slow
def test_verify_takes_the_images_that_the_cache_took(run, tmp_path):
    """Whatever --max-megapixels it was made with: verify has none."""
    (tmp_path / "photos").mkdir()
    gradient(80, 64).resize((14_000, 13_500)).convert("1").save(tmp_path / "photos" / "large.png")
    command = ("encode", tmp_path / "photos", "--out", tmp_path / "c", *SMALL, "--no-cond")
    assert run(*command, "--max-megapixels", 200).code == 0
    limit_pixels(180_000_000)
    result = run("verify", tmp_path / "c", "--source", tmp_path / "photos", "--re-encode", 1)
    assert (result.code, "nothing wrong" in result.out) == (0, True)
