"""personalized: the ancestor's two classes, against its own arithmetic."""

import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL, StableDiffusionPipeline
from PIL import Image

from latentprep.errors import UserError
from latentprep.personalized import PersonalizedBase, PersonalizedDataLoader
from tests.conftest import TINY, gradient


@pytest.fixture(scope="module")
def vae():
    return AutoencoderKL.from_pretrained(TINY / "vae").float().eval()


class LatentDiffusion:
    """The ancestor's kind of model: what ldm's LatentDiffusion had."""

    def __init__(self, vae, num_calls=10**9):
        self.vae_of_mine, self.left = vae, num_calls

    @torch.no_grad()
    def encode_first_stage(self, images):
        assert self.left > 0
        self.left -= 1
        return self.vae_of_mine.encode(images).latent_dist

    def get_first_stage_encoding(self, posterior):
        z = posterior if isinstance(posterior, torch.Tensor) else posterior.sample()
        return self.vae_of_mine.config.scaling_factor * z


def cond_model(prompts):
    return torch.stack([torch.full((7, 5), float(len(prompt))) for prompt in prompts])


def ancestors_latents(vae, path, width, height):
    """stable-diffusion-webui, modules/textual_inversion/dataset.py: deterministic sampling."""
    image = Image.open(path).convert("RGB").resize((width, height), Image.BICUBIC)
    pixels = (np.array(image).astype(np.uint8) / 127.5 - 1.0).astype(np.float32)
    with torch.no_grad():
        mean = vae.encode(torch.from_numpy(pixels).permute(2, 0, 1)[None]).latent_dist.mean
    return mean[0] * vae.config.scaling_factor


@pytest.mark.parametrize("kind", ["vae", "pipeline", "ancestor"])
def test_entries_are_what_the_ancestor_made(images, vae, tmp_path, kind):
    model = {"vae": vae, "pipeline": SimpleNamespace(vae=vae), "ancestor": LatentDiffusion(vae)}[kind]
    (tmp_path / "lines.txt").write_text("a photo of [name], [filewords]\n")
    data = PersonalizedBase(
        str(images), 64, 96, 1, 0, placeholder_token="sks", model=model, cond_model=cond_model, include_cond=True,
        template_file=tmp_path / "lines.txt", batch_size=100, gradient_step=9, latent_sampling_method="deterministic",
        use_weight=True,
    )  # fmt: skip
    assert (len(data), data.length, data.batch_size, data.gradient_step) == (8, 8, 8, 1)
    assert data.latent_sampling_method == "deterministic"
    entries = {entry.filename: entry for entry in data.dataset}
    assert len(entries) == 8
    entry = entries[str(images / "tall1.png")]
    assert entry.filename_text == "picture number 1"
    assert entry.cond_text == "a photo of sks, picture number 1"
    assert torch.equal(entry.cond, cond_model([entry.cond_text])[0])
    wanted = ancestors_latents(vae, images / "tall1.png", 64, 96)
    assert entry.latent_sample.shape == wanted.shape == (4, 12, 8)
    assert torch.allclose(entry.latent_sample, wanted, atol=2e-3)
    assert entry.weight.shape == wanted.shape
    assert abs(float(entry.weight.mean()) - 1) < 1e-3
    assert entry.weight.min() == 0
    assert (entries[str(images / "wide0.png")].weight == 1).all()


def test_from_the_second_start_on_each_model_is_run_once(images, vae, capsys):
    options = {"repeats": 1, "include_cond": True, "latent_sampling_method": "deterministic"}
    first = PersonalizedBase(images, 64, 64, model=LatentDiffusion(vae), cond_model=cond_model, **options)
    assert "Preparing dataset..." in capsys.readouterr().out
    for models in ({"model": LatentDiffusion(vae, 1), "cond_model": cond_model}, {}):
        again = PersonalizedBase(images, 64, 64, **models, **options)
        assert "Preparing" not in capsys.readouterr().out
        assert len(again) == len(first)
        assert torch.equal(again[3].cond, first[3].cond)
    gradient(30, 30).save(images / "new.png")
    assert len(PersonalizedBase(images, 64, 64, model=LatentDiffusion(vae), cond_model=cond_model, **options)) == 9


def test_another_model_is_refused(images, vae, tmp_path):
    PersonalizedBase(images, 64, 64, model=vae)
    other = AutoencoderKL.from_pretrained(TINY / "vae")
    with torch.no_grad():
        other.quant_conv.bias.add_(1)
    with pytest.raises(UserError, match="holds a cache of another recipe"):
        PersonalizedBase(images, 64, 64, model=other)
    assert len(PersonalizedBase(images, 64, 64, 1, model=other, cache=tmp_path / "other")) == 8
    assert len(PersonalizedBase(images, 64, 64, 1, model=other, overwrite=True)) == 8


