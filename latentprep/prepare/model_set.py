"""The models of a run: from folders here, from objects in memory in personalized.py."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from latentprep.config import EncodeOptions
from latentprep.prepare.models import TextFacts, VaeFacts, find_model, open_text, open_vae

if TYPE_CHECKING:
    import torch

    from latentprep.prepare.text import TextEncoder
    from latentprep.prepare.vae import VaeEncoder


@dataclass(frozen=True)
class Models:
    """The models of a run: what a plan must know of them, and how to have them once they are needed."""

    vae: VaeFacts
    text: TextFacts | None  # None: no conditioning
    make_vae: "Callable[[torch.device, torch.dtype], VaeEncoder]"
    make_text: "Callable[[torch.device, torch.dtype], TextEncoder] | None"


def open_models(options: EncodeOptions, say: Callable[[str], None]) -> Models:
    """The models that the options name; their configs are read and their files hashed. Raises UserError."""
    model = find_model(options.model, say=say)
    vae = open_vae(find_model(options.vae, "--vae", say), "--vae") if options.vae else open_vae(model)
    options.check_tiling(vae.factor)
    text = open_text(model) if options.text.include_cond else None

    def make_vae(device: "torch.device", dtype: "torch.dtype") -> "VaeEncoder":
        from latentprep.prepare.vae import VaeEncoder

        return VaeEncoder(vae, device, dtype, tiling=options.tiling, compile=options.compile)

    def make_text(device: "torch.device", dtype: "torch.dtype") -> "TextEncoder":
        from latentprep.prepare.text import TextEncoder

        assert text is not None
        return TextEncoder(text, device, dtype)

    return Models(vae, text, make_vae, make_text if text is not None else None)
