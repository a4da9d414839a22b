"""Every row of FAMILIES against its own pipeline: arguments, defaults, cond, masks, lengths, counts and sizes."""

import inspect
import json
import re
import shutil
from types import SimpleNamespace

import diffusers
import numpy as np
import pytest
import torch

from latentprep import LatentDataset
from latentprep.cache.ragged import Ragged, values_of
from latentprep.errors import UserError
from latentprep.options import TextOptions
from latentprep.prepare.models.encode_prompt import inference_defaults, make_arguments
from latentprep.prepare.models.families import FAMILIES, find_family
from latentprep.prepare.models.family import FIXED, LIST, MASK
from latentprep.prepare.models.text_folder import PACKAGES, open_text
from tests.miniatures import PARTS

CPU = torch.device("cpu")
PROMPTS = ["a red house, snow", "", 'a sign that says "open" to a cat', "No. 7 of 12: " + "x" * 40]
# What inference passes on that is no fault of a default: the number of images, and prompts for other encoders.
ALWAYS = {"num_images_per_prompt", "prompt_2"}


def has_pipeline(family):
    return hasattr(diffusers, family.pipeline)


THERE = [family for family in FAMILIES if has_pipeline(family)]
every_family = pytest.mark.parametrize("family", THERE, ids=lambda family: family.stem)
# those whose prompts see images are in tests/test_seen.py
of_prompts_alone = pytest.mark.parametrize(
    "family", [family for family in THERE if not family.num_images], ids=lambda family: family.stem
)


class Done(BaseException):
    """Ends a pipeline's __call__ once prompts are encoded."""


@torch.inference_mode()
def by_inference(pipeline, family, prompts):
    """What encode_prompt returns to the pipeline's own __call__: a tuple for each of the family's calls."""
    kind, returned = type(pipeline), []

    class Heard(kind):
        def encode_prompt(self, *arguments, **options):
            found = super().encode_prompt(*arguments, **options)
            returned.append(found if isinstance(found, tuple) else (found,))
            if len(returned) == len(family.calls):
                raise Done
            return found

    pipeline.__class__ = Heard
    if "transformer" in pipeline.components and pipeline.transformer is None:  # asked for sizes before prompts
        pipeline.transformer = SimpleNamespace(
            config=SimpleNamespace(sample_size=32, patch_size=1), dtype=torch.float32
        )
    known = inspect.signature(kind.__call__).parameters
    options = {"height": 1024, "width": 1024, "num_inference_steps": 2, "guidance_scale": 1.0}
    try:
        with pytest.raises(Done):
            pipeline(prompt=list(prompts), **{name: value for name, value in options.items() if name in known})
    finally:
        pipeline.__class__ = kind
    return returned


def test_every_row_has_a_miniature():
    assert PARTS.keys() == {family.stem for family in FAMILIES}
    assert all(find_family(family.pipeline) is family for family in FAMILIES)


@every_family
def test_arguments_fit_encode_prompt(family):
    kind = getattr(diffusers, family.pipeline)
    signature = inspect.signature(kind.encode_prompt)
    for call in family.calls:
        arguments = make_arguments(family, call, kind, CPU, 7)
        signature.bind(None, prompt=["a"], **arguments)
        assert call.arguments.items() <= arguments.items()
        assert arguments.get("do_classifier_free_guidance") in (None, False)
    if family.sequence is not None and family.tokens_argument is not None:
        assert arguments[family.tokens_argument] == 7


@every_family
def test_defaults_that_differ_are_named_in_the_row(family):
    """encode_prompt and __call__ have other defaults: the row says so, and whoever adds one has looked at it."""
    kind = getattr(diffusers, family.pipeline)
    assert inference_defaults(kind).keys() - ALWAYS == set(family.call_defaults) - ALWAYS
    of_call = inspect.signature(kind.__call__).parameters
    if family.tokens_argument in of_call:
        default = of_call[family.tokens_argument].default
        assert family.default_tokens in ((0,) if family.sequence is None else (default,) if default else (256,))
    assert family.heeds_force_upcast == ("force_upcast" in inspect.getsource(kind))
    source = inspect.getsource(inspect.getmodule(kind))
    assert set(family.packages) <= PACKAGES.keys()
    assert ("bs4" in family.packages) == ("clean_caption" in family.call_defaults)
    assert ("ftfy" in family.packages) == ("ftfy." in source and family.stem not in ("Sana", "SanaSprint")), source[:0]


@of_prompts_alone
def test_cond_is_what_inference_encodes(family, miniature):
    pipeline, folder = miniature(family.stem)
    encoder = open_text(folder).open(CPU, torch.float32)
    encoder.tokens_at_once = (
        len(PROMPTS) * encoder.stored_tokens
    )  # as many as inference encodes at once: the last bits may depend on it
    found = encoder.encode(PROMPTS)
    assert list(found) == family.names == list(family.stores)
    prompts = [[prompt] for prompt in PROMPTS] if family.one_by_one else [PROMPTS]
    for n, batch in enumerate(prompts):
        rows = range(n, n + len(batch))
        for call, returned in zip(family.calls, by_inference(pipeline, family, batch), strict=True):
            named = {name: value for name, value in zip(call.returns, returned, strict=True) if name}
            for name in named.keys() & found.keys():
                compare(found[name], rows, named[name], named.get(f"{name}_mask"), family, name)


