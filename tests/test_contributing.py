"""CONTRIBUTING.md: its examples are short, and work as they stand there."""

import re
import sys
from collections.abc import Callable
from importlib import import_module
from io import BytesIO
from pathlib import Path
from types import ModuleType
from typing import Any
from zipfile import ZipFile

import pytest
import torch
from diffusers import AsymmetricAutoencoderKL, CogView3PlusPipeline

import latentprep
from latentprep import LatentDataset
from latentprep.cache.storage import Storage
from latentprep.errors import WriteError
from latentprep.prepare.models.text_folder import open_text
from latentprep.prepare.models.vae_encoder import LEVELS, to_levels
from latentprep.prepare.models.vae_folder import open_vae
from tests.conftest import SMALL, gradient
from tests.miniatures import make_t5, make_t5_tokenizer, make_vae

ROOT = Path(__file__).parent.parent
PAGE = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
EXAMPLES = [
    (path, table, code)
    for path, table, code in re.findall(
        r"^```python\n# (latentprep/[\w/]+\.py)(?:: a row of (\w+))?\n(.*?)^```", PAGE, re.MULTILINE | re.DOTALL
    )
]
Add = Callable[[str], None]


def module_name(path: str) -> str:
    return path.removesuffix(".py").removesuffix("/__init__").replace("/", ".")


@pytest.fixture
def add(monkeypatch) -> Add:
    """Does what the page says under a heading: add("a source") makes the file and adds the row."""

    def add_example(what: str) -> None:
        section = PAGE.partition(f"## Add {what}\n")[2].partition("\n## ")[0]
        assert section
        made: dict[str, Any] = {}
        for path, table, code in [example for example in EXAMPLES if example[2] in section]:
            name = module_name(path)
            if table:
                module = import_module(name)
                rows, scope = getattr(module, table), {**vars(module), **made}
                if isinstance(rows, dict):
                    monkeypatch.setitem(rows, *next(iter(eval(f"{{{code}}}", scope).items())))
                else:
                    row = eval(f"({code})", scope)
                    monkeypatch.setattr(module, table, type(rows)([*row, *rows]))
            else:
                module = ModuleType(name)
                monkeypatch.setitem(sys.modules, name, module)
                exec(compile(code, path, "exec"), vars(module))
                made |= {name.rpartition(".")[2]: module, **vars(module)}

    return add_example


def test_there_is_an_example_for_each_door_and_all_are_short():
    assert [table for _, table, _ in EXAMPLES if table] == ["SOURCES", "VAES", "FAMILIES", "ENGINES"]
    for path, table, code in EXAMPLES:
        assert not table or (ROOT / path).exists(), path
        lines = code.partition("@dataclass")[2] or code  # of the source without its imports
        assert len([line for line in lines.splitlines() if line.strip()]) < 30


def test_add_a_source(add, run, tmp_path):
    add("a source")
    folder = tmp_path / "zips"
    folder.mkdir()
    for number in range(2):
        with ZipFile(folder / f"{number}.zip", "w") as archive:
            file = BytesIO()
            gradient(64, 80 + number).save(file, "PNG")
            archive.writestr("sub/a.png", file.getvalue())
            archive.writestr("sub/a.txt", f"picture {number}")
    (folder / "broken.zip").write_bytes(b"no zip")
    result = run("encode", folder, "--out", tmp_path / "c", *SMALL)
    assert result.code == 0, result.err
    assert "skipped  1 unreadable_folder" in result.out
    data = LatentDataset(tmp_path / "c")
    assert sorted(data[n].cond_text[0] for n in range(2)) == ["picture 0", "picture 1"]
    assert run("verify", tmp_path / "c", "--source", folder, "--re-encode", 1).code == 0


def test_add_a_vae(add, run, images, tmp_path):
    """Only classes of the table are built, and one that is added is encoded with, bit for bit."""
    torch.manual_seed(0)
    sizes = {"down_block_out_channels": (8, 16), "up_block_out_channels": (8, 16), "norm_num_groups": 8}
    blocks = {"down_block_types": ("DownEncoderBlock2D",) * 2, "up_block_types": ("UpDecoderBlock2D",) * 2}
    vae = AsymmetricAutoencoderKL(**sizes, **blocks).eval()
    vae.save_pretrained(tmp_path / "vae")
    options = ("--model", tmp_path / "vae", "--no-cond", "--out", tmp_path / "c", "--resolution", "64")
    assert "its VAE is AsymmetricAutoencoderKL, expected AutoencoderKL, " in run("encode", images, *options).err
    add("a VAE")
    result = run("encode", images, *options, "--store-dtype", "float32")
    assert result.code == 0, result.err
    batch = LatentDataset(tmp_path / "c", latent_sampling_method="deterministic", include_cond=False)[0]
    assert torch.equal(batch.latent_sample, batch.latent_mean * 0.18215)
    pixels = torch.randint(0, 256, (1, 32, 48, 3), dtype=torch.uint8)
    opened = open_vae(tmp_path / "vae")
    with torch.no_grad():
        wanted = opened.load(torch.float32).eval().to(memory_format=torch.channels_last)
        wanted = wanted.encode(to_levels(pixels, LEVELS).permute(0, 3, 1, 2)).latent_dist
    found = opened.open(torch.device("cpu"), torch.float32).encode(pixels.numpy())
    assert torch.equal(found.mean, wanted.mean)
    assert torch.equal(found.std, wanted.std)


def test_add_a_family(add, tmp_path):
    torch.manual_seed(0)
    pipeline = CogView3PlusPipeline(
        make_t5_tokenizer(), make_t5(), make_vae(latent_channels=16), transformer=None, scheduler=None
    )
    pipeline.save_pretrained(tmp_path)
    with pytest.raises(latentprep.UserError, match="CogView3PlusPipeline"):
        open_text(tmp_path)
    add("a family")
    encoder = open_text(tmp_path).open(torch.device("cpu"), torch.float32)
    found = encoder.encode(["a cat", "a much longer prompt of a cat"])["prompt_embeds"]
    assert found.shape == (2, 224, 80)
    assert encoder.count_tokens(["a cat"]).tolist() == [7]


@pytest.mark.parametrize("is_added", [False, True])
def test_add_an_engine(add, run, images, tmp_path, monkeypatch, is_added):
    if is_added:
        add("an engine")
    write, failures = Storage.write_atomic, [WriteError("the disk was away")]

    def flaky(storage, name, data):
        if name.endswith(".latents.safetensors") and failures:
            raise failures.pop()
        return write(storage, name, data)

    monkeypatch.setattr(Storage, "write_atomic", flaky)
    result = run("encode", images, "--out", tmp_path / "c", *SMALL, "--shard-size", "30kB")
    assert failures == []
    assert result.code == (0 if is_added else 1), result.out
    assert len(LatentDataset(tmp_path / "c")) == (8 if is_added else 6)  # a unit of two
