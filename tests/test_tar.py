"""prepare/source/tar.py: WebDataset tars as a source, whole runs and hostile files."""

import gzip
import io
import json
import os
import pickle
import random
import shutil
import tarfile
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
from PIL import Image
from safetensors.numpy import load_file

from latentprep.cache.manifest import read_skips
from latentprep.cache.storage import Storage
from latentprep.errors import UserError
from latentprep.options import TextOptions
from latentprep.prepare.source.captions import add_captions
from latentprep.prepare.source.folder import Folder
from latentprep.prepare.source.listing import list_images
from latentprep.prepare.source.masks import list_masks
from latentprep.prepare.source.members import MAX_EXTENSION, MAX_HEADERS
from latentprep.prepare.source.sources import open_source
from latentprep.prepare.source.tar import Tars
from tests.conftest import SMALL, gradient


def png(width=64, height=80, turn=0, alpha=False):
    image = gradient(width, height).rotate(turn)
    if alpha:
        image.putalpha(Image.linear_gradient("L").resize(image.size))
    file = io.BytesIO()
    image.save(file, "PNG")
    return file.getvalue()


def member(name, data=b"", **fields):
    header = tarfile.TarInfo(name)
    header.size, header.mtime = len(data), 1_700_000_000
    for field, value in fields.items():
        setattr(header, field, value)
    return header, data


def write_tar(path, members, mode="w", format=tarfile.GNU_FORMAT):  # noqa: A002
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, mode, format=format) as tar:
        for header, data in members:
            tar.addfile(header, io.BytesIO(data))
    return path


def sample(name, image, **texts):
    """An image and its .txt and .json, as img2dataset writes them."""
    yield member(f"{name}.png", image)
    for suffix, text in texts.items():
        yield member(f"{name}.{suffix}", text.encode())


@pytest.fixture
def tars(tmp_path):
    """Two good tars, with captions of each kind, alpha and a broken image; and one that is cut off."""
    folder = tmp_path / "tars"
    cat = json.dumps({"caption": "a cat of json", "url": "http://x", "width": 64})
    write_tar(
        folder / "00000.tar",
        [
            *sample("0000", png(), txt="a cat of txt", json=cat),
            *sample("0001", png(turn=180), json=cat),
            *sample("0002", png(alpha=True)),
            member("0003.png", b"no image"),
        ],
    )
    broken = bytearray(png(128, 40))
    broken[broken.index(b"IDAT") + 10] ^= 255
    write_tar(
        folder / "sub" / "00001.tar",
        [*sample("0000", png(128, 40), txt="wide"), member("0001.png", bytes(broken))],
    )
    whole = write_tar(folder / "cut.tar", [*sample("0000", png(turn=90), txt="first"), *sample("0001", png(60, 70))])
    with whole.open("r+b") as file:
        file.truncate(file.read().index(b"0001.png") + 512 + 100)
    return folder


def unpack(tars, to):
    for path in tars.rglob("*.tar"):
        with tarfile.open(path) as tar:
            try:
                tar.extractall(to / path.relative_to(tars), filter="data")
            except tarfile.ReadError:  # the one that is cut off
                (to / path.relative_to(tars) / "0001.png").unlink()


def latents(cache):
    """Content hash of an image -> what is stored of it, of every row."""
    found = {}
    for path in cache.glob("shards/*.latents.safetensors"):
        tensors = load_file(path)
        for name in tensors:
            label, _, field = name.rpartition("/")
            if field == "digest":
                fields = ("latent_mean", "latent_std", "weight", "crop")
                for row, digest in enumerate(tensors[name]):
                    of_row = [tensors[f"{label}/{f}"][row].tobytes() for f in fields if f"{label}/{f}" in tensors]
                    found[digest.tobytes()] = of_row
    return found


def skips(cache):
    return {skip.key: (skip.reason, skip.detail) for skip in read_skips(Storage(str(cache)))}


@pytest.fixture
def encode(run, tars, tmp_path):
    return lambda *options: run("encode", tars, "--out", tmp_path / "c", *SMALL, *options)


# whole runs


