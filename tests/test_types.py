"""The reader's types, as mypy sees them in a user's script: the pages' loop is clean, and what is wrong is found."""

import os
import subprocess
import sys

import pytest

from tests.test_readme import ROOT, blocks

pytestmark = pytest.mark.slow

USER = """
import torch
from torch import Tensor
from torch.utils.data import DataLoader

from latentprep import BucketBatchSampler, LatentBatch, LatentDataset, LatentLoader, LatentMix


def use(data: LatentDataset, batch: LatentBatch) -> None:
    if batch.cond is not None and batch.weight is not None:
        print(batch.cond["prompt_embeds"] * batch.weight, data.uncond())


data = LatentDataset("photos.latents", latent_sampling_method="random")
for batch in LatentLoader(data, 4):
    moved = batch.to("cuda", torch.bfloat16, non_blocking=True)
    cond: dict[str, Tensor] = moved.cond
    use(data, moved)
train, val = data.split(0.05)
with_weight = LatentDataset("photos.latents", use_weight="raw", include_cond=False)
for other in LatentLoader(with_weight.select("a/*"), num_workers=2):
    weight: Tensor = other.weight
for mixed in LatentLoader([data, val], 4):
    print(mixed.cond["prompt_embeds"] * mixed.sample_weight)
floor: Tensor = LatentDataset("photos.latents", use_weight=0.1)[0].weight


def choose(flag: bool) -> Tensor:
    return LatentDataset("photos.latents", use_weight=flag)[0].weight  # wrong: perhaps no weight


mix = LatentMix([data, val], proportions=[1, 3])
loader = DataLoader(mix, batch_sampler=BucketBatchSampler(mix, 4), collate_fn=LatentDataset.collate)

data[0].weight + 1  # wrong: no use_weight
with_weight[0].cond["prompt_embeds"]  # wrong: include_cond=False
LatentDataset("photos.latents", latent_sampling_method="often")  # wrong: no such method
LatentDataset("photos.latents", use_weight="some")  # wrong: no such weight
LatentMix([data], same_images="once")  # wrong: no such way
LatentLoader("photos.latents")  # wrong: no dataset
data.split("half")  # wrong: no number
data[0:3]  # wrong: no index
"""


def check(script, tmp_path):
    """Lines of a script that mypy --strict finds fault with."""
    pytest.importorskip("mypy")
    (tmp_path / "user.py").write_text(script, encoding="utf-8")
    command = [sys.executable, "-m", "mypy", "--strict", "--config-file", str(ROOT / "pyproject.toml"), "user.py"]
    command.append("--allow-untyped-calls")  # Tensor.backward is none of ours
    options = ["--cache-dir", str(tmp_path / "mypy"), "--follow-imports", "silent"]
    environment = {**os.environ, "MYPYPATH": str(ROOT)}
    result = subprocess.run([*command, *options], capture_output=True, text=True, cwd=tmp_path, env=environment)
    assert result.stderr == ""
    return [line for line in result.stdout.splitlines() if line.startswith("user.py") and "error:" in line]


def test_the_loop_of_the_page_is_strictly_typed(tmp_path):
    (loop,) = [block for block in blocks("python") if "LatentLoader(" in block and "loss.backward()" in block]
    assert check(loop, tmp_path) == []


def test_what_is_wrong_in_a_users_script_is_found(tmp_path):
    wrong = {n for n, line in enumerate(USER.splitlines(), start=1) if "# wrong" in line}
    found = check(USER, tmp_path)
    assert {int(line.split(":")[1]) for line in found} == wrong, "\n".join(found)
