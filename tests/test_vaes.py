"""Every row of VAES: a miniature of its class against the class's own encode, and against diffusers' own pipelines."""

import json
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cache, partial
from inspect import getsource
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import diffusers
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from latentprep import LatentDataset
from latentprep.errors import UserError
from latentprep.personalized.models import make_live_vae
from latentprep.prepare.models import vae_config, vaes
from latentprep.prepare.models.files import class_of
from latentprep.prepare.models.tiles import can_tile
from latentprep.prepare.models.vae_config import build_vae
from latentprep.prepare.models.vae_encoder import LEVELS, to_levels
from latentprep.prepare.models.vae_folder import open_vae

CPU = torch.device("cpu")
FILE = "diffusion_pytorch_model.safetensors"
See = Callable[[Any, Tensor], Tensor]
MEAN, STD = [0.5, -0.5, 0.0, 1.0], [2.0, 1.0, 0.5, 3.0]


class Same:
    """A scheduler that adds no noise."""

    config = SimpleNamespace(sigma_data=1.0)

    def add_noise(self, latents: Tensor, noise: Tensor, timestep: Any) -> Tensor:
        return latents


def pipeline_of(name: str, vae: Any, mean: Tensor, **parts: Any) -> Any:
    """A pipeline of diffusers without its models, whose VAE says `mean` of any image."""
    pipeline = object.__new__(getattr(diffusers, name))
    encoded = SimpleNamespace(latents=mean, latent=mean)
    stub = SimpleNamespace(encode=lambda image: encoded, config=vae.config, dtype=mean.dtype, to=lambda dtype: None)
    stub.bn = getattr(vae, "bn", None)
    pipeline.__dict__.update(vae=stub, scheduler=Same(), **parts)
    return pipeline


def see_by_encode(name: str, vae: Any, mean: Tensor) -> Tensor:
    """_encode_vae_image of a pipeline."""
    is_video = "Qwen" in name
    pipeline = pipeline_of(name, vae, mean[:, :, None] if is_video else mean)
    if is_video:
        pipeline.latent_channels = mean.shape[1]
    found = pipeline._encode_vae_image(torch.zeros(1, 3, 8, 8), None)
    return found[:, :, 0] if is_video else found


def see_in_sdxl(vae: Any, mean: Tensor) -> Tensor:
    pipeline = pipeline_of("StableDiffusionXLImg2ImgPipeline", vae, mean)
    return pipeline.prepare_latents(torch.zeros(1, 3, 8, 8), None, len(mean), 1, mean.dtype, CPU, add_noise=False)


def see_in_wan(vae: Any, mean: Tensor) -> Tensor:
    parts = {"vae_scale_factor_temporal": 4, "vae_scale_factor_spatial": 8}
    pipeline = pipeline_of("WanVideoToVideoPipeline", vae, mean[:, :, None], **parts)
    video = torch.zeros(1, 3, 1, 8, 8)
    return pipeline.prepare_latents(video, len(mean), mean.shape[1], 8, 8, mean.dtype, CPU)[:, :, 0]


def see_in_sana(vae: Any, mean: Tensor) -> Tensor:
    """SANA-Sprint's at time 0: without noise."""
    pipeline = pipeline_of("SanaSprintImg2ImgPipeline", vae, mean, vae_scale_factor=32)
    size = (mean.shape[2] * 32, mean.shape[3] * 32)
    return pipeline.prepare_latents(
        torch.zeros(1, 3, 8, 8), torch.tensor(0.0), len(mean), mean.shape[1], *size, mean.dtype, CPU, None
    )


def see_in_hunyuan_image(vae: Any, mean: Tensor) -> Tensor:
    """The inverse of what its pipeline does before it decodes; it never encodes."""
    code = getsource(diffusers.HunyuanImagePipeline.__call__)
    assert "latents = latents.to(self.vae.dtype) / self.vae.config.scaling_factor\n" in code
    return mean * vae.config.scaling_factor


