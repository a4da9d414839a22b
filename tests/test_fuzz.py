"""2,600 files, broken in 2,600 ways: no traceback, no hang, no flood of memory, and nothing forgotten."""

import io
import json
import os
import random
import resource
import shutil
import signal
from contextlib import contextmanager

import pytest
from PIL import Image, ImageCms
from rich.console import Console

from latentprep import LatentDataset, LatentLoader
from latentprep.cache import manifest as manifests
from latentprep.cache.manifest import open_manifest, read_skips
from latentprep.cache.storage import Storage
from latentprep.errors import UserError
from latentprep.look import tables
from latentprep.look.summary import describe_sample, summarize
from latentprep.look.verify import verify
from latentprep.options import TextOptions
from latentprep.prepare.source.captions import add_captions
from latentprep.prepare.source.listing import list_images
from latentprep.prepare.source.sources import open_source
from latentprep.records import REASONS
from tests.conftest import SMALL, gradient
from tests.test_encode import rows

FACTOR = int(os.environ.get("LATENTPREP_FUZZ", "1"))  # `make faults` has ten times as many
IMAGES, CAPTIONS, MANIFESTS, SHARDS = (count * FACTOR for count in (900, 300, 700, 700))

pytestmark = pytest.mark.slow


@contextmanager
def bounded(seconds, megabytes):
    """Fails where the inside hangs, or where the peak of this process's memory rises by more."""

    def hang(number, frame):
        raise AssertionError(f"more than {seconds} s")

    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    handler = signal.signal(signal.SIGALRM, hang)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, handler)
    grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1000
    assert grown < megabytes, grown


def mutate(data: bytes, luck: random.Random, start: int = 0, stop: int | None = None) -> bytes:
    """One to eight of: flipped bits, other bytes, extreme numbers, a piece cut out, doubled, zeroed; or a cut end."""
    found = bytearray(data)
    stop = len(found) if stop is None else min(stop, len(found))
    for _ in range(luck.choice((1, 1, 2, 4, 8))):
        if not found:
            break
        place, size = luck.randrange(start, max(start + 1, min(stop, len(found)))), luck.choice((1, 2, 4, 64))
        kind = luck.randrange(8)
        if kind == 0 and place < len(found):
            found[place] ^= 1 << luck.randrange(8)
        elif kind == 1:
            found[place : place + size] = luck.randbytes(size)
        elif kind == 2:
            found[place : place + 4] = luck.choice((b"\xff" * 4, b"\x7f\xff\xff\xff", b"\xff\xff\xff\x7f", b"\0" * 4))
        elif kind == 3:
            del found[place : place + size]
        elif kind == 4:
            found[place:place] = found[place : place + size]
        elif kind == 5:
            found[place : place + size] = bytes(len(found[place : place + size]))
        elif kind == 6:
            found[place:place] = luck.randbytes(size)
        elif luck.random() < 0.3:
            del found[luck.randrange(start, len(found) + 1) :]
    return bytes(found)


def seeds(folder):
    """A small image of every kind that people have, with what makes decoders complicated."""
    folder.mkdir()
    image = gradient(90, 70)
    alpha = image.copy()
    alpha.putalpha(Image.linear_gradient("L").resize(image.size))
    exif = Image.Exif()
    exif[0x0112] = 6
    profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("LAB")).tobytes()
    animated = {"save_all": True}
    for name, seed, options in (
        ("a.jpg", image, {"exif": exif}), ("b.jpg", image, {"progressive": True}), ("c.jpg", image.convert("CMYK"), {}),
        ("d.jpg", image, {"format": "MPO", **animated}),
        ("a.png", alpha, {"exif": exif}), ("b.png", image.quantize(9), {"transparency": 3}),
        ("c.png", image, {"icc_profile": profile}), ("d.png", image.convert("I;16"), {}),
        ("a.apng", image, {"format": "PNG", **animated}),
        ("a.webp", image, {}), ("b.webp", image, animated), ("c.webp", alpha, {"lossless": True}),
        ("a.gif", image, animated), ("a.tif", image, {}), ("b.tif", image, {"compression": "tiff_lzw"}),
        ("c.tif", image, animated), ("a.bmp", image, {}), ("a.tga", alpha, {}), ("a.ppm", image, {}),
        ("a.ico", alpha, {}), ("a.jp2", image, {}), ("a.avif", image, {}),
    ):  # fmt: skip
        if "save_all" in options:  # frames of its own: Pillow leaves the encoder of one save in them for the next
            options = {**options, "append_images": [image.rotate(30), image.rotate(60)]}
        seed.copy().save(folder / name, **options)
    return sorted(folder.iterdir())


def test_images(run, tmp_path):
    luck = random.Random(1)
    folder = tmp_path / "images"
    folder.mkdir()
    kinds = seeds(tmp_path / "seeds")
    for n in range(IMAGES):
        seed = kinds[n % len(kinds)]
        whole = seed.read_bytes()
        stop = luck.choice((40, 200, None))  # headers are where it hurts
        (folder / f"{n}{seed.suffix}").write_bytes(mutate(whole, luck, stop=stop))
    with bounded(300 * FACTOR, 900):
        result = run("encode", folder, "--out", tmp_path / "c", *SMALL, "--max-megapixels", 20)
    assert result.code == 0, result.out
    assert "FAILED" not in result.out
    cached, skips = rows(tmp_path / "c"), read_skips(Storage(tmp_path / "c"))
    assert len(cached) + len(skips) == IMAGES
    assert not cached.keys() & {skip.key for skip in skips}
    assert {skip.reason for skip in skips} <= set(REASONS)
    assert min(len(cached), len(skips)) > IMAGES // 5  # the mutations are neither too mild nor too wild
    assert run("verify", tmp_path / "c", "--source", folder).code == 0


