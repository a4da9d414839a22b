"""docs/training.md: each function hands a batch to the denoiser as the pipeline's own __call__ does, and trains."""

import copy
import inspect
import re
import runpy
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import latentprep
from latentprep import LatentDataset
from latentprep.prepare.models.families import FAMILIES, find_family
from tests.conftest import gradient
from tests.denoisers import DENOISERS, make_denoiser
from tests.miniatures import with_positions
from tests.test_control import noise

diffusers = pytest.importorskip("diffusers", minversion="0.42")  # as the page says

DOCS = Path(__file__).parent.parent / "docs"
PAGE = (DOCS / "training.md").read_text(encoding="utf-8")
HEIGHT, WIDTH = 64, 96
CAPTIONS = ["a red house, snow", "cat", 'a sign that says "open" to a cat', "No. 7 of 12: " + "x" * 40]
FLOW, NOISE = "Models that learn the velocity", "Models that learn the noise"
# What a pipeline is asked for that is not its default: no second prompt for guidance, and the sizes of the images.
CALLS = {
    "guidance_scale": 1.0, "use_resolution_binning": False, "original_size": (HEIGHT, WIDTH), "height": HEIGHT,
    "width": WIDTH, "num_inference_steps": 3, "use_pe": False,
}  # fmt: skip
OWN_CALLS = {
    "Flux": {"guidance_scale": 3.5}, "Flux2": {"guidance_scale": 4.0}, "Krea2": {"guidance_scale": 0.0},
    "ZImage": {"guidance_scale": 0.0}, "SanaSprint": {"guidance_scale": 4.5, "num_inference_steps": 2},
}  # fmt: skip
BY_PROMPT = ("stored_cond", "cond_lengths")  # fields of a batch
QUICK, slow = {"StableDiffusionXL", "Flux", "ZImage", "PixArtSigma", "QwenImageEditPlus"}, pytest.mark.slow


def blocks(text):
    return "".join(re.findall(r"^```python\n(.*?)^```", text, re.MULTILINE | re.DOTALL))


def sections(text, mark):
    """Heading -> what stands below it; "" -> what stands before the first."""
    first, *rest = re.split(rf"^{mark} ", text, flags=re.MULTILINE)
    return {"": first} | {part.partition("\n")[0]: part.partition("\n")[2] for part in rest}


CHAPTERS = sections(PAGE, "##")
# Name of a family -> its chapter, and what is said of it.
SECTIONS = {
    name: (chapter, text)
    for chapter in (FLOW, NOISE)
    for heading, text in sections(CHAPTERS[chapter], "###").items()
    if heading
    for name in heading.split(", ")
}


def loop_of(family):
    """The functions of the page for a family, as a reader would paste them."""
    chapter, text = SECTIONS[family.name]
    scope = {}
    shared = sections(CHAPTERS[chapter], "###")[""]
    exec(compile(blocks(CHAPTERS[""]) + blocks(shared) + blocks(text), "docs/training.md", "exec"), scope)
    return SimpleNamespace(**scope, is_flow=chapter == FLOW)