def compare(found, rows, wanted, mask, family, name):
    """Rows of what was stored against what encode_prompt gave, bit for bit where a mask counts."""
    own = (
        torch.unbind(wanted.movedim(family.batch_axis.get(name, 0), 0)) if isinstance(wanted, torch.Tensor) else wanted
    )
    if name.endswith("_ids") and wanted.ndim == 2:  # the same for all
        own = [wanted] * len(rows)
    for n, value in zip(rows, own, strict=True):
        if family.length == MASK and mask is not None:
            counts = mask[n - rows[0]].bool().reshape(len(value), -1)[:, 0]
            value = value[counts]
        elif family.length == MASK and name.endswith("_ids"):
            value = value[: len(found[n])]
        assert found[n].dtype == torch.float32
        assert torch.equal(found[n], value.float()), (name, n)


@of_prompts_alone
def test_a_tokenizer_that_pads_on_the_other_side_is_refused_or_gives_the_same(family, miniature, tmp_path):
    folder = shutil.copytree(miniature(family.stem)[1], tmp_path / "model")
    wanted = open_text(folder).open(CPU, torch.float32).encode(PROMPTS)
    for path in sorted(folder.glob("tokenizer*")):
        config = path / "tokenizer_config.json"
        own = json.loads(config.read_text())
        for side in ("left", "right"):
            config.write_text(json.dumps({**own, "padding_side": side}))
            if family.padding_side in (None, side):
                found = open_text(folder).open(CPU, torch.float32).encode(PROMPTS)
                for name, value in wanted.items():
                    assert torch.allclose(values_of(found[name]), values_of(value), atol=1e-5), (path.name, side)
                continue
            line = f"{path}: its tokenizer pads prompts on the {side}, expected the {family.padding_side}. "
            with pytest.raises(UserError, match=re.escape(line + f'Set "padding_side": "{family.padding_side}"')):
                open_text(folder).check()
        config.write_text(json.dumps(own))


@pytest.mark.skipif(not hasattr(diffusers, "ErnieImagePipeline"), reason="a newer diffusers")
def test_ernie_image_has_a_normalization_of_its_own(miniature, images, run, tmp_path):
    """Its pipeline adds another number to the variance than the config of its VAE says."""
    pipeline, folder = miniature("ErnieImage")
    options = ("--model", folder, "--no-cond", "--resolution", 64, "--bucket-step", 32, "--min-side", 32)
    assert run("encode", images, *options, "--out", tmp_path / "c", "--store-dtype", "float32").code == 0
    batch = LatentDataset(tmp_path / "c", latent_sampling_method="deterministic", include_cond=False)[0]
    code = inspect.getsource(type(pipeline).__call__)
    assert "torch.sqrt(self.vae.bn.running_var.view(1, -1, 1, 1) + 1e-5)" in code
    assert "latents = latents * bn_std + bn_mean" in code
    assert pipeline.vae.config.batch_norm_eps == 1e-4
    mean = pipeline.vae.bn.running_mean.view(1, -1, 1, 1)
    std = torch.sqrt(pipeline.vae.bn.running_var.view(1, -1, 1, 1) + 1e-5)
    decoded = pipeline._unpatchify_latents(batch.latent_sample * std + mean)
    assert torch.allclose(decoded, batch.latent_mean, atol=1e-6)
    by_config = torch.sqrt(pipeline.vae.bn.running_var.view(1, -1, 1, 1) + 1e-4)
    assert not torch.allclose(pipeline._unpatchify_latents(batch.latent_sample * by_config + mean), decoded, atol=1e-6)


@of_prompts_alone
def test_tokens_are_counted_and_sizes_known(family, miniature):
    text = open_text(miniature(family.stem)[1])
    text.check()
    encoder = text.open(CPU, torch.float32)
    found = encoder.encode(PROMPTS[:2])
    counts = encoder.count_tokens(PROMPTS[:2])
    kept = sum(value[0].numel() for value in found.values())
    if family.length == FIXED:
        assert kept == text.num_values(TextOptions())
        return
    assert kept < text.num_values(TextOptions())
    name = "prompt_embeds_2" if family.sequence == "text_encoder_2" else "prompt_embeds"
    assert isinstance(found[name], Ragged)
    stored = np.diff(found[name].offsets)
    if family.stem == "Chroma":  # a token of padding counts
        counts = counts + 1
    if family.stem == "CogView4":  # filled up to a multiple of 16
        counts = -(-counts // 16) * 16
    assert stored.tolist() == counts.tolist()


@every_family
def test_long_prompts_are_cut_where_it_says(family, miniature):
    text = open_text(miniature(family.stem)[1])
    if family.sequence is None or (family.tokens_argument is None and family.length != LIST):
        return
    options = TextOptions() if family.tokens_argument is None else TextOptions(max_tokens=family.default_tokens // 4)
    encoder = text.open(CPU, torch.float32, options)
    long = ["word " * 300]
    found = encoder.encode(long)
    assert encoder.count_tokens(long)[0] > encoder.max_tokens
    name = next(name for name in family.names if name.startswith("prompt_embeds"))
    tokens = found[name].shape[1] if isinstance(found[name], torch.Tensor) else len(found[name][0])
    windows = 77 if family.has_clip_tokens else 0
    assert tokens == encoder.max_tokens + windows
