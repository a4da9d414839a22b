"""Models that no row of FAMILIES can say, and why: for the one line that refuses them."""

import re
from dataclasses import dataclass


@dataclass(frozen=True)
class Refusal:
    """A row of REFUSALS."""

    names: str  # how the class names of its pipelines begin, as a pattern
    why: str
    has_latents: bool = True  # whether --no-cond, which leaves prompts out, makes a cache of it


REFUSALS = (
    Refusal(
        r"Allegro|AnimateDiff|AnyFlow|ChronoEdit|CogVideoX|ConsisID|Cosmos|EasyAnimate|Helios|HunyuanSkyreels"
        r"|HunyuanVideo|I2VGenXL|Kandinsky5(T2V|I2V)|Kandinsky6|LTX|Latte|LucyEdit|Mochi|MotifVideo|PIA|Sana(Video|WM)"
        r"|SanaImageToVideo|SkyReels|StableVideoDiffusion|TextToVideo|VideoToVideo|Wan",
        "makes videos, and a cache holds images",
    ),
    Refusal(
        r"AceStep|AudioLDM|AudioDiffusion|DanceDiffusion|LongCatAudio|MiniMaxMusic|MusicLDM|SpectrogramDiffusion"
        r"|StableAudio",
        "makes sound",
        has_latents=False,
    ),
    Refusal(
        r"DDIM|DDPM|PNDM|IF|PRXPixel|ConsistencyModel|KarrasVe|RePaint|ScoreSde|ShapE",
        "works on pixels: it has no latents to encode once",
        has_latents=False,
    ),
    Refusal(
        r"Amused|VQDiffusion|LLaDA2|DiffusionGemma",
        "works on tokens from a codebook, and not on latents of a VAE",
        has_latents=False,
    ),
    Refusal(
        r"QwenImageLayered|QwenImage21|ZImageOmni|LongCatImage|JoyImageEdit|BriaFibo|Kandinsky5I2I|DreamLite",
        "encodes its prompts together with images, or with what another model makes of them",
    ),
    Refusal(r"GlmImage", "takes tokens that a language model of its own makes of a prompt and a size"),
    Refusal(r"OmniGen", "has no encode_prompt: its denoiser reads prompts as tokens"),
    Refusal(r"Kandinsky5", "packs the prompts of a batch into one row, so cond of a single prompt is not its own"),
    Refusal(
        r"StableCascade|Wuerstchen|UnCLIP|StableUnCLIP|Kandinsky(?![56])",
        "works in several stages, on embeddings or latents that a single VAE does not give",
    ),
    Refusal(r"Marigold|StableDiffusion(Latent)?Upscale|HunyuanImageRefiner", "takes more than an image and a prompt"),
    Refusal(r"Ideogram4", "lays a prompt out in one sequence with the image, whose size it must know"),
)


def refusal_of(class_name: object) -> Refusal | None:
    """Why a pipeline class is refused, by its name; None if no row names it."""
    pattern = r"(?:{})\w*Pipeline"
    return next((row for row in REFUSALS if re.fullmatch(pattern.format(row.names), str(class_name))), None)