def test_batches_are_what_the_ancestor_stacked(images, vae):
    data = PersonalizedBase(
        images, repeats=1, varsize=True, model=vae, cond_model=cond_model, include_cond=True, use_weight=True,
        latent_sampling_method="random",
    )  # fmt: skip
    loader = PersonalizedDataLoader(data, latent_sampling_method="random", batch_size=3, pin_memory=False)
    orders, draws = [], []
    for _ in range(4):
        orders.append([])
        for batch in loader:
            count = len(batch.cond_text)
            assert batch.latent_sample.shape in {(count, 4, 10, 8), (count, 4, 5, 16)}
            assert batch.weight.shape == batch.latent_sample.shape
            assert [cond.shape for cond in batch.cond] == [(7, 5)] * count
            orders[-1] += batch.cond_text
        draws.append(data[0].latent_sample)
    captions = ["picture number 0", "picture number 1", "picture number 2", "picture number 3"]
    assert all(sorted(order) == sorted([*captions, "wide0", "wide1", "wide2", "wide3"]) for order in orders)
    assert len({tuple(order) for order in orders}) > 1  # two of them may be equal by chance
    assert not torch.equal(draws[0], draws[1])
    plain = PersonalizedBase(images, varsize=True, model=vae)
    (batch,) = list(PersonalizedDataLoader(plain, batch_size=4))[:1]
    assert batch.weight is None
    assert batch.cond == [None] * 4


def test_shuffled_tags_leave_the_cond_to_the_training_loop(images, vae, tmp_path):
    (images / "tall0.txt").write_text("one, two, three, four")
    (tmp_path / "lines.txt").write_text("[filewords] of [name]\n")
    data = PersonalizedBase(
        images, 64, 64, model=vae, cond_model=cond_model, include_cond=True, shuffle_tags=True, tag_drop_out=0.2,
        template_file=tmp_path / "lines.txt",
    )  # fmt: skip
    (index,) = [n for n in range(8) if data[n].filename_text.startswith("one")]
    found = set()
    for _ in range(10):
        entry = data[index]
        assert entry.cond is None
        tags, _, rest = entry.cond_text.partition(" of ")
        assert rest == "*"
        found.add(tags)
    assert len(found) > 5


def test_flips_only_where_they_are_asked_for(images, vae):
    plain = PersonalizedBase(images, 64, 64, flip_p=0, model=vae, latent_sampling_method="deterministic")
    manifest = json.loads((images.parent / "images.64x64.latents" / "cache.json").read_text())
    assert manifest["latent"]["views"] == ["plain"]
    flipped = PersonalizedBase(
        images, 64, 64, flip_p=1.0, model=vae, latent_sampling_method="deterministic", cache=images.parent / "flipped"
    )
    assert not torch.equal(plain[0].latent_sample, flipped[0].latent_sample)


def test_a_true_pipeline(images, model):
    pipeline = StableDiffusionPipeline.from_pretrained(
        model, unet=None, scheduler=None, safety_checker=None, feature_extractor=None
    )
    data = PersonalizedBase(images, 64, 64, model=pipeline, cond_model=pipeline, include_cond=True)
    wanted, _ = pipeline.encode_prompt(data[2].cond_text, "cpu", 1, False)
    assert torch.allclose(data[2].cond, wanted[0], atol=5e-3)


def test_what_cannot_be(images, vae):
    with pytest.raises(UserError, match="model: a str, expected a diffusers AutoencoderKL"):
        PersonalizedBase(images, 64, 64, model="sd-v1-5.ckpt")
    with pytest.raises(UserError, match="give cond_model=, a pipeline or a callable"):
        PersonalizedBase(images, 64, 64, model=vae, include_cond=True)
    with pytest.raises(UserError, match="not a latent cache"):
        PersonalizedBase(images, 64, 64)
    PersonalizedBase(images, 64, 64, model=vae)
    with pytest.raises(UserError, match=r"holds no cond. Give model= and cond_model= to make it"):
        PersonalizedBase(images, 64, 64, include_cond=True)
    with pytest.raises(UserError, match=r"cond_model: gave list for 1 prompt, expected a tensor \[1,T,D\]"):
        PersonalizedBase(images, 64, 64, model=vae, include_cond=True, cond_model=lambda prompts: prompts)