FOUR = {"block_out_channels": (8, 8, 16, 16), "norm_num_groups": 8, "layers_per_block": 1, "latent_channels": 4}
KL = {**FOUR, "down_block_types": ("DownEncoderBlock2D",) * 4, "up_block_types": ("UpDecoderBlock2D",) * 4}
CAUSAL = {"base_dim": 8, "z_dim": 4, "num_res_blocks": 1, "latents_mean": MEAN, "latents_std": STD}
DC = {
    "latent_channels": 8, "scaling_factor": 0.41, "attention_head_dim": 8, "decoder_block_types": "ResBlock",
    "encoder_block_types": ("ResBlock",) * 4 + ("EfficientViTBlock",) * 2,
    **{f"{part}_block_out_channels": (8,) * 6 for part in ("encoder", "decoder")},
    **{f"{part}_layers_per_block": (1,) * 6 for part in ("encoder", "decoder")},
}  # fmt: skip
HUNYUAN = {
    "in_channels": 3, "out_channels": 3, "latent_channels": 4, "block_out_channels": (32,) * 5 + (64,),
    "layers_per_block": 1, "spatial_compression_ratio": 32, "sample_size": 64, "scaling_factor": 0.75289,
}  # fmt: skip
TINY = {"encoder_block_out_channels": (8,) * 4, "decoder_block_out_channels": (8,) * 4}


@dataclass(frozen=True, kw_only=True)
class Miniature:
    """A small VAE of a class with random weights, and what must be found out about it."""

    kind: str
    config: Mapping[str, Any]
    see: See  # the VAE and means => what the denoiser sees in a pipeline
    factor: int = 8
    latent_channels: int = 4
    has_std: bool = True
    has_time: bool = False
    tiles: Mapping[str, int] | None = None  # fields of tiles of 8 latents, two of which are shared
    first: str = "encoder.conv_in.weight"  # its first layer
    colors: int = 3
    bits: bool = True  # whether the pipeline computes as a reader does, and every bit is the same

    def make(self) -> Any:
        kind = class_of(diffusers, self.kind)
        if kind is None:
            pytest.skip(f"diffusers {diffusers.__version__} has no {self.kind}")
        torch.manual_seed(0)
        vae = kind(**self.config).eval().requires_grad_(False)
        if hasattr(vae, "bn"):
            vae.bn.running_mean.normal_()
            vae.bn.running_var.uniform_(0.1, 4)
        return vae if self.has_time else vae.to(memory_format=torch.channels_last)

    def save(self, folder: Path, change: Callable[[Any], None] = lambda vae: None) -> Path:
        """Its config and the weights of its encoder alone: those of the decoder are never read."""
        vae = self.make()
        change(vae)
        vae.save_pretrained(folder)
        tensors = load_file(folder / FILE)
        save_file({name: t for name, t in tensors.items() if not name.startswith(("decoder", "post_quant"))},
                  folder / FILE, {"format": "pt"})  # fmt: skip
        return folder

    def load(self, folder: Path) -> Any:
        """The class's own object with the weights of a folder, as they lie in its file: on a CPU the last bit of a
        single latent depends on that.
        """
        vae = self.make()
        vae.load_state_dict(load_file(folder / FILE), strict=False, assign=True)
        return vae if self.has_time else vae.to(memory_format=torch.channels_last)

    def images(self, pixels: Tensor) -> Tensor:
        """What diffusers' class is given for [N,H,W,3] uint8."""
        values = to_levels(pixels, LEVELS).permute(0, 3, 1, 2)
        if self.colors == 4:
            values = torch.cat([values, torch.ones_like(values[:, :1])], dim=1)
        return values[:, :, None] if self.has_time else values

    @torch.inference_mode()
    def encode(self, vae: Any, pixels: Tensor) -> tuple[Tensor, Tensor | None]:
        """The class's own encode."""
        output = vae.encode(self.images(pixels))
        if not self.has_std:
            return (output.latent if "latent" in output else output.latents), None
        mean, std = output.latent_dist.mean, output.latent_dist.std
        return (mean[:, :, 0], std[:, :, 0]) if self.has_time else (mean, std)


SQUARE = {"tile_sample_min_size": 64, "tile_latent_min_size": 8}