def test_tars_are_encoded_like_the_same_files_unpacked(run, encode, tars, tmp_path):
    result = encode()
    assert result.code == 0
    assert "6 images; captions: 3 from .txt, 1 from .json, 2 from file names" in result.err
    assert skips(tmp_path / "c") == {
        "00000.tar/0003.png": (
            "not_an_image",
            "its bytes are of no image format that Pillow knows, whatever its .png says",
        ),
        "cut.tar": ("unreadable_folder", skips(tmp_path / "c")["cut.tar"][1]),
        "sub/00001.tar/0001.png": ("unreadable", skips(tmp_path / "c")["sub/00001.tar/0001.png"][1]),
    }
    assert skips(tmp_path / "c")["cut.tar"][1].startswith("ends within 0001.png: ")
    unpack(tars, tmp_path / "folder")
    assert run("encode", tmp_path / "folder", "--out", tmp_path / "d", *SMALL).code == 0
    assert len(latents(tmp_path / "c")) == 5
    assert latents(tmp_path / "c") == latents(tmp_path / "d")
    said = run("inspect", tmp_path / "c", "--key", "00000.tar/0001.png").out
    assert "a cat of json" in said
    assert encode().out.count("nothing to do") == 1
    assert run("verify", tmp_path / "c", "--source", tars, "--re-encode", 3).code == 0


def test_an_appended_member_and_an_appended_tar_read_nothing_of_the_others(encode, tars, tmp_path):
    encode()
    write_tar(tars / "00000.tar", sample("0009", png(70, 90)), mode="a")
    write_tar(tars / "00002.tar", sample("0000", png(80, 64)))
    result = encode()
    assert "2 new" in result.out
    assert "hash " not in result.err
    assert len(latents(tmp_path / "c")) == 7


def test_a_changed_member_is_a_changed_image(run, encode, tars, tmp_path):
    encode()
    before = latents(tmp_path / "c")
    shutil.rmtree(tars / "sub")
    write_tar(tars / "00000.tar", [*sample("0000", png(66, 80), txt="a cat of txt"), *sample("0001", png(turn=180))])
    problems = json.loads(run("verify", tmp_path / "c", "--source", tars, "--json").out)["problems"]
    assert {(p["name"], p["problem"]) for p in problems} >= {
        ("00000.tar/0000.png", "changed"), ("00000.tar/0002.png", "gone"), ("sub/00001.tar/0000.png", "gone"),
    }  # fmt: skip
    result = encode("--allow-gone")
    assert "encoded  1 image" in result.out
    assert "1 changed" in result.out
    assert len(latents(tmp_path / "c").keys() - before.keys()) == 1


def test_a_tar_of_the_same_files_in_another_order_is_only_touched(encode, tars, tmp_path):
    encode()
    with tarfile.open(tars / "00000.tar") as tar:
        members = [(header, tar.extractfile(header).read()) for header in tar]
    write_tar(tars / "00000.tar", reversed(members))
    result = encode()
    assert "touched" in result.out
    assert "encoded  nothing" in result.out
    assert "nothing to do" in encode().out


def test_equal_length_and_another_time_is_seen_in_place(tars):
    first = [*sample("0000", png())]
    write_tar(tars / "x.tar", first)
    (before,) = (item for item in list_images(open_source(tars)).items if item.key.startswith("x.tar"))
    first[0][0].mtime += 1
    write_tar(tars / "x.tar", first)
    (after,) = (item for item in list_images(open_source(tars)).items if item.key.startswith("x.tar"))
    assert after.nbytes == before.nbytes
    assert after.version != before.version
    assert 0 <= after.version < 2**62


def test_what_a_cut_tar_had_stays_in_the_cache(encode, tars, tmp_path):
    encode()
    whole = (tars / "00000.tar").read_bytes()
    (tars / "00000.tar").write_bytes(whole[: whole.index(b"0001.png") + 600])
    result = encode()
    assert "unread   2 images cannot be read now, what the cache has stays: 00000.tar/0001.png" in result.err
    assert skips(tmp_path / "c").keys() >= {"00000.tar", "cut.tar"}
    (tars / "00000.tar").write_bytes(whole)
    encode()
    assert "nothing to do" in encode().out


