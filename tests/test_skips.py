"""A skip heals: it is tried again when what it depends on has changed. A fault of ours is no skip."""

import json

import pytest
from PIL import Image

from latentprep.prepare.images import decode
from latentprep.prepare.images import load as loading
from latentprep.prepare.images.pillow import is_image_name
from latentprep.prepare.source.folder import Folder
from tests.conftest import gradient

OPTIONS = ("--model", "tiny", "--resolution", 64, "--device", "cpu")


@pytest.fixture
def encode(run, images, tmp_path):
    def encode_images(*options):
        return run("encode", images, "--out", tmp_path / "c", *OPTIONS, *options)

    return encode_images


def skips(tmp_path):
    lines = (tmp_path / "c" / "skipped.jsonl").read_text(encoding="utf-8").splitlines()
    return {skip["key"]: skip for skip in map(json.loads, lines)}


def break_png(path):
    data = path.read_bytes()
    at = data.index(b"IDAT") + 10
    path.write_bytes(data[:at] + bytes([data[at] ^ 255]) + data[at + 1 :])


def test_a_skip_stays_while_nothing_has_changed(encode, images, tmp_path, monkeypatch):
    break_png(images / "wide0.png")
    assert "skipped  1 unreadable" in encode().out
    read = Folder.read

    def reads(self, key, limit):
        assert not is_image_name(key)  # no image is read for that
        return read(self, key, limit)

    monkeypatch.setattr(Folder, "read", reads)
    result = encode()
    assert "nothing to do" in result.out
    assert "skipped  1 unreadable" in result.out
    assert skips(tmp_path)["wide0.png"]["condition"].startswith("pillow ")


def test_another_decoder_tries_again(encode, images, monkeypatch):
    break_png(images / "wide0.png")
    encode()
    monkeypatch.setattr("latentprep.prepare.recipes.decoder_versions", lambda: "pillow 99")
    result = encode()
    assert "1 new" in result.out
    assert "skipped  1 unreadable" in result.out
    assert "nothing to do" in encode().out


def test_what_this_machine_caused_is_tried_again(encode, tmp_path, monkeypatch):
    read = Folder.read

    def fails(self, key, limit):
        if key == "wide0.png":
            raise OSError(5, "Input/output error")
        return read(self, key, limit)

    monkeypatch.setattr(Folder, "read", fails)
    assert "skipped  1 io_error (wide0.png: OSError: [Errno 5] Input/output error)" in encode().out
    assert skips(tmp_path)["wide0.png"]["condition"] == ""
    assert "skipped  1 io_error" in encode().out
    monkeypatch.undo()
    assert "1 new" in encode().out
    assert skips(tmp_path) == {}


def test_a_larger_limit_tries_again(encode, images, tmp_path):
    Image.new("RGB", (256, 256)).save(images / "icon.ico", sizes=[(256, 256)])
    Image.new("RGB", (1200, 1000)).save(tmp_path / "large.png")
    icon = (images / "icon.ico").read_bytes()
    icon = icon[: icon.index(b"\x89PNG")] + (tmp_path / "large.png").read_bytes()
    (images / "icon.ico").write_bytes(icon)  # that it is large is seen once it is decoded
    encode("--max-megapixels", 1)
    assert skips(tmp_path)["icon.ico"]["reason"] == "too_large"
    assert "nothing to do" in encode("--max-megapixels", 1).out
    assert "1 new" in encode("--max-megapixels", 3).out
    assert skips(tmp_path).get("icon.ico", {}).get("reason") != "too_large"


def test_retry_skipped_tries_all(encode, images, tmp_path):
    break_png(images / "wide0.png")
    encode()
    before = skips(tmp_path)
    assert "1 new" in encode("--retry-skipped").out
    assert skips(tmp_path) == before
    assert "nothing to do" in encode().out


def test_skips_of_a_run_that_did_not_finish_heal_too(encode, images, tmp_path, monkeypatch):
    break_png(images / "wide0.png")
    encode()
    (tmp_path / "c" / "cache.json").unlink()  # as a run that is killed leaves it
    (tmp_path / "c" / "skipped.jsonl").unlink()
    monkeypatch.setattr("latentprep.prepare.recipes.decoder_versions", lambda: "pillow 99")
    encode()
    assert skips(tmp_path)["wide0.png"]["condition"] == "pillow 99"
    assert "nothing to do" in encode().out


@pytest.mark.parametrize(
    ("part", "options"),
    [
        *((part, ()) for part in ("split_alpha", "to_srgb", "choose_crops", "place_weight", "cut", "new_hash")),
        *((part, ()) for part in ("decode_sound", "unturned_size", "resize_part")),
        *((part, ("--no-draft",)) for part in ("resize_part", "check_jpeg")),
    ],
)
def test_our_own_fault_is_named_and_no_skip(encode, images, tmp_path, monkeypatch, part, options):
    gradient(64, 80).save(images / "photo.jpg")
    encode(*options)
    before = (tmp_path / "c" / "cache.json").read_bytes()
    gradient(64, 82).save(images / "tall0.png")
    gradient(64, 82).save(images / "photo.jpg")
    gradient(40, 48).save(images / "small.png")  # which is enlarged

    def fails(*_args, **_options):
        raise KeyError("a fault of ours")

    monkeypatch.setattr(loading if hasattr(loading, part) else decode, part, fails)
    result = encode(*options)
    assert result.code == 1
    assert "FAILED" in result.out
    assert any(f"{name}: KeyError: 'a fault of ours'" in result.out for name in ("photo.jpg", "tall0.png", "small.png"))
    assert skips(tmp_path) == {}
    monkeypatch.undo()
    result = encode(*options)
    assert (result.code, skips(tmp_path)) == (0, {})
    assert before != (tmp_path / "c" / "cache.json").read_bytes()
