"""prepare/models/vae_decoder.py: every VAE decodes as its class does, and what cannot be decoded is one line."""

import re

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from latentprep.errors import UserError
from latentprep.prepare.models import vae_decoder
from latentprep.prepare.models.single_file import open_vae_file
from latentprep.prepare.models.vae_config import DECODER_PARTS
from latentprep.prepare.models.vae_decoder import open_decoder
from latentprep.prepare.models.vae_folder import open_vae
from tests.test_single_file import contiguous, ldm_vae
from tests.test_vaes import ALL, FILE, MINIATURES


def latents_of(vae, height=2, width=3):
    generator = torch.Generator().manual_seed(0)
    return torch.randn(vae.latent_channels, height, width, generator=generator)


@torch.inference_mode()
def own_decode(name, vae, latents):
    """[H,W,3] uint8 of the class's own decode."""
    values = latents[None, :, None] if MINIATURES[name].has_time else latents[None]
    image = vae.decode(values).sample
    image = (image[:, :, 0] if MINIATURES[name].has_time else image)[0, :3]
    return image.clamp(-1, 1).add(1).mul(127.5).round().byte().permute(1, 2, 0).numpy()


@ALL
def test_every_class_decodes_as_it_does_itself(name, tmp_path):
    vae = MINIATURES[name].make()
    vae.save_pretrained(tmp_path)
    opened = open_vae(tmp_path)
    decoder, latents = open_decoder(opened, str(tmp_path), "cpu"), latents_of(opened)
    assert {part.partition(".")[0] for part, _ in decoder.vae.named_parameters()} <= set(DECODER_PARTS)
    found = decoder.decode(latents)
    assert found.shape == (2 * opened.factor, 3 * opened.factor, 3)
    assert found.std() > 0
    assert np.abs(found.astype(int) - own_decode(name, vae, latents)).max() <= 1
    assert np.array_equal(decoder.decode(latents), found)  # nothing is kept of what was decoded before


@pytest.mark.parametrize("name", ["SDXL", "FLUX.1", "FLUX.2"])
@pytest.mark.parametrize("is_original", [False, True])
def test_the_decoder_of_a_file_is_that_of_its_folder(name, is_original, tmp_path):
    vae = MINIATURES[name].make()
    vae.save_pretrained(tmp_path)
    tensors = ldm_vae(vae) if is_original else vae.state_dict()
    if is_original and name == "FLUX.2":
        inner = {"quant_conv": "encoder.quant_conv", "post_quant_conv": "decoder.post_quant_conv"}
        tensors = {re.sub(r"^(post_)?quant_conv", lambda m: inner[m[0]], key): t for key, t in tensors.items()}
    save_file(contiguous(tensors), tmp_path / "vae.safetensors")
    opened = open_vae_file(tmp_path / "vae.safetensors", "--vae", tmp_path)
    found = open_decoder(opened, "vae.safetensors", "cpu").decode(latents_of(opened))
    wanted = open_decoder(open_vae(tmp_path), "folder", "cpu").decode(latents_of(opened))
    assert np.array_equal(found, wanted)


def test_a_decoder_that_is_not_there_or_broken_is_one_line(tmp_path):
    MINIATURES["SDXL"].make().save_pretrained(tmp_path)
    whole = load_file(tmp_path / FILE)
    encoder = {name: t for name, t in whole.items() if not name.startswith(("decoder", "post_quant"))}
    broken = {**whole, "decoder.conv_in.bias": torch.full_like(whole["decoder.conv_in.bias"], torch.nan)}
    other = {**whole, "decoder.conv_in.bias": torch.zeros(3)}
    for tensors, *words in (
        (encoder, "weights were not found, such as decoder.", "missing, such as decoder."),
        (broken, "NaN or infinite", "NaN or infinite"),
        (other, "of another shape, such as decoder.conv_in.bias", "of another shape, such as decoder.conv_in.bias"),
    ):
        save_file(tensors, tmp_path / FILE, {"format": "pt"})
        both = open_vae(tmp_path), open_vae_file(tmp_path / FILE, "--vae", tmp_path)
        for opened, said in zip(both, words, strict=True):
            with pytest.raises(UserError, match=r"^where: no decoder can be read of it: .*") as error:
                open_decoder(opened, "where", "cpu")
            assert said in str(error.value)


def test_a_full_memory_is_one_line(tmp_path, monkeypatch):
    MINIATURES["SDXL"].make().save_pretrained(tmp_path)
    decoder = open_decoder(open_vae(tmp_path), "where", "cpu")

    def fail(*_):
        raise RuntimeError("DefaultCPUAllocator: can't allocate memory")

    monkeypatch.setattr(vae_decoder, "image_of", fail)
    with pytest.raises(UserError, match=r"^24x16 does not fit into the memory of cpu$"):
        decoder.decode(torch.zeros(4, 2, 3))


def test_what_is_no_image_is_one_line(tmp_path, monkeypatch):
    MINIATURES["SDXL"].make().save_pretrained(tmp_path)
    decoder = open_decoder(open_vae(tmp_path), "where", "cpu")
    with pytest.raises(UserError, match=r"^the VAE cannot decode it \(RuntimeError: "):
        decoder.decode(torch.zeros(5, 2, 3))
    assert decoder.decode(torch.full((4, 2, 3), torch.nan)).shape == (16, 24, 3)
    monkeypatch.setattr(vae_decoder, "image_of", lambda *_: torch.zeros(1, 3, 5, 5))
    with pytest.raises(UserError, match=r"^the VAE makes \[5, 5, 3\] of it, expected \[16, 24, 3\]$"):
        decoder.decode(torch.zeros(4, 2, 3))