def test_captions(images):
    luck = random.Random(2)
    text = "a photo of a cat, sitting, ünïcödé ☃".encode()
    messages = []
    line = json.dumps({"file_name": "wide0.png", "text": "a cat ☃ \ud83d"}).encode() + b"\n"
    with bounded(120 * FACTOR, 200):
        for n in range(CAPTIONS):
            (images / "tall0.txt").write_bytes(mutate(luck.choice((text, text.decode().encode("utf-16"))), luck))
            (images / "metadata.jsonl").write_bytes(mutate(line * 3, luck) if n % 2 else line)
            try:
                found = add_captions(list_images(open_source(images)), TextOptions())
            except UserError as error:
                messages.append(str(error))
                continue
            messages += [skip.detail for skip in found.skips]
            assert len(found.items) + len(found.skips) == 8
            for item in found.items:
                "".join(item.captions).encode()
    assert len(messages) > CAPTIONS // 10
    assert all("tall0.txt" in message or "metadata.jsonl" in message for message in messages)


@pytest.fixture
def cache(run, images, tmp_path):
    (images / "bad.png").write_bytes(b"no picture")
    shards = ("--shard-size", "60kB")
    assert run("encode", images, "--out", tmp_path / "c", *SMALL, *shards, "--flip").code == 0
    (images / "wide0.png").unlink()
    assert run("encode", images, "--out", tmp_path / "c", *SMALL, *shards, "--flip").code == 0
    return tmp_path / "c"


def use(cache):
    """Everything that reads a cache; returns how many of its ways were refused, each with one line."""
    refused = []
    for way in (read_all, look, lambda c: describe_sample(Storage(c), "tall1.png")):
        try:
            way(cache)
        except UserError as error:
            refused.append(str(error))
    verify(Storage(cache), lambda count: None)  # finds problems, and never fails
    assert not [message for message in refused if "\n" in message]
    return len(refused)


def look(cache):
    Console(file=io.StringIO()).print(tables.render_summary(summarize(Storage(cache))))


def read_all(cache):
    data = LatentDataset(cache, latent_sampling_method="random", flip_p=0.5, use_weight=True)
    if len(data) > 1000:
        return
    for batch in LatentLoader(data, batch_size=3):
        assert batch.latent_sample.shape[0] == len(batch)
        assert batch.cond is not None
    for n in range(len(data)):
        assert data.key(n)
        assert data.caption(n)
    data.uncond()


STRANGE = (
    None, True, -1, 0, 7, 2**31, 2**63, 10**30, 1e308, float("nan"), "", "x", "../../etc/passwd", "/", "a" * 5000,
    "\x1b[2J", [], {}, [[]], [None], [1, 2, 3], {"a": {"b": []}}, "\ud800",
)  # fmt: skip


def strange_json(value, luck):
    """A JSON value of which one leaf or branch is something else, or missing, or there twice."""
    if isinstance(value, dict) and value and luck.random() < 0.9:
        name = luck.choice(sorted(value))
        if luck.random() < 0.1:
            return {key: inner for key, inner in value.items() if key != name}
        return {**value, name: strange_json(value[name], luck)}
    if isinstance(value, list) and value and luck.random() < 0.9:
        place = luck.randrange(len(value))
        if luck.random() < 0.1:
            return [*value[:place], *value[place + 1 :]] if luck.random() < 0.5 else [*value, value[place]]
        return [*value[:place], strange_json(value[place], luck), *value[place + 1 :]]
    return luck.choice(STRANGE)


def test_manifests_and_skips(cache):
    luck = random.Random(3)
    good = {name: (cache / name).read_bytes() for name in ("cache.json", "skipped.jsonl")}
    data = json.loads(good["cache.json"])
    del data["blake2b"]
    refused = 0
    with bounded(240 * FACTOR, 400):
        for n in range(MANIFESTS):
            if n % 4 == 0:
                (cache / "cache.json").write_bytes(mutate(good["cache.json"], luck))
            elif n % 4 == 1:
                (cache / "skipped.jsonl").write_bytes(mutate(good["skipped.jsonl"], luck))
            else:  # by someone who knows how it is sealed
                body = json.dumps(strange_json(data, luck))[:-1] + ",\n"
                (cache / "cache.json").write_text(body + manifests._seal(body))
            refused += use(cache) > 0
            for name, content in good.items():
                (cache / name).write_bytes(content)
    assert refused > MANIFESTS // 3
    assert use(cache) == 0


def test_shards(cache):
    luck = random.Random(4)
    paths = sorted((cache / "shards").iterdir())
    good = {path: path.read_bytes() for path in [*paths, *cache.glob("uncond.*")]}
    refused = 0
    with bounded(240 * FACTOR, 400):
        for n in range(SHARDS):
            path = luck.choice(list(good))
            content = good[path]
            length = int.from_bytes(content[:8], "little")
            if n % 3 == 0:
                content = mutate(content, luck, stop=luck.choice((16, 8 + length, None)))
            else:
                header = json.loads(content[8 : 8 + length])
                if n % 3 == 1:
                    header = strange_json(header, luck)
                else:
                    metadata = strange_json(json.loads(header["__metadata__"]["latentprep"]), luck)
                    header["__metadata__"]["latentprep"] = json.dumps(metadata)
                text = json.dumps(header).encode("utf-8", "replace")
                content = len(text).to_bytes(8, "little") + text + content[8 + length :]
            path.write_bytes(content)
            refused += use(cache) > 0
            path.write_bytes(good[path])
    assert refused > SHARDS // 3
    assert use(cache) == 0
    assert open_manifest(Storage(cache)).num_images == 7
    shutil.rmtree(cache)