def test_a_tar_without_permission_costs_no_row(encode, tars, monkeypatch):
    encode()
    opened = os.open

    def denied(path, *arguments, **options):
        if str(path).endswith("00000.tar"):
            raise PermissionError(13, "Permission denied")
        return opened(path, *arguments, **options)

    monkeypatch.setattr(os, "open", denied)
    assert "unread   3 images cannot be read now" in encode().err
    monkeypatch.undo()
    encode()
    assert "nothing to do" in encode().out


def test_one_tar_is_a_source_too(run, tars, tmp_path):
    result = run("encode", tars / "00000.tar", "--out", tmp_path / "d", *SMALL)
    assert "3 images" in result.err
    assert run("inspect", tmp_path / "d", "--key", "00000.tar/0002.png").code == 0
    assert run("verify", tmp_path / "d", "--source", tars / "00000.tar").code == 0


def test_masks_in_tars(run, tars, tmp_path):
    file = io.BytesIO()
    Image.new("L", (64, 80), 51).save(file, "PNG")
    write_tar(tmp_path / "masks" / "00000.tar", [member("0000.png", file.getvalue())])
    result = run("encode", tars, "--out", tmp_path / "c", *SMALL, "--weights", tmp_path / "masks")
    assert "1 of 6 images have one" in result.err
    assert "1 image weighted by a mask" in result.out
    assert run("verify", tmp_path / "c", "--source", tars, "--re-encode", 5).code == 0
    write_tar(tmp_path / "masks" / "00000.tar", [member("0000.png", b"no image")])
    masks = list_masks(tmp_path / "masks")
    assert masks.locate(masks.find("00000.tar/0000.jpg")) == f"{tmp_path / 'masks'}/00000.tar/0000.png"


def test_a_source_of_tars_that_vanishes_stops_the_run(encode, tars, tmp_path, monkeypatch):
    read = Tars.read

    def unplugged(self, key, limit):
        if key.endswith("0002.png"):
            tars.rename(tmp_path / "elsewhere")
        return read(self, key, limit)

    monkeypatch.setattr(Tars, "read", unplugged)
    result = encode("--workers", 1)
    assert (result.code, f"SOURCE {tars}: vanished while its images were read" in result.err) == (1, True)


# which sources are tars


def test_which_row_takes_a_path(tars, tmp_path):
    assert isinstance(open_source(tars), Tars)
    assert isinstance(open_source(tars / "cut.tar"), Tars)
    (tars / "notes.txt").write_text("x")
    assert isinstance(open_source(tars), Tars)
    (tars / "sub" / "photo.png").write_bytes(png())
    assert isinstance(open_source(tars), Folder)
    (tmp_path / "texts").mkdir()
    (tmp_path / "texts" / "a.txt").write_text("x")
    assert isinstance(open_source(tmp_path / "texts"), Folder)
    with pytest.raises(UserError, match=r"a file, expected a folder of images"):
        open_source(tmp_path / "texts" / "a.txt")


@pytest.mark.parametrize(
    ("name", "data", "detail"),
    [
        ("x.tar.gz", b"\x1f\x8b", "a compressed tar, of which no image can be read by itself. Decompress it to a .tar"),
        ("x.tgz", b"\x1f\x8b", "a compressed tar"),
        ("x.tar", gzip.compress(b"x" * 2000, mtime=0), "a gzip file, expected a tar that is not compressed"),
        ("x.tar", b"PK\x03\x04" + bytes(600), "a zip file, expected a tar"),
        ("x.tar", b"", "an empty file, expected a tar"),
        ("x.tar", b"text" * 1000, "no tar (invalid header)"),
        ("x.tar", b"short", "no tar (truncated header)"),
    ],
)
def test_what_is_no_tar_is_said_in_one_line(run, tmp_path, name, data, detail):
    (tmp_path / "tars").mkdir()
    (tmp_path / "tars" / name).write_bytes(data)
    for source in (tmp_path / "tars", tmp_path / "tars" / name):
        result = run("encode", source, "--out", tmp_path / "c", *SMALL)
        assert result.code == 1
        assert result.err.splitlines()[-1].startswith(f"error: SOURCE {source}: none of its 1 images can be used (")
        assert f"{name}: unreadable_folder, {detail}" in result.err