def make_batch(model, folder, controls):
    """Four images whose prompts differ in length, by way of a cache; `controls`: lists of four control images."""
    for n, caption in enumerate(CAPTIONS):
        image = gradient(WIDTH, HEIGHT).point(lambda value, n=n: value // (n + 1))
        image.save(folder / f"{n}.png")
        (folder / f"{n}.txt").write_text(caption)
    sizes = {"width": WIDTH, "height": HEIGHT, "store_dtype": "float32", "control": []}
    for number, images in enumerate(controls):
        sizes["control"].append(folder / f"control{number}")
        sizes["control"][-1].mkdir()
        for n, image in enumerate(images):
            image.save(sizes["control"][-1] / f"{n}.png")
    sizes["exclude"] = "control*"
    assert latentprep.encode(folder, folder / "cache", model=model, progress=False, **sizes).ok
    batch = LatentDataset(folder / "cache", latent_sampling_method="deterministic").__getitems__(range(len(CAPTIONS)))
    assert batch.cond_text == CAPTIONS
    return batch


def draw_controls(family, monkeypatch):
    """Control images for each of the four, in lists; pipelines take them at their size, which is that of an image."""
    if not family.num_images:
        return []
    module = inspect.getmodule(getattr(diffusers, family.pipeline))
    size = (WIDTH, HEIGHT, None)[: 3 if family.num_images == 1 else 2]
    monkeypatch.setattr(module, "calculate_dimensions", lambda area, ratio: size)
    return [[noise(WIDTH, HEIGHT, 4 * k + n) for n in range(4)] for k in range(min(2, family.num_images))]


class Done(BaseException):
    """Ends a pipeline's __call__ at its second step."""


def make_scheduler(stem, is_flow):
    if stem == "SanaSprint":
        return diffusers.SCMScheduler()
    if not is_flow:
        return diffusers.DDPMScheduler()
    if stem == "CogView4":  # shifted by size, as in diffusers' examples/cogview4-control
        shift = {"use_dynamic_shifting": True, "base_shift": 0.25, "max_shift": 0.75, "base_image_seq_len": 256}
        return diffusers.FlowMatchEulerDiscreteScheduler(time_shift_type="linear", **shift)
    return diffusers.FlowMatchEulerDiscreteScheduler()


@torch.inference_mode()
def second_step(pipeline, family, model, prompts, is_flow, images):
    """What the pipeline's own __call__ has at its second step: prediction, time and noisy latents, as images."""
    scheduler, steps = make_scheduler(family.stem, is_flow), []
    step = scheduler.step

    def hear(prediction, time, noisy, *arguments, **options):
        steps.append((prediction, time, noisy))
        if len(steps) == 2:
            raise Done
        return step(prediction, time, noisy, *arguments, **options)

    scheduler.step = hear
    pipeline = copy.copy(pipeline)
    pipeline.register_modules(**{name_of_denoiser(pipeline): model, "scheduler": scheduler})
    pipeline.set_progress_bar_config(disable=True)
    if family.stem == "HiDreamImage":  # it takes any size for a shape, of so many pixels
        pipeline.default_sample_size = 9.8
    if family.stem == "Chroma":  # it has a mask of floats, which attention adds (diffusers' issue 13619)
        pipeline._prepare_attention_mask = partial(as_bool, pipeline._prepare_attention_mask)
    if images:
        pipeline = with_positions(pipeline)
    known = inspect.signature(type(pipeline).__call__).parameters
    options = {name: value for name, value in (CALLS | OWN_CALLS.get(family.stem, {})).items() if name in known}
    if images:
        options["image"] = images[0] if family.num_images == 1 else images
    with pytest.raises(Done):
        pipeline(prompt=list(prompts), generator=torch.Generator().manual_seed(1), **options)
    prediction, time, noisy = steps[1]
    time = scheduler.sigmas[1] if is_flow and family.stem != "SanaSprint" else time.flatten()[0]
    return as_image(pipeline, prediction), time, as_image(pipeline, noisy)


def as_bool(prepare, **arguments):
    mask = prepare(**arguments)
    return mask if mask is None else mask.bool()


def name_of_denoiser(pipeline):
    return "unet" if "unet" in inspect.signature(type(pipeline).__init__).parameters else "transformer"


def as_image(pipeline, tokens):
    """What a pipeline has as tokens [B,T,C], as its own functions make an image of them: [B,C,h,w]."""
    if tokens.ndim == 4:
        return tokens
    if isinstance(pipeline, diffusers.Flux2Pipeline | diffusers.Flux2KleinPipeline):
        ids = pipeline._prepare_latent_ids(torch.empty(len(tokens), 1, HEIGHT // 16, WIDTH // 16))
        return torch.stack(list(pipeline._unpack_latents_with_ids(tokens, ids)))
    image = pipeline._unpack_latents(tokens, HEIGHT, WIDTH, *([] if "Krea2" in type(pipeline).__name__ else [8]))
    return image.reshape(len(tokens), -1, *image.shape[-2:])


def of_circle(time, noisy):
    """SANA-Sprint's pipeline, pipeline_sana_sprint.py: its time and noisy latents as sigma and those of a line."""
    return time.sin() / (time.cos() + time.sin()), noisy / 0.5 / (time.cos() + time.sin())


def to_circle(sigma, noisy, velocity):
    length = (sigma**2 + (1 - sigma) ** 2).sqrt()
    return ((1 - 2 * sigma) * noisy + (1 - 2 * sigma + 2 * sigma**2) * velocity) / length * 0.5


def check_table(family, pipeline, batch):
    """What the table in docs/models.md says of VAE and shapes."""
    table = runpy.run_path(str(DOCS / "make_table.py"))
    assert f"`{type(pipeline.vae).__name__}`" in table["list_vaes"](family)
    for name, value in batch.stored_cond.items():
        for axis, size in zip(table["shape_of"](family, name), value.shape[1:], strict=True):
            assert axis in ("T", "D", "layers", str(size)), name


def check_as_inference(family, loop, model, pipeline, batch, controls):
    """The page's function gives for a batch of mixed prompts what the pipeline gives, padded as that pads."""
    prompts = [[prompt] for prompt in CAPTIONS] if family.one_by_one else [CAPTIONS]
    images = list(zip(*controls, strict=True)) or [()] * len(prompts)
    steps = [
        second_step(pipeline, family, model, own, loop.is_flow, list(seen))
        for own, seen in zip(prompts, images, strict=True)
    ]
    wanted, noisy = (torch.cat([step[n] for step in steps]) for n in (0, 2))
    time = steps[0][1]
    if family.stem == "SanaSprint":
        time, noisy = of_circle(time, noisy)
    rolled = {name: {key: value.roll(1, 0) for key, value in getattr(batch, name).items()} for name in BY_PROMPT}
    with torch.inference_mode():
        found, other = (loop.predict(model, b, noisy, time.expand(len(b))) for b in (batch, replace(batch, **rolled)))
    if family.stem == "SanaSprint":
        found, other = (to_circle(time, noisy, velocity) for velocity in (found, other))
    assert found.shape == batch.latent_sample.shape
    size = wanted.abs().max()
    assert (found - wanted).abs().max() < 1e-5 * size
    assert (other - wanted).abs().amax((1, 2, 3)).min() > 1e-3 * size  # another prompt gives something else


def check_trains(loop, model, batch):
    optimizer, losses = torch.optim.AdamW(model.parameters(), lr=1e-3), []
    for _ in range(3):
        loss = loss_of(loop, model, batch)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[2] < losses[1] < losses[0] < float("inf"), losses
    with torch.no_grad():
        assert loss_of(loop, model.to(torch.bfloat16), batch.to(torch.bfloat16)).isfinite()


def loss_of(loop, model, batch):
    """With the same noise and times at each step."""
    torch.manual_seed(0)
    if loop.is_flow:
        return loop.velocity_loss(model, batch)
    return loop.noise_loss(model, batch, diffusers.DDPMScheduler())


def test_every_family_has_a_section_and_a_denoiser():
    assert list(SECTIONS) == list(dict.fromkeys(SECTIONS))
    assert SECTIONS.keys() == {family.name for family in FAMILIES}
    assert DENOISERS.keys() == {family.stem for family in FAMILIES}
    for family in FAMILIES:
        loop = loop_of(family)
        assert [*inspect.signature(loop.predict).parameters][3] == ("sigma" if loop.is_flow else "timestep")


@pytest.mark.parametrize(
    "family", [pytest.param(f, marks=[] if f.stem in QUICK else slow, id=f.stem) for f in FAMILIES]
)
def test_a_batch_is_predicted_as_in_inference_and_trained_on(family, miniature, tmp_path, monkeypatch):
    pipeline, folder = miniature(family.stem)
    controls = draw_controls(family, monkeypatch)
    batch, loop, model = make_batch(folder, tmp_path, controls), loop_of(family), make_denoiser(family.stem)
    assert f"`{type(model).__name__}`" in SECTIONS[family.name][1]
    check_table(family, pipeline, batch)
    check_as_inference(family, loop, model, pipeline, batch, controls)
    check_trains(loop, model.train(), batch)


def test_a_model_that_is_right_has_no_loss():
    batch = SimpleNamespace(latent_sample=torch.randn(4, 4, 8, 8))
    flow, noise = (loop_of(find_family(f"{stem}Pipeline")) for stem in ("Flux", "StableDiffusionXL"))

    def predict_velocity(model, batch, noisy, sigma):
        return (noisy - batch.latent_sample) / sigma.view(-1, 1, 1, 1)

    def predict_noise(scheduler, batch, noisy, timestep):
        alpha = scheduler.alphas_cumprod[timestep].view(-1, 1, 1, 1)
        found = (noisy - alpha.sqrt() * batch.latent_sample) / (1 - alpha).sqrt()
        return found if is_epsilon else alpha.sqrt() * found - (1 - alpha).sqrt() * batch.latent_sample

    flow.velocity_loss.__globals__["predict"] = predict_velocity
    noise.noise_loss.__globals__["predict"] = predict_noise
    assert flow.velocity_loss(None, batch) < 1e-6
    for is_epsilon in (True, False):
        scheduler = diffusers.DDPMScheduler(prediction_type="epsilon" if is_epsilon else "v_prediction")
        assert noise.noise_loss(scheduler, batch, scheduler) < 1e-6
