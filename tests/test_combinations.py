"""Options as they meet: random combinations of everything that `encode` takes, verified and read."""

import json
import os
import random

import pytest
import torch
from PIL import Image

from latentprep import LatentDataset, LatentLoader
from tests.conftest import gradient

NUM_COMBINATIONS = 12 * int(os.environ.get("LATENTPREP_FUZZ", "1"))
# Groups of options of which one is drawn each; () is the default.
GROUPS = (
    [("--resolution", "64", "--bucket-step", "32", "--min-side", "32"),
     ("--resolution", "64", "--bucket-step", "32", "--min-side", "32", "--no-upscale"),
     ("--width", "64", "--height", "32"), ("--resolution", "native")],
    [(), ("--fit", "pad"), ("--fit", "stretch"), ("--crop", "random"), ("--crop", "focus"),
     ("--crop", "focus", "--crops", "2"), ("--crop", "random", "--crops", "3")],
    [(), ("--flip",)], [(), ("--filter", "nearest"), ("--filter", "bicubic")], [(), ("--no-draft",)],
    [(), ("--background", "keep"), ("--background", "red")], [(), ("--weights", "none"), ("--weights", "MASKS")],
    [(), ("--animated", "skip")], [(), ("--store", "mean")], [(), ("--store-dtype", "float32")],
    [(), ("--dtype", "bfloat16")], [(), ("--batch-size", "3")], [(), ("--shard-size", "30kB")],
    [(), ("--no-cond",), ("--max-tokens", "150"), ("--emphasis",), ("--clip-skip", "2")],
    [(), ("--template", "subject_filewords", "--placeholder", "sks")],
    [(), ("--prompts-per-image", "3", "--shuffle-tags"), ("--prompts-per-image", "2", "--caption-lines")],
    [(), ("--wildcards",)], [(), ("--cond-dtype", "int8")],
)  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Images of many kinds, captions of several lines, and masks for some of them."""
    folder = tmp_path_factory.mktemp("images")
    gradient(128, 40).save(folder / "wide.png")
    gradient(1030, 515).save(folder / "large.jpg", quality=90)
    gradient(64, 80).convert("L").save(folder / "gray.webp", lossless=True)
    gradient(70, 90).convert("CMYK").save(folder / "cmyk.tif")
    clear = gradient(96, 64)
    clear.putalpha(Image.linear_gradient("L").resize(clear.size))
    clear.save(folder / "clear.png")
    gradient(64, 64).save(folder / "moving.gif", save_all=True, append_images=[gradient(64, 64).rotate(90)])
    (folder / "wide.txt").write_text("a, {wide|broad} thing, (here:1.2)\na second caption", encoding="utf-8")
    (folder / "clear.txt").write_text(", ".join(f"tag {n}" for n in range(40)), encoding="utf-8")
    (folder / "masks").mkdir()
    Image.linear_gradient("L").resize((32, 10)).save(folder / "masks" / "wide.png")
    return folder


def draw(seed):
    rng = random.Random(seed)
    return [option for group in GROUPS for option in rng.choice(group)]


@pytest.mark.parametrize("seed", range(NUM_COMBINATIONS))
def test_combinations_of_options(run, folder, tmp_path, seed):
    options = [str(folder / "masks") if option == "MASKS" else option for option in draw(seed)]
    command = ("encode", folder, "--out", tmp_path / "c", "--model", "tiny", *options)
    result = run(*command)
    if result.code:  # some are refused: in one line, and with nothing written
        assert result.err.splitlines()[-1].startswith("error: --")
        assert not (tmp_path / "c" / "cache.json").exists()
        return
    assert "nothing to do" in run(*command).out
    found = json.loads(run("inspect", tmp_path / "c", "--json").out)
    num_files = 7 if "--weights" not in options or "none" in options else 6  # masks/wide.png is an image too, or a mask
    assert found["images"] + sum(found["skipped"].values()) == num_files
    checked = run("verify", tmp_path / "c", "--source", folder, "--re-encode", "7", "--json")
    assert checked.code == 0, checked.out
    data = LatentDataset(
        tmp_path / "c",
        latent_sampling_method="deterministic" if "mean" in options else "random",
        flip_p=0.5 if "--flip" in options else 0,
        use_weight=True,
    )
    batches = list(LatentLoader(data, batch_size=2))
    assert sorted(int(n) for batch in batches for n in batch.index) == list(range(found["images"]))
    for batch in batches:
        assert torch.isfinite(batch.latent_sample).all()
        assert batch.weight.shape[2:] == batch.latent_sample.shape[2:]
        assert ("--no-cond" in options) == (batch.cond is None)