def test_pipes_named_as_tars_are_not_waited_for(tars):
    os.mkfifo(tars / "pipe.tar")
    found = {skip.key: skip for skip in list_images(open_source(tars)).skips}
    assert (found["pipe.tar"].reason, "not a regular file" in found["pipe.tar"].detail) == ("unreadable_folder", True)


# captions


def captions(source, **options):
    return add_captions(list_images(open_source(source)), TextOptions(**options))


def of(found):
    return {item.key.partition("/")[2]: (item.captions, item.caption_origin) for item in found.items}


def test_captions_of_json_stand_behind_texts_unless_a_column_is_asked_for(tmp_path):
    both, other = '{"text": "of text", "caption": "of caption"}', '{"width": 3}'
    write_tar(
        tmp_path / "x.tar",
        [
            *sample("a", png(), json=both, txt="of txt"), *sample("b", png(), json=both),
            *sample("c", png(), json='{"caption": "of caption", "more": ["1", "2"]}'),
            *sample("d.e", png(), json=other, txt="second dot"), *sample("f", png(), json=other),
            *sample("g", png(), json='{"caption": null}'), member("lost.json", b"{}"), member("lost.txt", b"x"),
            member("metadata.jsonl", b'{"file_name": "f.png", "text": "of a table"}'),
        ],
    )  # fmt: skip
    found = captions(tmp_path)
    assert of(found) == {
        "a.png": (("of txt",), "txt"), "b.png": (("of text",), "json"), "c.png": (("of caption",), "json"),
        "d.e.png": (("second dot",), "txt"), "f.png": (("of a table",), "metadata"), "g.png": (("",), "json"),
    }  # fmt: skip
    assert found.without_image == ["x.tar/lost.txt"]
    assert found.ignored == {".json": 1}


def test_a_column_that_is_asked_for(tmp_path):
    rows = [
        *sample("a", png(), json='{"more": ["1", "2"], "caption": "x"}', txt="of txt"),
        *sample("b", png(), txt="t"),
    ]
    write_tar(tmp_path / "x.tar", rows)
    found = captions(tmp_path, caption_columns=("more", "caption"))
    assert of(found) == {"a.png": (("1", "2", "x"), "json"), "b.png": (("t",), "txt")}
    (skip,) = captions(tmp_path, caption_columns=("tags",)).skips
    assert (skip.key, skip.reason) == ("x.tar/a.png", "bad_caption")
    assert skip.detail == (
        "x.tar/a.json: no column 'tags', only 'more', 'caption'. Say which holds the captions: --caption-column NAME."
    )
    write_tar(tmp_path / "x.tar", sample("a", png(), txt="t"))
    with pytest.raises(UserError, match=r"^--caption-column more: SOURCE .*metadata.parquet, .json beside images\.$"):
        captions(tmp_path, caption_columns=("more",))


@pytest.mark.parametrize(
    ("text", "detail"),
    [
        ("{", "x.tar/a.json: not a JSON object. Mend or remove it."),
        ("[" * 99_999, "x.tar/a.json: not a JSON object. Mend or remove it."),
        ("[1]", "x.tar/a.json: not a JSON object. Mend or remove it."),
        ('{"text": 3}', "x.tar/a.json: expected a text or a list of texts as 'text', got 3."),
        ('{"text": "' + "x" * 2**20 + '"}', "x.tar/a.json: 1.0 MB, expected at most 1.0 MB. Shorten it."),
        (
            '{"text": "' + "x" * 70_000 + '"}',
            "x.tar/a.json: a caption of over 64,000 characters as 'text'. Shorten it.",
        ),
    ],
)
def test_json_that_cannot_be_used_skips_its_image_alone(tmp_path, text, detail):
    write_tar(tmp_path / "x.tar", [*sample("a", png(), json=text), *sample("b", png(), txt="fine")])
    found = captions(tmp_path)
    assert [(skip.key, skip.detail) for skip in found.skips] == [("x.tar/a.png", detail)]
    assert len(found.items) == 1


