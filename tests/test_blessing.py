"""cache/seal.py: no bytes are blessed unread. What is written from a stored file was checked by its hash first."""

import shutil

import pytest
import torch

from latentprep import LatentDataset
from latentprep.cache.manifest import open_manifest
from latentprep.cache.seal import check_seal, is_sealed
from latentprep.cache.storage import Storage
from latentprep.errors import UserError
from tests.conftest import SMALL
from tests.test_encode import files, rows

SHARDS = ("--shard-size", "30kB")


def flip(path, share=0.8):
    """Flip a bit behind the header, where no check but a hash sees it."""
    data = bytearray(path.read_bytes())
    start = 8 + int.from_bytes(data[:8], "little")
    data[start + int((len(data) - start) * share)] ^= 4
    path.write_bytes(data)


@pytest.fixture
def encode(run, images, tmp_path):
    return lambda *options: run("encode", images, "--out", tmp_path / "c", *SMALL, *SHARDS, *options)


def cond_of(cache):
    data = LatentDataset(cache, latent_sampling_method="deterministic")
    return {data.key(n): data[n].cond["prompt_embeds"] for n in range(len(data))}


def test_every_byte_of_a_file_is_under_its_seal(encode, tmp_path):
    encode()
    path = next((tmp_path / "c" / "shards").glob("*.latents.*"))
    data = path.read_bytes()
    assert is_sealed(data)
    for place in range(0, len(data), 97):
        assert not is_sealed(data[:place] + bytes([data[place] ^ 1]) + data[place + 1 :])
    assert not is_sealed(data + b"\0")
    assert not is_sealed(data[:-1])
    assert not is_sealed(b"")
    flip(path)
    with pytest.raises(UserError, match="its bytes have changed"):
        check_seal(Storage(tmp_path / "c"), f"shards/{path.name}")


@pytest.mark.parametrize("kind", ["latents", "text"])
def test_compact_leaves_a_damaged_shard_alone(run, encode, images, tmp_path, kind):
    encode()
    for n in range(2):
        (images / f"wide{2 * n}.png").unlink()  # one row of each of two shards
    encode()
    cache = tmp_path / "c"
    shard = next(s for s in open_manifest(Storage(cache)).shards if s.dead)
    name = shard.latents_name if kind == "latents" else shard.text_name
    flip(cache / name)
    before = (cache / name).read_bytes()
    result = run("compact", cache, "--min-share", 0)
    assert result.code == 1
    assert f"damaged  {cache}/{name}: damaged, its bytes have changed" in result.out
    assert (cache / name).read_bytes() == before
    assert "hash" in run("verify", cache).out
    (cache / name).unlink()
    assert encode().code == 0
    assert run("verify", cache).out.endswith("nothing wrong\n")


def test_a_new_caption_over_damaged_cond_encodes_all_of_it_again(run, encode, images, tmp_path):
    encode()
    cache = tmp_path / "c"
    shard = next(s for s in open_manifest(Storage(cache)).shards if "tall0.png" in rows_of(cache, s))
    flip(cache / shard.text_name, 0.9)
    (images / "tall0.txt").write_text("another caption")
    result = encode()
    assert (result.code, "damaged" in result.out, "It was made anew." in result.out) == (0, True, True)
    assert run("verify", cache).out.endswith("nothing wrong\n")
    shutil.copytree(cache, tmp_path / "healed")
    encode("--overwrite")
    fresh, healed = cond_of(cache), cond_of(tmp_path / "healed")
    assert all(torch.equal(fresh[key], healed[key]) for key in fresh)


def rows_of(cache, shard):

    return [row.key for row in shard.open_text(Storage(cache)).rows()]


@pytest.mark.parametrize("kind", ["latents", "text"])
def test_damaged_files_of_an_unfinished_run_are_made_anew(run, encode, tmp_path, kind):
    encode()
    cache = tmp_path / "c"
    wanted = files(cache)
    flip(next((cache / "shards").glob(f"*.{kind}.*")))
    (cache / "cache.json").unlink()
    assert encode().code == 0
    assert files(cache) == wanted
    assert rows(cache)


def test_damaged_cond_of_the_empty_prompt_is_made_anew(run, encode, images, tmp_path):
    encode()
    cache = tmp_path / "c"
    wanted = files(cache)
    flip(next(cache.glob("uncond.*")))
    (images / "tall0.txt").write_text("another caption")
    encode()
    name = next(cache.glob("uncond.*")).name
    assert (cache / name).read_bytes() == wanted[name]