def with_stride(side: int) -> dict[str, int]:
    return {f"tile_sample_{what}_{way}": length for what, length in (("min", side), ("stride", side * 3 // 4))
            for way in ("height", "width")}  # fmt: skip


PATCHED = {"is_residual": True, "in_channels": 12, "out_channels": 12, "patch_size": 2, "scale_factor_spatial": 16}
MINIATURES = {
    "SDXL": Miniature(kind="AutoencoderKL", config={**KL, "scaling_factor": 0.13025}, see=see_in_sdxl, tiles=SQUARE),
    "Playground 2.5": Miniature(
        kind="AutoencoderKL", config={**KL, "scaling_factor": 0.5, "latents_mean": MEAN, "latents_std": STD},
        see=see_in_sdxl, tiles=SQUARE, bits=False,
    ),
    "FLUX.1": Miniature(
        kind="AutoencoderKL", tiles=SQUARE, see=partial(see_by_encode, "FluxImg2ImgPipeline"),
        config={**KL, "scaling_factor": 0.3611, "shift_factor": 0.1159, "use_quant_conv": False,
                "use_post_quant_conv": False},
    ),
    "FLUX.2": Miniature(
        kind="AutoencoderKLFlux2", config=FOUR, see=partial(see_by_encode, "Flux2Pipeline"), tiles=SQUARE
    ),
    "Qwen-Image": Miniature(
        kind="AutoencoderKLQwenImage", config=CAUSAL, see=partial(see_by_encode, "QwenImageEditPipeline"),
        has_time=True, tiles=with_stride(64),
    ),
    "Qwen-Image 2.1": Miniature(
        kind="AutoencoderKLQwenImage21", see=partial(see_by_encode, "QwenImage21Pipeline"), factor=16, has_time=True,
        config={**CAUSAL, "decoder_base_dim": 8, "dim_mult": [1, 1, 2, 2, 2]}, tiles=with_stride(128), colors=4,
    ),
    "Wan 2.1": Miniature(
        kind="AutoencoderKLWan", config=CAUSAL, see=see_in_wan, has_time=True, tiles=with_stride(64), bits=False
    ),
    "Wan 2.2": Miniature(
        kind="AutoencoderKLWan", config={**CAUSAL, **PATCHED}, see=see_in_wan, factor=16, has_time=True,
        tiles=with_stride(64), bits=False,  # tiles are counted in its patches
    ),
    "SANA": Miniature(
        kind="AutoencoderDC", config=DC, see=see_in_sana, factor=32, latent_channels=8, has_std=False,
        tiles=with_stride(256),
    ),
    "HunyuanImage 2.1": Miniature(
        kind="AutoencoderKLHunyuanImage", config=HUNYUAN, see=see_in_hunyuan_image, factor=32
    ),
    "TAESD": Miniature(
        kind="AutoencoderTiny", config=TINY, see=see_in_sdxl, has_std=False, first="encoder.layers.0.weight"
    ),
    "TAEF1": Miniature(
        kind="AutoencoderTiny", config={**TINY, "latent_channels": 16, "scaling_factor": 0.9, "shift_factor": 0.1},
        see=partial(see_by_encode, "FluxImg2ImgPipeline"), latent_channels=16, has_std=False,
        first="encoder.layers.0.weight",
    ),
}  # fmt: skip
ALL = pytest.mark.parametrize("name", MINIATURES)


def random_pixels(height: int, width: int, count: int = 1) -> Tensor:
    """[N,H,W,3] uint8."""
    return torch.randint(0, 256, (count, height, width, 3), dtype=torch.uint8, generator=torch.Generator())


def check_same(found: Any, wanted: tuple[Tensor, Tensor | None]) -> None:
    """Raise AssertionError unless a Posterior is this mean and std, bit for bit."""
    assert torch.equal(found.mean, wanted[0])
    assert (found.std is None) == (wanted[1] is None)
    assert found.std is None or torch.equal(found.std, wanted[1])


@pytest.fixture(scope="module")
def folder_of(tmp_path_factory):
    """The folder of a miniature, by its name; each is made once."""
    return cache(lambda name: MINIATURES[name].save(tmp_path_factory.mktemp("vae")))


def test_every_row_has_a_miniature():
    assert {miniature.kind for miniature in MINIATURES.values()} == {row.name for row in vaes.VAES}


@ALL
def test_what_is_found_out_and_encoded_is_the_classes_own(name, folder_of):
    """Sizes vary from call to call, down to one latent: no class keeps anything of an image for the next."""
    miniature = MINIATURES[name]
    opened, vae = open_vae(folder_of(name)), miniature.load(folder_of(name))
    facts = (opened.factor, opened.latent_channels, opened.has_std, opened.has_time)
    assert facts == (miniature.factor, miniature.latent_channels, miniature.has_std, miniature.has_time)
    encoder, step = opened.open(CPU, torch.float32), opened.factor
    assert {part.partition(".")[0] for part, _ in encoder.vae.named_parameters()} <= {"encoder", "quant_conv"}
    for height, width, count in ((2, 3, 2), (1, 1, 1), (3, 1, 1)):
        pixels = random_pixels(height * step, width * step, count)
        check_same(encoder.encode(pixels.numpy()), miniature.encode(vae, pixels))
    if not opened.has_time:
        opened.check_modes(None, compile=True)
        return
    with pytest.raises(UserError, match=f"^--compile: not for {miniature.kind}, which takes videos"):
        opened.check_modes(None, compile=True)


@ALL
def test_the_denoiser_sees_what_it_sees_in_a_pipeline(name, folder_of):
    miniature = MINIATURES[name]
    vae = miniature.make()
    pixels = random_pixels(2 * miniature.factor, 4 * miniature.factor)
    mean, _ = miniature.encode(vae, pixels)
    try:
        wanted = miniature.see(vae, mean.clone())
    except AttributeError as error:  # an older diffusers
        pytest.skip(str(error))
    found = open_vae(folder_of(name)).normalization.apply(mean)
    assert found.shape == wanted.shape
    assert torch.equal(found, wanted) if miniature.bits else torch.allclose(found, wanted, rtol=1e-6, atol=1e-6)


@ALL
def test_what_overflows_in_float16_is_encoded_again_in_float32(name, tmp_path):
    """In a second thread, as a worker does it, while the first encodes the next."""

    def overflow(vae):
        vae.get_parameter(miniature.first).mul_(1e6)

    miniature = MINIATURES[name]
    opened = open_vae(miniature.save(tmp_path, overflow))
    encoder, exact = (opened.open(CPU, dtype) for dtype in (torch.float16, torch.float32))
    batches = [random_pixels(2 * opened.factor, size * opened.factor).numpy() for size in (2, 3)]
    with ThreadPoolExecutor(1) as behind:
        found = [behind.submit(encoder.finish, encoder.start(pixels), pixels) for pixels in batches]
    for one, pixels in zip(found, batches, strict=True):
        wanted = exact.encode(pixels)
        assert wanted.mean.isfinite().all()
        check_same(one.result(), (wanted.mean, wanted.std))
    assert encoder.num_retried == 2


@ALL
def test_tiles_are_the_classes_own_and_smaller_images_are_encoded_whole(name, folder_of):
    miniature = MINIATURES[name]
    opened, side = open_vae(folder_of(name)), 8 * miniature.factor
    if miniature.tiles is None:
        with pytest.raises(UserError, match=rf"^--tiling {side}: not for {miniature.kind}, for which .* no tiles that"):
            opened.open(CPU, torch.float32, tiling=side)
        return
    vae = miniature.load(folder_of(name))
    pixels = random_pixels(side + opened.factor, side + 2 * opened.factor)
    small = pixels[:, :side, :side]
    whole, whole_small = miniature.encode(vae, pixels), miniature.encode(vae, small)
    vae.enable_tiling()
    for field_name, value in miniature.tiles.items():
        assert hasattr(vae, field_name)
        setattr(vae, field_name, value)
    wanted = miniature.encode(vae, pixels)
    encoder = opened.open(CPU, torch.float32, tiling=side)
    check_same(encoder.encode(small.numpy()), whole_small)
    check_same(encoder.encode(pixels.numpy()), wanted)
    assert wanted[0].shape == whole[0].shape
    assert not torch.equal(wanted[0], whole[0])


def test_tiles_that_do_not_join_are_refused():
    """Wan's class takes the side of a tile's latents from its config, whatever its encoder makes."""
    config = {"_class_name": "AutoencoderKLWan", **CAUSAL, **PATCHED}
    for ratio, joins in ((16, True), (8, False), (0, False)):
        vae = build_vae({**config, "scale_factor_spatial": ratio}, "x").eval()
        assert can_tile(vae, 16) is joins


@ALL
def test_a_vae_in_memory_is_known_by_its_numbers_and_its_tiles(name, folder_of):
    miniature = MINIATURES[name]
    vae = miniature.make()
    plain = make_live_vae(vae, None)[0].facts("")
    opened = open_vae(folder_of(name))
    names = ("factor", "latent_channels", "has_std", "normalization")
    assert [getattr(plain, name) for name in names] == [getattr(opened, name) for name in names]
    vae.enable_tiling()
    vae.use_tiling = miniature.tiles is not None
    assert (make_live_vae(vae, None)[0].facts("").digest == plain.digest) is (miniature.tiles is None)


@pytest.mark.parametrize("name", [name for name in MINIATURES if name not in ("SDXL", "Playground 2.5")])
def test_fields_that_decide_which_vae_it_is_are_missed(name, folder_of):
    config = json.loads((folder_of(name) / "config.json").read_text())
    for missing in vaes.find_vae(MINIATURES[name].kind).required:
        with pytest.raises(UserError, match=f"^x: its config.json has no {missing}. Save the model again."):
            build_vae({field: value for field, value in config.items() if field != missing}, "x")


HUGE = 10**9
HOSTILE = [
    ("Qwen-Image", {"base_dim": HUGE}, "base_dim is 1000000000, expected 1 to 16384"),
    ("Qwen-Image", {"z_dim": None}, "z_dim is None, expected a value"),
    ("Qwen-Image", {"dim_mult": [1, HUGE]}, "dim_mult is .*, expected 1 to 10 numbers of 1 to 64"),
    ("Qwen-Image", {"dim_mult": [1] * 4000}, "dim_mult is"),
    ("Qwen-Image", {"dim_mult": HUGE}, "dim_mult is"),
    ("Qwen-Image", {"num_res_blocks": 65}, "num_res_blocks is 65, expected 1 to 64"),
    ("Qwen-Image", {"attn_scales": [1.0] * 10**5}, "attn_scales is"),
    ("Qwen-Image", {"attn_scales": HUGE}, "attn_scales is"),
    ("Qwen-Image", {"temperal_downsample": [True]}, "makes no AutoencoderKLQwenImage"),
    ("Qwen-Image", {"temperal_downsample": HUGE}, "temperal_downsample is"),
    ("Qwen-Image", {"input_channels": 4}, "input_channels is 4, expected 3"),  # Qwen-Image-Layered: true RGBA
    ("Qwen-Image", {"latents_std": [1.0] * 16}, "latents_std is .* expected 4 numbers"),
    ("Qwen-Image", {"dropout": float("nan")}, "makes no VAE that encodes an image"),
    ("Qwen-Image", {"base_dim": 2**14, "dim_mult": [64] * 10}, "asks for more than 4,294,967,296 numbers"),
    ("Qwen-Image 2.1", {"in_channels": 3}, "in_channels is 3, expected 4"),
    ("Qwen-Image 2.1", {"decoder_base_dim": 2**14 + 1}, "decoder_base_dim is 16385, expected 1 to 16384"),
    ("Wan 2.1", {"patch_size": 2}, "in_channels is 3, expected 12"),
    ("Wan 2.2", {"patch_size": 10**4000}, "in_channels is 12, expected 3"),
    ("Wan 2.2", {"in_channels": None}, "makes no AutoencoderKLWan"),
    ("Wan 2.2", {"latents_mean": None, "latents_std": None}, "latents_mean is None, expected a value"),
    ("Wan 2.2", {"scale_factor_spatial": HUGE}, "scale_factor_spatial is"),
    ("Wan 2.2", {"patch_size": [[[[2]]]]}, "in_channels is 12, expected 3"),
    ("SANA", {"encoder_block_out_channels": [8] * 5000}, "encoder_block_out_channels is"),
    ("SANA", {"encoder_layers_per_block": [1, 1, 1, 1, 1, 65]}, "encoder_layers_per_block is .* of 0 to 64"),
    ("SANA", {"decoder_layers_per_block": [1, 1, 1, 1, 1, -1]}, "decoder_layers_per_block is .* of 0 to 64"),
    ("SANA", {"encoder_block_types": ["ResBlock"]}, "makes no AutoencoderDC"),
    ("SANA", {"encoder_block_types": "x" * 10**5}, "encoder_block_types is"),
    ("SANA", {"encoder_qkv_multiscales": [[HUGE]] * 6}, "encoder_qkv_multiscales is"),
    ("SANA", {"encoder_qkv_multiscales": [[2**20]] * 6}, "asks for more than 4,294,967,296 numbers"),
    ("SANA", {"attention_head_dim": 0}, "attention_head_dim is 0, expected 1 to 16384"),
    ("SANA", {"scaling_factor": None}, "scaling_factor is None"),
    ("HunyuanImage 2.1", {"spatial_compression_ratio": 0}, "spatial_compression_ratio is 0, expected 1 to 1024"),
    ("HunyuanImage 2.1", {"spatial_compression_ratio": 1025}, "spatial_compression_ratio is 1025"),
    ("HunyuanImage 2.1", {"block_out_channels": [32, HUGE]}, "block_out_channels is"),
    ("HunyuanImage 2.1", {"sample_size": HUGE}, "sample_size is"),
    ("HunyuanImage 2.1", {"latent_channels": 7}, "makes no AutoencoderKLHunyuanImage"),
    ("TAESD", {"num_encoder_blocks": [1, 3, 3, 65]}, "num_encoder_blocks is .* of 1 to 64"),
    ("TAESD", {"num_decoder_blocks": [3, 3, 3, 0]}, "num_decoder_blocks is .* of 1 to 64"),
    ("TAESD", {"num_encoder_blocks": [1]}, "makes no AutoencoderTiny"),
    ("TAESD", {"upsampling_scaling_factor": HUGE}, "upsampling_scaling_factor is"),
    ("TAESD", {"latent_magnitude": HUGE}, "latent_magnitude is"),
]


@pytest.mark.parametrize(("name", "change", "message"), HOSTILE, ids=lambda value: str(value)[:60])
def test_hostile_configs_are_refused_in_one_line(name, change, message, folder_of, tmp_path):
    config = json.loads((folder_of(name) / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, **change}))
    (tmp_path / FILE).symlink_to(folder_of(name) / FILE)
    with pytest.raises(UserError, match=message) as caught:
        open_vae(tmp_path)
    assert str(caught.value).isprintable()
    assert len(str(caught.value)) < 600


def test_limits_name_fields_that_classes_have():
    known = set()
    for row in vaes.VAES:
        if (kind := class_of(diffusers, row.name)) is not None:
            known |= set(kind._get_init_keys(kind))
            assert set(row.required) <= set(kind._get_init_keys(kind)), row.name
    if all(class_of(diffusers, row.name) is not None for row in vaes.VAES):
        assert known >= {*vae_config.LIMITS, *vae_config.LISTS, *vae_config.INPUTS}


def test_a_vae_that_gives_no_std_is_encoded_and_read(folder_of, tmp_path, images, run):
    size = ("--resolution", 64, "--bucket-step", 32, "--min-side", 32)
    options = ("--model", folder_of("SANA"), "--no-cond", "--store-dtype", "float32", *size)
    result = run("encode", images, "--out", tmp_path / "c", *options)
    assert result.code == 0, result.err
    assert "store    mean: this VAE gives no std" in result.err
    data = LatentDataset(tmp_path / "c", latent_sampling_method="deterministic", include_cond=False)
    batch = data.__getitems__([0])
    assert (batch.latent_mean.shape[1], batch.latent_std) == (8, None)
    assert torch.equal(batch.latent_sample, batch.latent_mean * 0.41)
    assert run("verify", tmp_path / "c", "--source", images, "--re-encode", 2).code == 0