def test_json_beside_photos_in_a_folder_is_no_caption(tmp_path):
    (tmp_path / "a cat.png").write_bytes(png())
    (tmp_path / "a cat.json").write_text('{"text": "of another program", "caption": "x"}')
    found = captions(tmp_path)
    assert found.items[0].captions == ("a cat",)
    assert found.ignored == {".json": 1}
    with pytest.raises(UserError, match=r"holds no metadata.jsonl, metadata.csv, metadata.parquet\.$"):
        captions(tmp_path, caption_columns=("caption",))


# members


def keys(folder):
    found = list_images(open_source(folder))
    return [item.key for item in found.items], {skip.key: (skip.reason, skip.detail) for skip in found.skips}


@pytest.mark.parametrize("kind", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_members_are_those_that_tarfile_finds(tmp_path, kind):
    names = ["a.png", "./b/c.png", "b//./d.txt", "d" * 90 + "/" + "e" * 90 + ".png"]
    names += [] if kind == tarfile.USTAR_FORMAT else ["l" * 300 + "/" + "m" * 250 + ".png", "größe ☃.png"]
    rows = [
        member(name, f"{n}".encode() * n * 400, mtime=n + 0.5 * (kind == tarfile.PAX_FORMAT))
        for n, name in enumerate(names)
    ]
    path = write_tar(tmp_path / "x.tar", rows, format=kind)
    files = {file.key: (file.open().read(), file.version) for file in open_source(path).list()}
    with tarfile.open(path) as tar:
        wanted = {
            "x.tar/" + "/".join(p for p in m.name.split("/") if p not in ("", ".")): tar.extractfile(m).read()
            for m in tar
        }
    assert {key: data for key, (data, _) in files.items()} == wanted
    assert {key: open_source(path).read(key, 10**6) for key in files} == wanted
    assert len({version for _, version in files.values()}) == len(names)
    assert open_source(path).read("x.tar/b/c.png", 10) == b"1" * 11


def test_links_devices_and_sparse_members_are_not_followed(tmp_path):
    sparse = bytearray(tarfile.TarInfo("old.png").tobuf(tarfile.GNU_FORMAT))
    sparse[124:136], sparse[156:157], sparse[482] = b"00000001000\0", b"S", 1
    sparse[148:156] = b" " * 8
    sparse[148:156] = b"%06o\0 " % sum(sparse)
    rows = [
        member("real.png", png()), member("hard.png", type=tarfile.LNKTYPE, linkname="real.png"),
        member("soft.png", type=tarfile.SYMTYPE, linkname="/etc/passwd"),
        member("soft.txt", type=tarfile.SYMTYPE, linkname="/etc/passwd"), member("pipe.png", type=tarfile.FIFOTYPE),
        member("new.png", b"1\n0\n1\n", pax_headers={"GNU.sparse.major": "1", "GNU.sparse.name": "new.png"}),
        member("folder.png", type=tarfile.DIRTYPE), member(".hidden.png", png()), member("._real.png", b"of a Mac"),
        member("a/.b/c.png", png()),
    ]  # fmt: skip
    path = write_tar(tmp_path / "x.tar", rows, format=tarfile.PAX_FORMAT)
    data = path.read_bytes()
    at = data.index(b"real.png")
    path.write_bytes(bytes(sparse) + bytes(512) + b"s" * 512 + data[at:])
    found, skipped = keys(tmp_path)
    assert found == ["x.tar/real.png"]
    assert skipped.keys() == {f"x.tar/{name}.png" for name in ("old", "hard", "soft", "pipe", "new")}
    assert {detail for _, detail in skipped.values()} == {
        "a link or another special member of a tar, not a regular file"
    }
    with pytest.raises(OSError, match="a link or another special member"):
        open_source(tmp_path).read("x.tar/soft.txt", 10)


def test_names_that_lead_outside_are_skips(run, tmp_path):
    rows = [
        member(name, png()) for name in ("/etc/a.png", "../b.png", "c/../../d.png", "e\x1b[2J.png", "..f.png", "g.png")
    ]
    write_tar(tmp_path / "tars" / "x.tar", rows)
    found, skipped = keys(tmp_path / "tars")
    assert found == ["x.tar/e\x1b[2J.png", "x.tar/g.png"]
    assert skipped == {
        f"x.tar/{name}.png": ("unreadable", "its name leads outside of the source")
        for name in ("/etc/a", "../b", "c/../../d")
    }
    result = run("encode", tmp_path / "tars", "--out", tmp_path / "c", *SMALL)
    assert (result.code, "\x1b" in result.out + result.err) == (0, False)
    assert run("verify", tmp_path / "c", "--source", tmp_path / "tars").code == 0


def test_of_equal_names_the_last_counts_as_in_unpacking(tmp_path):
    rows = [
        member("a.png", png(10, 20)),
        member("./a.png", png(30, 40)),
        member("b.png", png()),
        member("b.png", b"no"),
    ]
    write_tar(tmp_path / "x.tar", rows)
    listing = list_images(open_source(tmp_path))
    assert [(item.key, item.size) for item in listing.items] == [("x.tar/a.png", (40, 30))]
    assert [skip.key for skip in listing.skips] == ["x.tar/b.png"]
    assert listing.source.read("x.tar/a.png", 10**6) == png(30, 40)
    assert open_source(tmp_path).read("x.tar/a.png", 10**6) == png(30, 40)


def pax(records):
    return member("PaxHeaders", records, type=tarfile.XHDTYPE)


@pytest.mark.parametrize(
    ("rows", "detail"),
    [
        ([pax(b"9" * 18 + b" path=x\n")], "damaged at byte 0: no pax header"),
        ([pax(b"0 path=x\n")], "damaged at byte 0: no pax header"),
        ([pax(b"path\n")], "damaged at byte 0: no pax header"),
        ([pax(b"11 size=-5\n"), member("a.png")], "damaged at byte 0: a size of '-5'"),
        ([pax(b"17 size=99999999\n"), member("a.png")], "ends within a.png: "),
        ([pax(b"0" * (MAX_EXTENSION + 1))], "a header of 1,048,577 bytes at byte 0, expected at most 1048576"),
        (
            [member("x", b"n\0", type=tarfile.GNUTYPE_LONGNAME)] * MAX_HEADERS,
            "more than 64 headers of one member at byte 0",
        ),
        ([member("x", b"n\0", type=tarfile.GNUTYPE_LONGNAME)], "ends within the headers of the member at byte 0"),
        (
            [member("x", size=2**80, type=tarfile.XGLTYPE)],
            "damaged at byte 0: a size of 1,208,925,819,614",
        ),
        ([member("x", size=2**63 - 1024, type=tarfile.GNUTYPE_LONGLINK)], "damaged at byte 0: a size of 9,223,372,036"),
    ],
)
def test_crafted_headers_end_their_tar_and_no_more(tmp_path, rows, detail):
    with (tmp_path / "x.tar").open("wb") as file:
        for header, data in rows:
            file.write(header.tobuf(tarfile.GNU_FORMAT) + data + bytes(-len(data) % 512))
    write_tar(tmp_path / "y.tar", sample("fine", png()))
    started = time.perf_counter()
    found, skipped = keys(tmp_path)
    assert found == ["y.tar/fine.png"]
    assert skipped["x.tar"][0] == "unreadable_folder"
    assert skipped["x.tar"][1].replace("1,048,576", "1048576").startswith(detail)
    assert time.perf_counter() - started < 2


def test_a_pax_header_of_many_records_takes_no_time(tmp_path):
    records = b"6 a=b\n" * (MAX_EXTENSION // 6)
    with (tmp_path / "x.tar").open("wb") as file:
        for header, data in [pax(records), *sample("a", png())]:
            file.write(header.tobuf(tarfile.GNU_FORMAT) + data + bytes(-len(data) % 512))
    started = time.perf_counter()
    assert keys(tmp_path)[0] == ["x.tar/a.png"]
    assert time.perf_counter() - started < 2


def test_sizes_below_zero_and_damage_in_the_middle(tmp_path):
    path = write_tar(tmp_path / "x.tar", [*sample("a", png()), *sample("b", png()), *sample("c", png())])
    data = bytearray(path.read_bytes())
    at = data.index(b"b.png")
    data[at + 124 : at + 136] = b"\xff" * 12
    data[at + 148 : at + 156] = b" " * 8
    data[at + 148 : at + 156] = b"%06o\0 " % sum(data[at : at + 512])
    path.write_bytes(data)
    assert keys(tmp_path) == (
        ["x.tar/a.png"], {"x.tar": ("unreadable_folder", f"damaged at byte {at:,}: a size of -1 bytes")},
    )  # fmt: skip
    data[at + 100] ^= 255
    path.write_bytes(data)
    assert keys(tmp_path) == (
        ["x.tar/a.png"], {"x.tar": ("unreadable_folder", f"damaged at byte {at:,} (bad checksum)")},
    )  # fmt: skip


# other processes and threads


def test_sources_are_pickled_small_and_read_the_same(tars, tmp_path):
    listing = list_images(open_source(tars))
    copies = [pickle.loads(pickle.dumps(source)) for source in (listing.source, open_source(tars))]
    wanted = {item.key: listing.source.read(item.key, 10**6) for item in listing.items}
    with ThreadPoolExecutor(4) as pool:
        for copy in (*copies, listing.source):
            assert dict(pool.map(lambda key, copy=copy: (key, copy.read(key, 10**6)), list(wanted) * 5)) == wanted
    rows = [member(f"{n:05}.txt", b"x") for n in range(5000)]
    write_tar(tmp_path / "many" / "x.tar", [*sample("a", png()), *rows])
    many = list_images(open_source(tmp_path / "many"))
    assert len(pickle.dumps(many.source)) < 20 * 5000
    assert many.source.read("x.tar/04999.txt", 10) == b"x"
    with pytest.raises(FileNotFoundError):
        many.source.read("x.tar/05000.txt", 10)


def test_a_tar_that_is_written_anew_while_it_is_read(tars):
    source = list_images(open_source(tars)).source
    write_tar(tars / "00000.tar", [member("other.png", png()), *sample("0000", png(), txt="moved")])
    with pytest.raises(OSError, match=r"00000\.tar"):
        source.read("00000.tar/0000.png", 10**6)


def test_whatever_a_tar_holds_ends_as_an_item_or_a_skip(tmp_path):
    luck = random.Random(3)
    rows = [*sample("a", png(), txt="of a", json='{"text": "x"}'), *sample("l" * 150, png()), *sample("c", png())]
    made = [write_tar(tmp_path / "x.tar", rows, format=kind).read_bytes() for kind in (1, 2)]
    reasons = set()
    for _ in range(100):
        data = bytearray(luck.choice(made))
        for _ in range(luck.choice((1, 3, 30))):
            at = luck.randrange(len(data) // 512) * 512 + luck.randrange(512)
            data[at] = luck.choice((0, 255, 48 + luck.randrange(8), luck.randrange(256)))
            if luck.random() < 0.7:  # with a good checksum
                here = at // 512 * 512
                data[here + 148 : here + 156] = b" " * 8
                data[here + 148 : here + 156] = b"%06o\0 " % sum(data[here : here + 512])
        (tmp_path / "x.tar").write_bytes(data[: luck.randrange(len(data))] if luck.random() < 0.3 else data)
        try:
            listing = list_images(open_source(tmp_path))
        except UserError as error:
            assert "no images" in str(error)  # noqa: PT017
            continue
        add_captions(listing, TextOptions())
        for item in listing.items:
            assert len(listing.source.read(item.key, 10**6)) == item.nbytes
            assert open_source(tmp_path).read(item.key, 10**6) == listing.source.read(item.key, 10**6)
        reasons |= {skip.reason for skip in listing.skips}
    assert {"unreadable_folder", "unreadable"} <= reasons
