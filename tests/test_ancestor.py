"""latentprep.personalized as stable-diffusion-webui used its ancestor: its conditioner, half precision, restarts."""

import os
import random
from collections import Counter
from contextlib import nullcontext
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL
from torch.utils.data import DataLoader

from latentprep import LatentDataset
from latentprep.cache.lock import hold
from latentprep.cache.storage import Storage
from latentprep.errors import UserError
from latentprep.personalized import BatchLoader, PersonalizedBase, PersonalizedDataLoader
from latentprep.personalized.fingerprint import NUM_PROBED, is_same, probe_image, recognize
from latentprep.personalized.models import LiveText, make_live_vae
from latentprep.personalized.update import keywords_for_options
from tests.conftest import SMALL, TINY, gradient
from tests.test_personalized import LatentDiffusion, ancestors_latents

WIDTH = 6


@pytest.fixture(scope="module")
def vae():
    return AutoencoderKL.from_pretrained(TINY / "vae").float().eval()


def web_uis_conditioner(prompts):
    """[B,77n,6]: 77 tokens for each 75 words of the longest prompt of the call."""
    lists = [[hash_of(word) for word in prompt.split()] for prompt in prompts]
    chunks = max(1, max(-(-len(words) // 75) for words in lists))
    rows = [torch.tensor([*words, *[0.5] * (chunks * 77 - len(words))]) for words in lists]
    return torch.stack(rows)[:, :, None].expand(-1, -1, WIDTH).clone()


def hash_of(word):
    return float(sum(map(ord, word)) % 97) + 1


def stack_conds(conds):
    """What the web UI's training loop does with batch.cond."""
    longest = max(len(cond) for cond in conds)
    rows = [torch.vstack([cond, cond[-1:].repeat(longest - len(cond), 1)]) for cond in conds]
    return torch.stack(rows)


def base(images, vae, **options):
    return PersonalizedBase(images, 64, 64, **{"repeats": 1, "flip_p": 0, "model": LatentDiffusion(vae), **options})


# --- prompts of several lengths


def test_each_prompt_has_the_cond_that_it_has_alone(images, vae, tmp_path):
    (images / "tall0.txt").write_text("word " * 100)
    options = {"cond_model": web_uis_conditioner, "include_cond": True, "store_dtype": "float32"}
    data = base(images, vae, **options)
    shapes = Counter()
    for n in range(8):
        entry = data[n]
        assert torch.equal(entry.cond, web_uis_conditioner([entry.cond_text])[0])
        shapes[tuple(entry.cond.shape)] += 1
    assert shapes == {(77, WIDTH): 7, (154, WIDTH): 1}
    for batch in PersonalizedDataLoader(data, batch_size=3):
        alone = [web_uis_conditioner([text])[0] for text in batch.cond_text]
        assert list(map(len, batch.cond)) == list(map(len, alone))
        assert torch.equal(stack_conds(batch.cond), stack_conds(alone))

    # a longer caption makes its own cond anew, and no other
    (images / "tall1.txt").write_text("word " * 200)
    calls = []
    data = base(
        images,
        vae,
        **{**options, "cond_model": lambda prompts: (calls.append(prompts), web_uis_conditioner(prompts))[1]},
    )
    assert sum(len(prompts) for prompts in calls) == 2  # the probe and that caption
    assert {len(data[n].cond) for n in range(8)} == {77, 154, 231}


def test_a_latent_dataset_pads_as_the_web_ui_does(images, vae):
    (images / "tall0.txt").write_text("word " * 100)
    base(images, vae, cond_model=web_uis_conditioner, include_cond=True, cache=images.parent / "c")
    data = LatentDataset(images.parent / "c", latent_sampling_method="deterministic")
    batch = data.__getitems__(list(range(8)))
    assert sorted(batch.cond_lengths["prompt_embeds"].tolist()) == [77] * 7 + [154]
    wanted = stack_conds([web_uis_conditioner([text])[0] for text in batch.cond_text])
    assert torch.equal(batch.cond["prompt_embeds"], wanted)
    assert data.uncond()["prompt_embeds"].shape == (1, 77, WIDTH)
    dropped = LatentDataset(images.parent / "c", latent_sampling_method="deterministic", caption_dropout=1.0)
    assert torch.equal(dropped[0].cond["prompt_embeds"], data.uncond()["prompt_embeds"])
    assert dropped[0].cond_text == [""]


# --- half precision


class HalfModel(torch.nn.Module):
    """The ancestor's LatentDiffusion after .half(): a VAE in half precision, and a UNet beside it."""

    def __init__(self, vae, dtype, unet_seed=0):
        super().__init__()
        self.first_stage_model = AutoencoderKL.from_config(vae.config)
        self.first_stage_model.load_state_dict(vae.state_dict())
        torch.manual_seed(unet_seed)
        self.unet = torch.nn.Linear(3, 3)
        self.to(dtype)
        self.eval()

    def encode_first_stage(self, images):
        return self.first_stage_model.encode(images).latent_dist

    def get_first_stage_encoding(self, posterior):
        z = posterior if isinstance(posterior, torch.Tensor) else posterior.sample()
        return self.first_stage_model.config.scaling_factor * z


def unscaled(model):
    """Its VAE for ancestors_latents: the ancestor scaled in half precision, a cache scales in float32."""
    return SimpleNamespace(encode=model.first_stage_model.encode, config=SimpleNamespace(scaling_factor=1))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_vae_in_half_precision_gives_what_it_gave_under_autocast(images, vae, dtype):
    model = HalfModel(vae, dtype)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(RuntimeError), torch.no_grad():
        model.encode_first_stage(torch.zeros(1, 3, 64, 64))
    data = base(images, vae, model=model, latent_sampling_method="deterministic", store_dtype="float32")
    entry = data[2]
    with torch.autocast("cpu", dtype=dtype):
        wanted = ancestors_latents(unscaled(model), entry.filename, 64, 64).float()
    assert torch.equal(entry.latent_sample, wanted * np.float32(vae.config.scaling_factor))
    exact = ancestors_latents(vae, entry.filename, 64, 64)
    assert (entry.latent_sample - exact).abs().max() > 1e-3
    after = model.state_dict()
    assert all(torch.equal(before[name], after[name]) and after[name].dtype == dtype for name in before)


@pytest.mark.slow
def test_what_overflows_in_half_precision_is_encoded_in_float32(images, vae):
    class Overflows(HalfModel):
        def encode_first_stage(self, images):
            posterior = super().encode_first_stage(images)
            if self.first_stage_model.quant_conv.weight.dtype == torch.float16:
                posterior.mean = posterior.mean * torch.inf
            return posterior

    model = Overflows(vae, torch.float16)
    data = base(images, vae, model=model, latent_sampling_method="deterministic", store_dtype="float32")
    rounded = AutoencoderKL.from_config(vae.config)
    rounded.load_state_dict({name: value.half().float() for name, value in vae.state_dict().items()})
    entry = data[0]
    wanted = ancestors_latents(rounded, entry.filename, 64, 64)
    assert torch.allclose(entry.latent_sample, wanted, atol=1e-4)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float16}
    model.train()
    model.encode_first_stage(torch.zeros(1, 3, 64, 64).half()).mean.float().nan_to_num().sum().backward()


def test_the_callers_own_autocast_stays(images, vae):
    model = HalfModel(vae, torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        data = base(images, vae, model=model, latent_sampling_method="deterministic", store_dtype="float32")
        wanted = ancestors_latents(unscaled(model), data[1].filename, 64, 64).float()
    assert data.data.manifest.recipe.latents.dtype == "bfloat16"
    assert torch.equal(data[1].latent_sample, wanted * np.float32(vae.config.scaling_factor))


def test_weights_of_another_kind_are_refused(images, vae):
    with pytest.raises(UserError, match=r"model: its weights are torch.float64, expected one of float32, float16"):
        base(images, vae, model=HalfModel(vae, torch.float64))


# --- what is behind the models


def test_another_encoder_behind_the_same_function_is_noticed(images, vae):
    behind = {"add": 0.0}

    def cond_model(prompts):
        return web_uis_conditioner(prompts) + behind["add"] * torch.arange(WIDTH)

    options = {"cond_model": cond_model, "include_cond": True, "store_dtype": "float32"}
    first = base(images, vae, **options)[0]
    behind["add"] = 100.0
    entry = base(images, vae, **options)[0]
    assert torch.equal(entry.cond, cond_model([entry.cond_text])[0])
    assert not torch.equal(entry.cond, first.cond)


def test_another_clip_skip_is_noticed(images, vae, model):
    from transformers import CLIPTextModel, CLIPTokenizer

    encoder = CLIPTextModel.from_pretrained(model / "text_encoder").eval()
    tokenizer = CLIPTokenizer.from_pretrained(model / "tokenizer")
    settings = SimpleNamespace(clip_skip=1)

    class Conditioner(torch.nn.Module):  # its weights are the same, whatever the setting
        def __init__(self):
            super().__init__()
            self.encoder = encoder

        def forward(self, prompts):
            ids = tokenizer(prompts, padding="max_length", truncation=True, return_tensors="pt").input_ids
            hidden = self.encoder(ids, output_hidden_states=True).hidden_states
            return hidden[-settings.clip_skip]

    options = {"cond_model": Conditioner(), "include_cond": True, "store_dtype": "float32"}
    found = {}
    for settings.clip_skip in (1, 2):
        entry = base(images, vae, **options)[0]
        with torch.no_grad():
            found[settings.clip_skip] = options["cond_model"]([entry.cond_text])[0]
        assert torch.equal(entry.cond, found[settings.clip_skip])
    assert not torch.equal(found[1], found[2])


def test_another_vae_behind_the_same_class_is_noticed(images, vae):
    other = AutoencoderKL.from_config(vae.config)
    base(images, vae)
    with pytest.raises(UserError, match=r"another recipe.* Give another cache, .* or overwrite=True to start anew"):
        base(images, other.eval())
    base(images, vae)  # and the first is still there


def test_another_version_has_everything_encoded_again(images, vae, capsys):
    options = {"cond_model": web_uis_conditioner, "include_cond": True}
    base(images, vae, **options)
    calls = []

    def cond_model(prompts):
        calls.extend(prompts)
        return web_uis_conditioner(prompts)

    model = LatentDiffusion(vae)
    base(images, vae, model=model, cond_model=cond_model, include_cond=True, version="2")
    assert (10**9 - model.left, len(calls)) == (1 + 8, 1 + 8 + 1)  # the probe; images, prompts and the empty one
    capsys.readouterr()
    base(images, vae, **options, version="2")
    assert "Preparing" not in capsys.readouterr().out
    with pytest.raises(UserError, match="another recipe"):  # another VAE is refused all the same
        base(images, AutoencoderKL.from_config(vae.config), **options, version="3")


def test_each_part_of_a_models_key_counts_by_itself(vae):
    class Conditioner(torch.nn.Module):
        def __init__(self, weight):
            super().__init__()
            self.weight = torch.nn.Parameter(torch.tensor(weight))

        def forward(self, prompts):
            return web_uis_conditioner(prompts)

    def text(cond_model, version=""):
        return LiveText(cond_model, torch.device("cpu"), nullcontext).facts(version).digest

    def of_vae(model, version=""):
        return make_live_vae(model, None)[0].facts(version).digest

    digests = [
        text(web_uis_conditioner), text(web_uis_conditioner, "2"), text(Conditioner(1.0)), text(Conditioner(2.0)),
        text(lambda prompts: web_uis_conditioner(prompts)[:, :76]), text(lambda prompts: -web_uis_conditioner(prompts)),
    ]  # fmt: skip
    assert not any(is_same(a, b) for n, a in enumerate(digests) for b in digests[:n])
    assert is_same(text(Conditioner(1.0)), text(Conditioner(1.0)))
    other_scale = HalfModel(vae, torch.float32)
    other_scale.get_first_stage_encoding = lambda posterior: 0.5 * posterior
    digests = [of_vae(HalfModel(vae, torch.float32)), of_vae(HalfModel(vae, torch.float32), "2"), of_vae(other_scale)]
    assert not any(is_same(a, b) for n, a in enumerate(digests) for b in digests[:n])


def test_a_conditioner_runs_under_the_autocast_of_the_vae(images, vae):
    layer = torch.nn.Linear(WIDTH, WIDTH)

    def cond_model(prompts):
        return layer(web_uis_conditioner(prompts))

    options = {"cond_model": cond_model, "include_cond": True, "store_dtype": "float32"}
    entry = base(images, vae, model=HalfModel(vae, torch.bfloat16), **options)[0]
    with torch.autocast("cpu", dtype=torch.bfloat16), torch.no_grad():
        assert torch.equal(entry.cond, cond_model([entry.cond_text])[0].float())
    with torch.no_grad():
        assert not torch.equal(entry.cond, cond_model([entry.cond_text])[0])


def test_another_checkpoint_with_the_same_vae_has_the_same_cache(images, vae, capsys):
    base(images, vae, model=HalfModel(vae, torch.float32, unet_seed=1))
    capsys.readouterr()

    class AnotherName(HalfModel):
        pass

    other = AnotherName(vae, torch.float32, unet_seed=2)
    with torch.no_grad():
        other.first_stage_model.decoder.conv_out.bias.add_(1)  # the decoder never runs
    base(images, vae, model=other)
    assert "Preparing" not in capsys.readouterr().out
    with torch.no_grad():
        other.first_stage_model.quant_conv.bias.add_(1e-6)  # too little for a probe: its weights tell
    with pytest.raises(UserError, match="another recipe"):
        base(images, vae, model=other)


def test_a_probe_bears_the_noise_of_another_device(images, vae, capsys):
    data = base(images, vae, cond_model=web_uis_conditioner, include_cond=True)
    capsys.readouterr()

    class Noisy(LatentDiffusion):
        def encode_first_stage(self, images):
            posterior = super().encode_first_stage(images)
            posterior.mean = posterior.mean * (1 + 1e-3 * torch.randn_like(posterior.mean))
            return posterior

    def noisy(prompts):
        cond = web_uis_conditioner(prompts)
        return cond * (1 + 1e-3 * torch.randn_like(cond))

    again = base(images, vae, model=Noisy(vae), cond_model=noisy, include_cond=True)
    assert "Preparing" not in capsys.readouterr().out
    assert again.data.manifest.recipe == data.data.manifest.recipe


def test_fingerprints():
    assert probe_image().shape == (1, 64, 64, 3)
    assert probe_image().dtype == np.uint8
    assert len(np.unique(probe_image())) > 200

    def of(numbers):
        return "name.version." + np.array(numbers, "<f4").tobytes().hex()

    one = of([1.0] * NUM_PROBED)
    for dtype, near, far in ((torch.float32, 1.004, 1.006), (torch.float16, 1.009, 1.02), (torch.bfloat16, 1.02, 1.04)):
        assert is_same(one, of([near] * NUM_PROBED), dtype)
        assert not is_same(one, of([far] * NUM_PROBED), dtype)
    assert not is_same(one, of([1.02] * NUM_PROBED))
    for other in ("", "name", "name.", "name.zz", "other" + one[4:], one[:-2], one + "00", of([np.nan] * NUM_PROBED)):
        assert not is_same(one, other), other
    near = of([1.001] * NUM_PROBED)
    assert recognize(one, [None, "x", near], torch.float32) == near
    assert recognize(one, [None, "x"], torch.float32) == one


@pytest.mark.parametrize("kind", ["model", "cond_model"])
def test_a_model_that_gives_no_numbers_is_refused_at_once(images, vae, kind):
    class Broken(LatentDiffusion):
        def encode_first_stage(self, images):
            posterior = super().encode_first_stage(images)
            posterior.mean = posterior.mean * torch.nan
            return posterior

    options = {
        "model": {"model": Broken(vae)},
        "cond_model": {"cond_model": lambda prompts: torch.full((1, 77, 6), torch.nan), "include_cond": True},
    }
    with pytest.raises(UserError, match=f"{kind}: gives n"):
        base(images, vae, **options[kind])
    assert not (images.parent / "images.64x64.latents").exists()


# --- starts, epochs, repetitions


def orders_of(loader, num_epochs):
    return [[text for batch in loader for text in batch.cond_text] for _ in range(num_epochs)]


def test_each_start_has_an_order_and_draws_of_its_own(images, vae):
    starts = [base(images, vae, latent_sampling_method=method) for method in ("once", "random", "once", "random")]
    firsts = [orders_of(PersonalizedDataLoader(data), 1)[0] for data in starts]
    assert len(set(map(tuple, firsts))) > 1
    assert all(sorted(order) == sorted(firsts[0]) for order in firsts)
    assert not torch.equal(starts[0][0].latent_sample, starts[2][0].latent_sample)
    seeded = [base(images, vae, seed=7) for _ in range(2)]
    assert torch.equal(seeded[0][0].latent_sample, seeded[1][0].latent_sample)
    one, other = (orders_of(PersonalizedDataLoader(data), 2) for data in seeded)
    assert one == other
    assert one[0] != one[1]


def test_short_starts_see_every_image_in_the_end(images, vae):
    seen = set()
    for _ in range(40):  # of 3 batches each
        for number, batch in enumerate(PersonalizedDataLoader(base(images, vae))):
            if number == 3:
                break
            seen.update(batch.cond_text)
    assert len(seen) == 8


@pytest.mark.parametrize("seed", [None, 3])
def test_a_loop_goes_on_in_mid_epoch_in_another_process(images, vae, seed):
    def start():
        data = base(images, vae, seed=seed, latent_sampling_method="random", shuffle_tags=True)
        return PersonalizedDataLoader(data, batch_size=3)

    def record(batch):
        return batch.cond_text, batch.latent_sample

    loader = start()
    wanted = []
    for epoch in range(3):
        for number, batch in enumerate(loader):
            if epoch == 1 and number == 1:
                state = loader.state_dict()
            elif (epoch, number) > (1, 1):
                wanted.append(record(batch))
    again = start()
    again.load_state_dict(state)
    found = [record(batch) for _ in range(2) for batch in again]
    assert [texts for texts, _ in found] == [texts for texts, _ in wanted]
    assert all(torch.equal(a, b) for (_, a), (_, b) in zip(found, wanted, strict=True))
    again.load_state_dict(loader.state_dict())  # at the end of an epoch
    following = [[batch.cond_text for batch in one] for one in (loader, again)]
    assert following[0] == following[1]
    other = PersonalizedDataLoader(base(images, vae, seed=99), batch_size=3)
    with pytest.raises(UserError, match="saved with seed="):
        other.load_state_dict(state)


def test_an_own_loader_draws_afresh_in_every_epoch(images, vae):
    (images / "tall0.txt").write_text("one, two, three, four, five")
    data = base(images, vae, latent_sampling_method="random", shuffle_tags=True, tag_drop_out=0.1)
    draws, texts = [], set()
    for workers in (0, 0, 1, 1):
        (entry,) = [
            entry
            for batch in DataLoader(data, batch_size=1, num_workers=workers, collate_fn=list)
            for entry in batch
            if entry.filename.endswith("tall0.png")
        ]
        draws.append(entry.latent_sample)
        texts.add(entry.cond_text)
    assert len(texts) > 1
    assert all(not torch.equal(draws[a], draws[b]) for a in range(4) for b in range(a))
    batch = next(iter(DataLoader(data, batch_size=4, collate_fn=BatchLoader)))
    assert batch.latent_sample.shape == (4, 4, 8, 8)


def test_repetitions_have_draws_tags_and_flips_of_their_own(images, vae):
    (images / "tall0.txt").write_text(", ".join(map(str, range(12))))
    options = {"repeats": 40, "latent_sampling_method": "random", "shuffle_tags": True, "batch_size": 100}
    data = base(images, vae, flip_p=0.5, **options)
    assert len(data) == data.length == 320
    assert (data.batch_size, data.gradient_step) == (100, 1)
    assert len(data.dataset) == len(data.image_paths) == 8
    (group,) = data.groups
    assert sorted(group) == list(range(320))
    counts, texts, draws = Counter(), [], []
    for batch in PersonalizedDataLoader(data, batch_size=data.batch_size):
        for text, sample in zip(batch.cond_text, batch.latent_sample, strict=True):
            if text.count(",") == 11:
                texts.append(text)
                draws.append(sample)
            counts[",".join(sorted(text.split(", ")))] += 1
    assert set(counts.values()) == {40}
    assert len(set(texts)) == 40
    assert len({sample.numpy().tobytes() for sample in draws}) == 40


def test_the_signature_is_the_ancestors(images, vae):
    data = PersonalizedBase(images, 64, 64, model=vae, latent_sampling_method="deterministic", seed=0)
    assert len(data) == 800
    plain = base(images, vae, model=vae, latent_sampling_method="deterministic")
    wanted = {entry.cond_text: entry.latent_sample for entry in plain.dataset}
    found = {text: [] for text in wanted}
    for batch in PersonalizedDataLoader(data, batch_size=100):
        for text, sample in zip(batch.cond_text, batch.latent_sample, strict=True):
            found[text].append(torch.equal(sample, wanted[text]))
    assert {len(own) for own in found.values()} == {100}
    assert all(30 <= sum(own) <= 70 for own in found.values())  # four standard deviations of a coin


# --- stops, places, attributes


def test_a_stop_that_the_caller_asks_for_keeps_what_is_done(images, vae):
    for n in range(20):
        gradient(40 + n, 64).save(images / f"more{n}.png")
    calls = []

    def interrupted():
        calls.append(None)
        return len(calls) > 10

    model = LatentDiffusion(vae)
    with pytest.raises(UserError, match="interrupted: what is encoded stays"):
        base(images, vae, model=model, interrupted=interrupted)
    done = 10**9 - model.left - 1
    assert 0 < done < 28
    again = LatentDiffusion(vae)
    assert len(base(images, vae, model=again, interrupted=lambda: False)) == 28
    assert 10**9 - again.left - 1 <= 28 - done + 1
    assert len(base(images, vae, interrupted=lambda: True)) == 28  # there is nothing to encode, and nothing to stop


def test_an_image_keeps_its_line_of_a_template(images, vae, tmp_path, capsys):
    (tmp_path / "lines.txt").write_text("".join(f"line {n} of [filewords]\n" for n in range(50)))
    options = {"template_file": tmp_path / "lines.txt", "cond_model": web_uis_conditioner, "include_cond": True}
    first = [entry.cond_text for entry in base(images, vae, **options).dataset]
    assert len({text.split(" of ")[0] for text in first}) > 1
    capsys.readouterr()
    assert [entry.cond_text for entry in base(images, vae, **options).dataset] == first
    assert "Preparing" not in capsys.readouterr().out


def test_what_a_start_that_failed_has_done_is_known_again(images, vae):
    def fails(prompts):
        if "picture number 2" in prompts:
            raise RuntimeError("boom")
        return web_uis_conditioner(prompts)

    class Noisy(LatentDiffusion):
        def encode_first_stage(self, images):
            posterior = super().encode_first_stage(images)
            posterior.mean = posterior.mean * (1 + 1e-3 * torch.randn_like(posterior.mean))
            return posterior

    with pytest.raises(UserError, match="RuntimeError: boom"):
        base(images, vae, cond_model=fails, include_cond=True)
    model = Noisy(vae)
    assert len(base(images, vae, model=model, cond_model=web_uis_conditioner, include_cond=True)) == 8
    assert 10**9 - model.left == 1  # the probe: all latents were there

    def stops(prompts):
        if "picture number 2" in prompts:
            raise KeyboardInterrupt
        return web_uis_conditioner(prompts)

    cache = images.parent / "other"  # which has no manifest then
    with pytest.raises(KeyboardInterrupt):
        base(images, vae, cond_model=stops, include_cond=True, cache=cache)
    assert not (cache / "cache.json").exists()
    model = Noisy(vae)
    assert len(base(images, vae, model=model, cond_model=web_uis_conditioner, include_cond=True, cache=cache)) == 8
    assert 10**9 - model.left == 1


def test_skipped_images_are_counted_out_loud(images, vae, capsys):
    (images / "bad.png").write_bytes(b"no image")
    assert len(base(images, vae)) == 8
    assert "1 image skipped: " in capsys.readouterr().out


def test_a_place_that_cannot_be_written_names_the_argument(images, vae, monkeypatch):
    def refuse(*_args, **_options):
        raise OSError(30, "Read-only file system")

    monkeypatch.setattr(os, "mkdir", refuse)
    with pytest.raises(UserError, match=r"Give another cache\."):
        base(images, vae)


def test_no_folder_is_not_this_folder(images, vae, monkeypatch):
    monkeypatch.chdir(images)
    for nothing in ("", None):
        with pytest.raises(UserError, match="data_root: is empty, expected a folder of images"):
            PersonalizedBase(nothing, 64, 64, model=vae)


def test_another_folder_is_refused_in_words_of_python(images, vae, tmp_path):
    base(images, vae, cache=tmp_path / "c")
    other = tmp_path / "other"
    other.mkdir()
    gradient(50, 60).save(other / "a.png")
    with pytest.raises(UserError, match=r"Give another cache, or allow_gone=True"):
        base(other, vae, cache=tmp_path / "c")
    assert len(base(other, vae, cache=tmp_path / "c", allow_gone=True)) == 1


def test_latents_can_be_stored_in_float32(images, vae):
    data = base(images, vae, store_dtype="float32", latent_sampling_method="deterministic")
    wanted = ancestors_latents(vae, data[3].filename, 64, 64)
    assert torch.allclose(data[3].latent_sample, wanted, atol=1e-5)


def test_what_the_ancestors_entries_and_dataset_had(images, vae):
    data = PersonalizedBase(images, varsize=True, repeats=2, flip_p=0, model=vae, latent_sampling_method="random")
    entry = data[0]
    assert isinstance(entry.filename, str)
    assert entry.latent_dist.mean.shape == (1, *entry.latent_sample.shape)
    scale = vae.config.scaling_factor
    z = (entry.latent_sample / scale - entry.latent_dist.mean[0]) / entry.latent_dist.std[0]
    assert 0.5 < float(z.std()) < 1.5
    assert entry.latent_dist.sample().shape == entry.latent_dist.mode().shape
    assert base(images, vae)[0].latent_dist is None
    assert sorted(map(len, data.groups)) == [8, 8]
    shapes = [{tuple(data[n].latent_sample.shape) for n in group} for group in data.groups]
    assert sorted(map(list, shapes)) == [[(4, 5, 16)], [(4, 10, 8)]]
    assert sorted(data.image_paths) == sorted(
        str(path) for path in images.glob("*.*") if path.suffix in (".png", ".jpg", ".webp")
    )
    for group in data.groups:
        random.shuffle(group)  # as GroupedBatchSampler does
        assert len(list(DataLoader(data, batch_sampler=[group[:3], group[3:6]], collate_fn=BatchLoader))) == 2


def test_flips_that_are_there_stay(images, vae, capsys):
    base(images, vae, flip_p=0.5)
    capsys.readouterr()
    data = base(images, vae, flip_p=0)
    assert "Preparing" not in capsys.readouterr().out
    assert data.data.flip_p == 0


# --- what a start leaves alone


def test_a_stop_in_the_first_shard_is_gone_on_from_on_another_device(images, vae):
    for n in range(20):
        gradient(40 + n, 64).save(images / f"more{n}.png")
    model, calls = LatentDiffusion(vae), []
    with pytest.raises(UserError, match="interrupted"):
        base(images, vae, model=model, flip_p=0.5, interrupted=lambda: (calls.append(0), len(calls) > 10)[1])

    class Noisy(LatentDiffusion):
        def encode_first_stage(self, images):
            posterior = super().encode_first_stage(images)
            posterior.mean = posterior.mean * (1 + 1e-4 * torch.randn_like(posterior.mean))
            return posterior

    done = 10**9 - model.left - 1
    again = Noisy(vae)
    data = base(images, vae, model=again, flip_p=0)
    assert len(data) == 28
    assert data.data.manifest.latent.views == ("plain", "flipped")
    assert 0 < done <= 10**9 - 1 - again.left + done <= 2 * 28 + 2  # one batch at most is encoded twice


def test_a_stop_is_asked_for_once(images, vae):
    asked = iter([False] * 3 + [True])  # an event that clears itself
    with pytest.raises(UserError, match="interrupted"):
        base(images, vae, interrupted=lambda: next(asked, False))


def test_a_stop_between_prompts(images, vae):
    prompts = []

    def cond_model(texts):
        prompts.extend(texts)
        return web_uis_conditioner(texts)

    with pytest.raises(UserError, match="interrupted"):
        base(images, vae, cond_model=cond_model, include_cond=True, interrupted=lambda: len(prompts) >= 4)
    assert len(prompts) == 4


def test_ctrl_c_stays_what_it_is(images, vae):
    class Stops(LatentDiffusion):
        def encode_first_stage(self, images):
            if self.left < 10**9 - 2:
                raise KeyboardInterrupt
            return super().encode_first_stage(images)

    with pytest.raises(KeyboardInterrupt):
        base(images, vae, model=Stops(vae), interrupted=lambda: False)


@pytest.mark.parametrize("options", [{"shuffle_tags": True}, {"include_cond": False}])
def test_cond_that_one_start_does_not_ask_for_stays(images, vae, capsys, options):
    calls = []

    def cond_model(texts):
        calls.extend(texts)
        return web_uis_conditioner(texts)

    base(images, vae, cond_model=cond_model, include_cond=True)
    base(images, vae, **{"cond_model": cond_model, "include_cond": True, **options})
    capsys.readouterr()
    del calls[:]
    assert base(images, vae, cond_model=cond_model, include_cond=True)[0].cond is not None
    assert (len(calls), capsys.readouterr().out) == (1, "")  # the probe
    base(images, vae)
    assert "its cond is dropped, since there is no cond_model" in capsys.readouterr().out


def test_a_finished_cache_needs_no_lock(images, vae):
    base(images, vae)
    with hold(Storage(f"{images}.64x64.latents")):
        assert len(base(images, vae)) == 8
        gradient(50, 60).save(images / "new.png")
        with pytest.raises(UserError, match="another latentprep run is writing"):
            base(images, vae)


def test_a_state_that_is_refused_changes_nothing(images, vae):
    state = PersonalizedDataLoader(base(images, vae), batch_size=2).state_dict()
    loader = PersonalizedDataLoader(base(images, vae, repeats=2), batch_size=3)
    before = loader.state_dict(), loader.dataset.seed, loader.dataset.data.seed
    with pytest.raises(UserError, match="saved with num_samples=8"):
        loader.load_state_dict(state)
    assert before == (loader.state_dict(), loader.dataset.seed, loader.dataset.data.seed)


def test_two_loops_over_one_loader_do_not_mix(images, vae):
    loader = PersonalizedDataLoader(base(images, vae, seed=1))
    alone = orders_of(PersonalizedDataLoader(base(images, vae, seed=1)), 2)
    both = list(zip(iter(loader), iter(loader), strict=True))
    assert [[batch.cond_text[0] for batch in own] for own in zip(*both, strict=True)] == alone


# --- arguments


def test_numpys_numbers_are_numbers(images, vae, tmp_path):
    (tmp_path / "lines.txt").write_text("a [filewords]\nb [filewords]\n")
    data = base(images, vae, seed=np.int64(3), repeats=np.int64(2), template_file=tmp_path / "lines.txt")
    assert len(data) == 16
    assert len(PersonalizedBase(images, np.int64(64), np.int32(64), 1, np.float32(0), model=LatentDiffusion(vae))) == 8
    for options in ({"width": 64.0}, {"height": "64"}, {"width": 0}):
        with pytest.raises(UserError, match="expected"):
            PersonalizedBase(images, **{"width": 64, "height": 64, **options}, model=LatentDiffusion(vae))


def test_a_cache_has_a_place_of_its_own(images, vae, monkeypatch):
    monkeypatch.chdir(images)
    data = PersonalizedBase(".", 64, 64, 1, model=LatentDiffusion(vae))
    assert data.cache == f"{images}.64x64.latents"
    assert sorted(data.image_paths)[0] == "./tall0.png"
    with pytest.raises(UserError, match=r"is the image folder itself\. Give the cache a folder of its own"):
        base(images, vae, cache=images)
    with pytest.raises(UserError, match=r"cannot lie beside it\. Say where it goes: cache="):
        PersonalizedBase("/", 64, 64, model=LatentDiffusion(vae))


def test_a_pipeline_of_another_kind_is_refused(images, vae):
    class FluxPipeline:
        def encode_prompt(self, prompt, prompt_2=None, device=None, num_images_per_prompt=1):
            raise AssertionError

    with pytest.raises(UserError, match="cond_model: a FluxPipeline, expected a pipeline of Stable Diffusion 1 or 2"):
        base(images, vae, cond_model=FluxPipeline(), include_cond=True)


def test_words_of_the_command_line_become_keywords():
    said = "--out /a/SOURCE/--out.b: --width 60, SOURCE /x. Give another --out."
    wanted = r"^cache /a/SOURCE/--out.b: width 60, data_root /x. Give another cache.$"
    with pytest.raises(UserError, match=wanted), keywords_for_options():
        raise UserError(said)


def test_a_vae_that_cuts_tiles_is_another(vae):
    other = AutoencoderKL.from_config(vae.config)
    other.load_state_dict(vae.state_dict())
    plain, same = (make_live_vae(each, None)[0].facts("").digest for each in (vae, other))
    other.enable_tiling()
    assert is_same(plain, same)
    assert not is_same(plain, make_live_vae(other, None)[0].facts("").digest)


def test_a_method_shows_the_weights_of_what_it_is_of():
    class Conditioner(torch.nn.Module):
        def __init__(self, weight):
            super().__init__()
            self.weight = torch.nn.Parameter(torch.tensor(weight))

        def encode(self, prompts):
            return web_uis_conditioner(prompts)

    one, other = (
        LiveText(Conditioner(w).encode, torch.device("cpu"), nullcontext).facts("").digest for w in (1.0, 1.001)
    )
    assert not is_same(one, other)


BAD = [
    *({"flip_p": p} for p in (2, -1, "x", None, True, float("nan"))), *({"tag_drop_out": p} for p in (2, "0.5", None)),
    *({"repeats": n} for n in (0, 1.5, "2")), *({"batch_size": n} for n in (0, 1.5)), {"gradient_step": 0},
    {"latent_sampling_method": "Once"}, {"use_weight": 1}, {"use_weight": "raw"}, {"shuffle_tags": "x"},
    {"varsize": "no"}, {"include_cond": 1}, {"placeholder_token": 5}, {"version": 2}, {"cond_model": 5},
    {"interrupted": True}, {"seed": 1.5}, {"seed": "a"}, {"cache": ""}, {"cache": 5}, {"store_dtype": "float64"},
    {"overwrite": "yes"}, {"device": "foo"}, {"device": 1.5},
]  # fmt: skip


@pytest.mark.parametrize("options", BAD, ids=str)
def test_wrong_arguments_are_refused_before_an_image_is_encoded(images, vae, options):
    (name,) = options
    model = LatentDiffusion(vae, 0)
    with pytest.raises(UserError, match=name.replace("_dtype", "_dtype|dtype")):
        PersonalizedBase(images, 64, 64, model=model, **options)
    assert [path.name for path in images.parent.iterdir()] == ["images"]


def test_without_models_a_cache_of_other_settings_is_refused(images, vae, tmp_path):
    (tmp_path / "lines.txt").write_text("a photo of [name]\n")
    base(images, vae, placeholder_token="sks")
    assert len(PersonalizedBase(images, 64, 64, 1, 0, "sks")) == 8
    for options in (
        {"placeholder_token": "dog"},
        {"template_file": tmp_path / "lines.txt", "placeholder_token": "sks"},
    ):
        with pytest.raises(UserError, match=r"was made otherwise \(.*; cache -> asked\). Give model= to make it anew"):
            PersonalizedBase(images, 64, 64, 1, 0, **options)
    images.rename(tmp_path / "elsewhere")
    with pytest.raises(UserError, match=r"data_root .*: no such folder"):
        PersonalizedBase(images, 64, 64, 1, 0, "sks")


def test_a_model_that_draws_is_known_again(images, vae, capsys):
    class Draws(LatentDiffusion):
        def encode_first_stage(self, images):
            posterior = super().encode_first_stage(images)
            return posterior.mean + 0.5 * torch.randn_like(posterior.mean)  # a tensor, as later models give it

    state = torch.get_rng_state()
    base(images, vae, model=Draws(vae))
    capsys.readouterr()
    torch.manual_seed(5)
    base(images, vae, model=Draws(vae))
    assert "Preparing" not in capsys.readouterr().out
    torch.set_rng_state(state)


def test_the_web_uis_own_loop_goes_on_where_it_was(images, vae):
    def start():
        return PersonalizedDataLoader(base(images, vae, seed=4, batch_size=3, repeats=2), batch_size=3)

    def run(loader, num_batches):
        """Its loop breaks behind len(ds) // batch_size batches, whatever the loader has left."""
        most = len(loader.dataset) // 3
        seen = []
        while True:
            for j, batch in enumerate(loader, loader.next_batch):
                if j == most:
                    break
                seen.append(batch.cond_text)
                if len(seen) == num_batches:
                    return seen, loader.state_dict()

    wanted, _ = run(start(), 15)
    seen, state = run(start(), 7)
    loader = start()
    loader.load_state_dict(state)
    assert seen + run(loader, 8)[0] == wanted


def test_images_of_several_sizes_for_a_loader_that_does_not_stack(images, vae):
    data = PersonalizedBase(images, varsize=True, repeats=1, flip_p=0, model=vae)
    (entries,) = DataLoader(data, batch_size=8, collate_fn=list)
    assert {tuple(entry.latent_sample.shape) for entry in entries} == {(4, 10, 8), (4, 5, 16)}


def test_a_text_of_a_caption(images, vae, tmp_path):
    (tmp_path / "lines.txt").write_text("[name] x [filewords]\ny [filewords]\n")
    data = base(images, vae, template_file=tmp_path / "lines.txt", placeholder_token="sks", shuffle_tags=True)
    texts = {data.create_text("a, b, c") for _ in range(300)}
    assert "sks x a, b, c" in texts
    assert len(texts) == 12
    assert {base(images, vae).create_text("a,b") for _ in range(3)} == {"a,b"}


def test_an_error_of_the_callers_own_function_is_said(images, vae):
    with pytest.raises(UserError, match="interrupted: raised ZeroDivisionError"):
        base(images, vae, interrupted=lambda: 1 / 0)


@pytest.mark.parametrize("state", [None, [], 5])
def test_what_is_no_state_is_refused(images, vae, state):
    with pytest.raises(UserError, match=r"load_state_dict: got a .*, expected what state_dict gave"):
        PersonalizedDataLoader(base(images, vae)).load_state_dict(state)


def test_a_cache_by_another_path_is_checked_too(images, vae, tmp_path):
    base(images, vae, cache=tmp_path / "c")
    assert len(PersonalizedBase(images, 64, 64, 1, 0, cache=tmp_path / "c")) == 8
    with pytest.raises(UserError, match="was made otherwise"):
        PersonalizedBase(images, 128, 128, 1, 0, cache=tmp_path / "c")
    with pytest.raises(UserError, match="cond_model= without model=: give both, or neither"):
        PersonalizedBase(images, 64, 64, 1, 0, cond_model=web_uis_conditioner, cache=tmp_path / "c")


def test_a_cache_of_the_command_line_is_read_as_it_is(run, images, tmp_path):
    assert run("encode", images, "--out", tmp_path / "c", *SMALL).code == 0
    data = PersonalizedBase(images, repeats=1, flip_p=0, include_cond=True, cache=tmp_path / "c")
    assert data[0].cond.shape[0] == 77


def test_verify_says_that_a_model_in_memory_cannot_be_loaded_again(run, images, vae):
    cache = base(images, vae).cache
    assert run("verify", cache, "--source", images).code == 0
    result = run("verify", cache, "--source", images, "--re-encode", 1)
    assert (result.code, "made by PersonalizedBase, with a model in memory" in result.err) == (1, True)


def test_the_state_is_that_of_the_loop_that_began_last(images, vae):
    loader = PersonalizedDataLoader(base(images, vae, seed=1), batch_size=2)
    one, other = iter(loader), iter(loader)
    for loop in (one, other, one, one):
        next(loop)
    state = loader.state_dict()
    assert (state["epoch"], state["next_batch"]) == (1, 1)
    loader.load_state_dict(state)
    assert len(list(loader)) == 3


def test_a_gpu_that_is_not_there_is_said(images, vae, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(UserError, match="device='cuda': torch finds no CUDA device here"):
        base(images, vae, device="cuda")
