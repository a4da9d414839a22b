"""What the tests share: real photos, the built-in model, miniatures made from config classes, and the command line."""

import json
import os
import sys
from collections.abc import Callable
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Self

import pytest
import torch
from diffusers import AutoencoderKL, StableDiffusionPipeline
from PIL import Image
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

import latentprep
from latentprep.cache.normalization import Normalization
from latentprep.cli import commands as cli
from latentprep.prepare.devices import quiet_libraries
from latentprep.prepare.models.text_encoder import TextEncoder
from latentprep.prepare.models.vae_encoder import VaeEncoder
from latentprep.prepare.source import listing
from latentprep.prepare.source.folder import Folder, file_at
from latentprep.records import Item, Skip

quiet_libraries()
torch.set_num_threads(1)


HAS_CUDA = torch.cuda.is_available()
CUDA = torch.cuda.is_available, torch.cuda.device_count, os.environ.get("CUDA_VISIBLE_DEVICES")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Tests marked gpu are skipped without CUDA."""
    if not HAS_CUDA:
        for item in items:
            if item.get_closest_marker("gpu") is not None:
                item.add_marker(pytest.mark.skip(reason="needs CUDA"))


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item: pytest.Item) -> None:
    """All other tests run on a CPU, and so do the processes that they start: their numbers are those of a CPU."""
    torch.cuda.is_available, torch.cuda.device_count, visible = CUDA
    os.environ.pop("CUDA_VISIBLE_DEVICES", None)
    if item.get_closest_marker("gpu") is None:
        torch.cuda.is_available, torch.cuda.device_count, visible = lambda: False, lambda: 0, ""
    if visible is not None:
        os.environ["CUDA_VISIBLE_DEVICES"] = visible


TINY = Path(latentprep.__file__).parent / "tiny"
HELD_OUT = ("skimage/data/astronaut.png", "skimage/data/chelsea.png", "skimage/data/coffee.png")
PHOTOS = (
    *HELD_OUT,
    "skimage/data/rocket.jpg",
    "sklearn/datasets/images/china.jpg",
    "sklearn/datasets/images/flower.jpg",
)


def find_photo(name: str) -> Path:
    package, _, rest = name.partition("/")
    spec = find_spec(package)
    assert spec is not None
    assert spec.origin is not None
    return Path(spec.origin).parent / rest


@dataclass
class Result:
    code: int
    out: str
    err: str


Run = Callable[..., Result]


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> Run:
    """Runs the command line in this process: run("encode", "images", ...) -> exit code, stdout, stderr."""

    def run_cli(*arguments: object) -> Result:
        monkeypatch.setattr(sys, "argv", ["latentprep", *map(str, arguments)])
        capfd.readouterr()
        code = 0
        try:
            cli.main()
        except SystemExit as exit_:
            code = exit_.code if isinstance(exit_.code, int) else 1 if exit_.code else 0
        captured = capfd.readouterr()
        assert "Traceback" not in captured.err
        return Result(code, captured.out, captured.err)

    return run_cli


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    """A folder of six real photos of five sizes, some with captions."""
    folder = tmp_path / "photos"
    folder.mkdir()
    for name in PHOTOS:
        path = find_photo(name)
        (folder / path.name).write_bytes(path.read_bytes())
    (folder / "astronaut.txt").write_text("a woman in an orange suit\n", encoding="utf-8")
    (folder / "chelsea.caption").write_text("a ginger cat", encoding="utf-8")
    return folder


class NoBar:
    """A progress bar for tests that call encode() themselves: it shows nothing."""

    def __init__(self, total: int, stage: str = "") -> None:
        self.initial = 0

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        return None

    def set_postfix_str(self, text: str, refresh: bool = True) -> None:
        pass

    def update(self, count: int) -> None:
        pass


def read_item(path: Path, key: str) -> Item | Skip:
    """What a listing says of one file."""
    return listing.read_item(file_at(path, key), Folder(str(path.parent)))


def gradient(width: int, height: int, mode: str = "RGB") -> Image.Image:
    """A smooth picture in which no two rows, columns or channels are alike."""
    image = Image.new("RGB", (width, height))
    image.putdata(
        [(x * 255 // width, y * 255 // height, (x + 2 * y) % 256) for y in range(height) for x in range(width)]
    )
    return image.convert(mode)


@pytest.fixture
def images(tmp_path: Path) -> Path:
    """A folder of eight small drawn images: four in each of two buckets at 64 pixels, two with alpha."""
    folder = tmp_path / "images"
    folder.mkdir()
    for n in range(4):
        gradient(128, 40).rotate(180 * (n % 2)).point(lambda value, n=n: value // (n + 1)).save(folder / f"wide{n}.png")
        image = gradient(64, 80).rotate(180 * (n // 2))
        if n % 2:
            alpha = Image.linear_gradient("L").resize(image.size)
            image.putalpha(alpha.rotate(90 * (n // 2)))
        image.save(folder / f"tall{n}.png")
        (folder / f"tall{n}.txt").write_text(f"picture number {n}\n", encoding="utf-8")
    return folder


def scaled_by(factor: float, shift: float = 0.0) -> Normalization:
    """What a config with this scaling_factor and shift_factor asks for."""
    return Normalization((shift,), (factor,))


SMALL = ("--model", "tiny", "--resolution", "64", "--bucket-step", "32", "--min-side", "32")


def make_model(
    folder: Path, *, block_out_channels: tuple[int, ...] = (8, 8, 16, 16), hidden_size: int = 32, seed: int = 0
) -> Path:
    """A Stable Diffusion 1.x folder with random weights, in layout and classes as diffusers saves one."""
    torch.manual_seed(seed)
    count = len(block_out_channels)
    vae = AutoencoderKL(
        block_out_channels=block_out_channels,
        down_block_types=("DownEncoderBlock2D",) * count,
        up_block_types=("UpDecoderBlock2D",) * count,
        latent_channels=4,
        norm_num_groups=8,
        layers_per_block=1,
        scaling_factor=0.18215,
    )
    tokenizer = CLIPTokenizer.from_pretrained(TINY / "tokenizer")
    text_encoder = CLIPTextModel(
        CLIPTextConfig(
            vocab_size=514,
            hidden_size=hidden_size,
            intermediate_size=2 * hidden_size,
            num_hidden_layers=2,
            num_attention_heads=4,
            bos_token_id=512,
            eos_token_id=513,
            pad_token_id=513,
        )
    )
    pipeline = StableDiffusionPipeline(
        vae=vae,
        text_encoder=text_encoder,
        tokenizer=tokenizer,
        unet=None,
        scheduler=None,
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipeline.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model(tmp_path_factory.mktemp("model") / "sd")


@pytest.fixture(scope="session")
def miniature(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], tuple[Any, Path]]:
    """Stem of a family -> its whole pipeline, and the folder that it was saved to; each is made once."""
    from tests.miniatures import make_miniature

    made: dict[str, tuple[Any, Path]] = {}

    def make(stem: str) -> tuple[Any, Path]:
        if stem not in made:
            folder = tmp_path_factory.mktemp(stem)
            pipeline = make_miniature(stem, folder / "work")
            pipeline.save_pretrained(folder / "model")
            made[stem] = pipeline, folder / "model"
        return made[stem]

    return make


@pytest.fixture
def encoded(monkeypatch: pytest.MonkeyPatch) -> list[list[str]]:
    """The prompts that text encoders are asked for, call by call."""
    calls: list[list[str]] = []
    encode = TextEncoder.encode

    def note(self: TextEncoder, prompts: list[str]) -> Any:
        calls.append(list(prompts))
        return encode(self, prompts)

    monkeypatch.setattr(TextEncoder, "encode", note)
    return calls


def stop_at(monkeypatch: pytest.MonkeyPatch, call: int) -> list[int]:
    """Ctrl-C comes when the VAE is asked for the `call`-th time. Returns a list that has an entry for each time."""
    posterior, calls = VaeEncoder._posterior, list[int]()

    def stops(encoder: VaeEncoder, vae: Any, pixels: torch.Tensor) -> Any:
        calls.append(1)
        if len(calls) == call:
            raise KeyboardInterrupt(2)
        return posterior(encoder, vae, pixels)

    monkeypatch.setattr(VaeEncoder, "_posterior", stops)
    return calls


def spoil_latents(cache: Path) -> None:
    """Make the first number of every group of latents, in float16, one that is not finite."""
    for path in (cache / "shards").glob("*.latents.safetensors"):
        data = bytearray(path.read_bytes())
        start = 8 + int.from_bytes(data[:8], "little")
        for name, field in json.loads(data[8:start]).items():
            if name.endswith("latent_mean"):
                first = start + field["data_offsets"][0]
                data[first : first + 2] = b"\x00\x7e"  # NaN
        path.write_bytes(data)
