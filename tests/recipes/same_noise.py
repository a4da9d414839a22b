"""Runs a training script so that two of them can be compared, and prints what it logs.

    python tests/recipes/same_noise.py SCRIPT [ITS OPTIONS]

Images come in their order, latents are means, and noise depends on the number of the step alone. With FREE=1 in the
environment, all of that is as the script has it.
"""

import json
import os
import random
import runpy
import sys
from pathlib import Path

import torch
from accelerate import Accelerator
from diffusers import FluxPipeline, StableDiffusionXLPipeline, ZImagePipeline  # noqa: F401  # before the stand-ins are
from diffusers.loaders.peft import PeftAdapterMixin
from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution
from torch.utils.data import DataLoader
from transformers import CLIPTextModel, Qwen2Tokenizer, Qwen3Model, T5EncoderModel, T5TokenizerFast  # noqa: F401

from latentprep import LatentLoader
from latentprep.read.dataset import LatentDataset

steps = iter(range(10**6))


def randn_like(tensor, **_):
    torch.manual_seed(next(steps))
    return torch.randn(tensor.shape, dtype=tensor.dtype)


def changed(function, **arguments):
    """The function, with other values for some of the arguments that it is given by name."""
    return lambda *args, **options: function(*args, **{**options, **arguments})


def without_shuffle(function):
    return lambda *args, **options: function(*args, **{k: v for k, v in options.items() if k != "shuffle"})


def log(self, values, step=None, **_):
    if self.is_main_process:
        losses = json.dumps({name: value for name, value in values.items() if "loss" in name})
        os.write(1, f"LOG {losses}\n".encode())  # at once: several processes may write


def add_adapter(self, *args, _add=PeftAdapterMixin.add_adapter, **options):
    torch.manual_seed(0)
    return _add(self, *args, **options)


Accelerator.log = log
if not os.environ.get("FREE"):
    torch.randn_like = randn_like
    random.shuffle = lambda _: None
    PeftAdapterMixin.add_adapter = add_adapter
    DiagonalGaussianDistribution.sample = DiagonalGaussianDistribution.mode
    LatentDataset.__init__ = changed(LatentDataset.__init__, latent_sampling_method="deterministic")
    LatentLoader.__init__ = changed(LatentLoader.__init__, shuffle=False)

    DataLoader.__init__ = without_shuffle(DataLoader.__init__)

sys.path.insert(0, str(Path(__file__).parent / "stand_ins"))
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
