"""Control images that columns of metadata name, and control images in buckets of their own."""

import io
import json
import os
import shutil
import tarfile
from dataclasses import replace

import numpy as np
import pytest
import torch
from diffusers import Flux2Pipeline
from PIL import Image

import latentprep
from latentprep import LatentDataset, LatentLoader, UserError
from latentprep.cache.manifest import _seal, open_manifest, read_skips
from latentprep.cache.storage import Storage
from latentprep.geometry import Geometry
from latentprep.prepare import survey
from latentprep.prepare.models.model_set import open_models
from latentprep.prepare.models.vae_folder import open_vae
from latentprep.prepare.plan import estimate
from latentprep.prepare.plan.buckets import make_place
from latentprep.prepare.source.folder import Folder
from latentprep.prepare.survey import Prepared
from tests.conftest import TINY, stop_at
from tests.test_control import draw_before, draw_ref, draw_targets, encode, noise
from tests.test_encode import files, reference, rows

pytestmark = pytest.mark.slow


@pytest.fixture
def source(tmp_path):
    """Targets and control images in one folder, and a metadata file that says which belong together."""
    folder = draw_targets(tmp_path / "pairs")
    draw_before(folder / "before"), draw_ref(folder / "ref")
    names = {path.stem: path.name for path in (folder / "before").iterdir()}
    lines = [
        {"file_name": f"{name}.png", "text": name, "source": f"before/{names[name]}", "ref": f"ref/{name}.png"}
        for name in sorted(names)
    ]
    write_table(folder, lines)
    return folder


def write_table(folder, lines):
    (folder / "metadata.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")


def read_table(folder):
    return [json.loads(line) for line in (folder / "metadata.jsonl").read_text(encoding="utf-8").splitlines()]


COLUMNS = ("--control-column", "source", "--control-column", "ref")


# --- columns


def test_a_column_gives_what_a_folder_gives(run, source, tmp_path):
    result = encode(run, source, tmp_path / "c", *COLUMNS)
    assert "control  column source: 4 of 4 images have one" in result.err
    assert "8 images of SOURCE are control images alone" in result.err
    own = tmp_path / "own"
    shutil.copytree(source, own, ignore=shutil.ignore_patterns("before", "ref"))
    encode(run, own, tmp_path / "d", "--control", source / "before", "--control", source / "ref")
    found, wanted = rows(tmp_path / "c"), rows(tmp_path / "d")
    assert found.keys() == wanted.keys()
    for key, row in wanted.items():
        for name in ("latent_mean", "control_1", "control_2", "digest", "crop"):
            assert torch.equal(found[key][name], row[name])
    assert "nothing to do" in encode(run, source, tmp_path / "c", *COLUMNS).out
    assert "nothing to do" in run("encode", "--again", tmp_path / "c").out
    assert run("verify", tmp_path / "c", "--source", source, "--re-encode", 4).code == 0
    assert run("inspect", tmp_path / "c", "--preview", tmp_path / "sheet.png", "--source", source).code == 0
    assert open_manifest(Storage(tmp_path / "c")).made_with.control_columns == ("source", "ref")
    assert b"control_columns" not in (tmp_path / "d" / "cache.json").read_bytes().split(b'"again"')[0]


def test_a_folder_comes_before_columns(run, source, tmp_path):
    encode(run, source, tmp_path / "c", "--control-column", "source", "--control", source / "ref")
    encode(run, source, tmp_path / "d", *COLUMNS[2:], *COLUMNS[:2])
    found, wanted = rows(tmp_path / "c"), rows(tmp_path / "d")
    assert all(torch.equal(found[key]["control_2"], wanted[key]["control_2"]) for key in wanted)


def test_a_target_may_be_the_control_image_of_another(run, source, tmp_path):
    """An edit in several steps: what one makes, the next starts from. Both are targets."""
    lines = read_table(source)
    lines[0]["source"] = lines[1]["file_name"]
    write_table(source, lines)
    encode(run, source, tmp_path / "c", "--control-column", "source", "--exclude", "ref")
    assert rows(tmp_path / "c").keys() == {line["file_name"] for line in lines}


def test_rows_without_a_control_image_are_skips_that_heal(run, source, tmp_path):
    lines = read_table(source)
    write_table(source, [{**lines[0], "source": None}, {**lines[1], "source": "before/nothing.png"}, *lines[2:3]])
    encode(run, source, tmp_path / "c", "--control-column", "source", "--exclude", "ref")
    skips = {skip.key: (skip.reason, skip.detail) for skip in read_skips(Storage(tmp_path / "c"))}
    reason, detail = skips.pop(lines[0]["file_name"])
    assert (reason, detail) == ("no_control", "control_1: the metadata files name none as source")
    reason, detail = skips.pop(lines[1]["file_name"])
    assert reason == "io_error"
    assert detail == f"its control image {source}/before/nothing.png: No such file or directory"
    assert skips.pop(lines[3]["file_name"])[0] == "no_control"  # no row is of it
    assert all(reason == "no_control" for reason, _ in skips.values())
    write_table(source, lines)
    assert "3 new" in encode(run, source, tmp_path / "c", "--control-column", "source", "--exclude", "ref").out
    assert not read_skips(Storage(tmp_path / "c"))


def test_paths_that_lead_outside_are_never_read(run, source, tmp_path, monkeypatch):
    shutil.copy(source / "wide0.png", tmp_path / "secret.png")
    lines = read_table(source)
    for line, name in zip(lines, ("../secret.png", str(tmp_path / "secret.png"), "a/../../secret.png"), strict=False):
        line["source"] = name
    write_table(source, lines)
    read, keys = Folder.read, []
    monkeypatch.setattr(Folder, "read", lambda self, key, limit: keys.append(key) or read(self, key, limit))
    encode(run, source, tmp_path / "c", "--control-column", "source", "--exclude", "ref")
    assert not any("secret" in key for key in keys)
    details = [skip.detail for skip in read_skips(Storage(tmp_path / "c")) if skip.reason == "io_error"]
    assert len(details) == 3
    assert all(detail.endswith("its name leads outside of the source") for detail in details)
    assert len(rows(tmp_path / "c")) == 1


def test_a_path_that_no_file_can_have_is_a_skip(run, source, tmp_path):
    """JSON may say half a surrogate pair, of which Python makes no file name."""
    lines = read_table(source)
    lines[0]["source"] = "before/\ud800.png"
    write_table(source, lines)
    with tarfile.open(tmp_path / "pairs.tar", "w") as tar:
        tar.add(source, "")
    for number, where in enumerate((source, tmp_path / "pairs.tar")):
        encode(run, where, tmp_path / f"{number}", "--control-column", "source", "--exclude", "ref")
        (skip,) = (skip for skip in read_skips(Storage(tmp_path / f"{number}")) if skip.reason == "io_error")
        assert skip.detail.endswith("before/\ud800.png: No such file or directory")
        assert len(rows(tmp_path / f"{number}")) == 3


@pytest.mark.parametrize(
    ("change", "options", "message"),
    [
        (None, ["--control-column", "nope"], "metadata.jsonl line 1: no column 'nope', only 'file_name', 'text', "),
        ([{"source": 3}], [], "metadata.jsonl line 1: expected the path of an image as 'source', got 3."),
        (
            [{"source": 5000 * "a"}],
            [],
            "metadata.jsonl line 1: a path of over 4,096 characters as 'source'. Shorten it.",
        ),
        ([{"source": ["a"]}], [], "metadata.jsonl line 1: expected the path of an image as 'source', got "),
        (
            [{}, {"source": "ref/tall0.png"}],
            [],
            "metadata.jsonl line 2: tall0.png has two control images as 'source': ",
        ),
        ([{"source": None}], [], "--control-column source: the metadata files name no image in SOURCE that has one."),
        ("gone", [], "--control-column source: SOURCE {0} holds no metadata.jsonl, metadata.csv, metadata.parquet."),
        (None, ["--control-column", "source"], "--control-column 'source': expected the name of a column, another "),
        (None, ["--control", "{0}"] * 4, "--control: 5 control images of each image, expected at most 4."),
        (None, ["--control-size", "small"], "--control-size small: expected one of target, own."),
    ],
)
def test_what_is_refused_in_one_line(run, source, tmp_path, change, options, message):
    if change == "gone":
        (source / "metadata.jsonl").unlink()
    elif change is not None:
        (line, *_) = read_table(source)
        write_table(source, [{**line, **own} for own in change])
    given = [str(option).format(source) for option in options]
    result = encode(run, source, tmp_path / "c", "--control-column", "source", *given, code=1)
    assert result.err.splitlines()[-1].startswith("error: " + message.format(source))
    assert not (tmp_path / "c").exists()


def test_metadata_files_that_are_left_out_are_not_read(run, source, tmp_path):
    """Neither those that --exclude names, nor those in a folder of --control."""
    for folder in ("old", "ref"):
        (source / folder).mkdir(exist_ok=True)
        (source / folder / "metadata.jsonl").write_text('{"file_name": "a.png", "text": "no such column"}\n')
    encode(run, source, tmp_path / "c", "--control-column", "source", "--control", source / "ref", "--exclude", "old")
    assert run("verify", tmp_path / "c", "--source", source, "--re-encode", 1).code == 0
    shown = run("inspect", tmp_path / "c", "--preview", tmp_path / "sheet.png", "--source", source)
    assert "not known" not in shown.err + shown.out
    result = encode(run, source, tmp_path / "d", "--control-column", "source", "--exclude", "*.jsonl", code=1)
    assert "holds no metadata.jsonl" in result.err


def test_rows_that_name_another_file_of_the_same_size_and_time_are_changed(run, source, tmp_path):
    """As files of an archive have it, or a checkout's: nothing but the name tells them apart."""
    lines = read_table(source)
    for n, line in enumerate(lines):
        line["ref"] = f"ref/{n}.bmp"
        noise(64, 64, n).save(source / line["ref"])
        os.utime(source / line["ref"], ns=(5, 5))
    write_table(source, lines)
    options = ("--control-column", "ref", "--exclude", "before")
    encode(run, source, tmp_path / "c", *options)
    old = rows(tmp_path / "c")
    lines[0]["ref"], lines[1]["ref"] = lines[1]["ref"], lines[0]["ref"]
    write_table(source, lines)
    assert "2 changed" in encode(run, source, tmp_path / "c", *options).out
    new, (one, two) = rows(tmp_path / "c"), (line["file_name"] for line in lines[:2])
    assert torch.equal(new[one]["control_1"], old[two]["control_1"])
    assert not torch.equal(new[one]["control_1"], old[one]["control_1"])
    (source / "ref").rename(source / "moved")  # the same content under another name is only read
    write_table(source, [{**line, "ref": line["ref"].replace("ref", "moved")} for line in lines])
    assert "4 touched" in encode(run, source, tmp_path / "c", *options).out


def test_a_metadata_file_names_what_lies_beside_its_folder(run, source, tmp_path):
    lines = read_table(source)
    encode(run, source, tmp_path / "c", *COLUMNS)
    (source / "metadata.jsonl").unlink()
    (source / "after").mkdir()
    for line in lines:
        (source / line["file_name"]).rename(source / "after" / line["file_name"])
    moved = [{**line, "source": f"../{line['source']}", "ref": f"x/../../{line['ref']}"} for line in lines]
    write_table(source / "after", moved)
    encode(run, source, tmp_path / "d", *COLUMNS)
    found, wanted = rows(tmp_path / "d"), rows(tmp_path / "c")
    assert found.keys() == {f"after/{key}" for key in wanted}
    assert all(torch.equal(found[f"after/{key}"]["control_2"], wanted[key]["control_2"]) for key in wanted)


def test_a_hidden_control_image_is_said_to_be_hidden(run, source, tmp_path):
    (source / "before").rename(source / ".before")
    lines = read_table(source)
    lines = [{**line, "source": f".{line['source']}" if n else line["ref"]} for n, line in enumerate(lines)]
    write_table(source, lines)
    encode(run, source, tmp_path / "c", "--control-column", "source", "--exclude", "ref")
    details = [skip.detail for skip in read_skips(Storage(tmp_path / "c"))]
    assert len(details) == 3
    assert all("it was not listed: it is hidden (.name)" in detail for detail in details)


def test_what_is_said_of_control_images_alone_counts_images(run, source, tmp_path):
    lines = read_table(source)
    write_table(
        source, [{**lines[0], "source": "before/nothing.png"}, {**lines[1], "source": "metadata.jsonl"}, lines[2]]
    )
    result = encode(run, source, tmp_path / "c", "--control-column", "source")
    assert "1 image of SOURCE is a control image alone" in result.err


def test_sets_have_columns_of_their_own(run, source, tmp_path):
    shutil.copytree(source, tmp_path / "other")
    sets = (
        '[[set]]\nsource = "pairs"\ncontrol_column = ["source", "ref"]\n\n'
        '[[set]]\nsource = "other"\nexclude = ["before", "ref"]\ncontrol_column = "ref"\ncontrol = "pairs/before"\n'
    )
    (tmp_path / "sets.toml").write_text(sets, encoding="utf-8")
    encode(run, tmp_path / "sets.toml", tmp_path / "c")
    found = rows(tmp_path / "c")
    assert len(found) == 8
    assert all(
        torch.equal(found[f"pairs/{n}.png"]["control_2"], found[f"other/{n}.png"]["control_2"])
        for n in ("wide0", "tall1")
    )
    assert run("verify", tmp_path / "c", "--source", tmp_path / "sets.toml", "--re-encode", 2).code == 0
    (tmp_path / "more.toml").write_text(sets.replace('"source", ', '"source", "text", '), encoding="utf-8")
    result = run("verify", tmp_path / "c", "--source", tmp_path / "more.toml")
    assert "--control: got 0 folders and 3 columns, this cache has 2 control images of each image. Give" in result.err
    result = encode(run, tmp_path / "sets.toml", tmp_path / "d", "--control-column", "ref", code=1)
    assert (
        "--control-column ref: with several sets each has its own control images. Give the column to its" in result.err
    )


# --- buckets of their own

OWN = ("--control-column", "source", "--control-column", "ref", "--control-size", "own")


def test_control_images_of_another_shape_have_buckets_of_their_own(run, source, tmp_path):
    """Each is encoded as it would be if it were a target; one of its target's shape is cut as that is."""
    noise(40, 90).save(source / "ref" / "wide1.png")  # two shapes of one bucket's references
    one = ("--batch-size", 1)
    result = encode(run, source, tmp_path / "c", *OWN, *one)
    assert "4 images with a control image of another shape, which has a bucket of its own" in result.out
    encode(run, source, tmp_path / "same", *COLUMNS, *one)
    encode(run, source / "ref", tmp_path / "refs", *one)
    found, same, refs = rows(tmp_path / "c"), rows(tmp_path / "same"), rows(tmp_path / "refs")
    for key, row in found.items():
        assert torch.equal(row["latent_mean"], same[key]["latent_mean"])
        assert torch.equal(row["control_1"], same[key]["control_1"])
        assert torch.equal(row["control_2"], refs[key]["latent_mean"])
    assert len({(row["latent_mean"].shape, row["control_2"].shape) for row in found.values()}) == 3
    assert "nothing to do" in encode(run, source, tmp_path / "c", *OWN).out
    assert run("verify", tmp_path / "c", "--source", source, "--re-encode", 4).code == 0
    assert run("inspect", tmp_path / "c", "--preview", tmp_path / "sheet.png", "--source", source).code == 0
    assert run("inspect", tmp_path / "c").code == 0
    compared = run("diff", tmp_path / "same", tmp_path / "c").out
    assert "--control-size target -> own" in compared
    assert "control_1      the same" in compared
    assert "control_2      of another size in 2 images: not compared" in compared
    assert "(--control-size own -> target; cache -> asked)" in encode(run, source, tmp_path / "c", *COLUMNS, code=1).err


def test_views_of_control_images_of_another_shape(run, source, tmp_path):
    """Crops are its own, and it is mirrored where its target is."""
    options = ("--flip", "--crop", "random", "--crops", "2")
    encode(run, source, tmp_path / "c", *OWN, *options)
    encode(run, source / "ref", tmp_path / "refs", *options)
    found, refs = rows(tmp_path / "c"), rows(tmp_path / "refs")
    place = make_place(Geometry.from_options(resolution="64", bucket_step=32, min_side=32), 8)
    for key, row in found.items():
        assert row["control_2"].shape[0] == 4
        assert row["control_2"].shape == refs[key]["latent_mean"].shape
        plain, mirrored = row["control_2"][0], row["control_2"][1]
        assert not torch.equal(plain, mirrored)
    assert place((70, 90)).bucket == tuple(8 * side for side in found["wide0.png"]["control_2"].shape[-2:])


def test_batches_have_control_images_of_one_size(run, source, tmp_path):
    noise(40, 90).save(source / "ref" / "wide1.png")
    encode(run, source, tmp_path / "c", *OWN)
    data = LatentDataset(tmp_path / "c", latent_sampling_method="deterministic", include_cond=False)
    assert len(data.buckets) == 3
    assert {len(shape) for shape in data.buckets} == {3, 7}  # 3: all have one size
    stored, seen = rows(tmp_path / "c"), 0
    for batch in LatentLoader(data, 4, seed=1):
        for n, index in enumerate(batch.index.tolist()):
            row = stored[data.key(index)]
            for values, name in zip(batch.control, ("control_1", "control_2"), strict=True):
                assert torch.equal(values[n], data.normalization.apply(row[name][:1].float())[0])
            seen += 1
    assert seen == 4
    one, two = sorted((index for index in range(4) if data.key(index).startswith("wide")), key=data.key)
    with pytest.raises(UserError, match="mixes latents of 2 shapes"):
        data.__getitems__([one, two])
    assert "+[" in repr(data)


def test_a_run_that_is_stopped_ends_as_undisturbed(run, source, tmp_path, monkeypatch):
    encode(run, source, tmp_path / "whole", *OWN, "--flip")
    stop_at(monkeypatch, 9)
    encode(run, source, tmp_path / "c", *OWN, "--flip", code=130)
    monkeypatch.undo()
    encode(run, source, tmp_path / "c", *OWN, "--flip")
    assert files(tmp_path / "c") == files(tmp_path / "whole")


def test_what_a_stopped_run_left_counts_only_for_the_same_sizes(run, source, tmp_path, monkeypatch):
    """A control image was replaced meanwhile, by one of another shape, as many bytes and the same time."""
    lines = read_table(source)
    for n, line in enumerate(lines):
        line["ref"] = f"ref/{n}.bmp"
        noise(96, 96, n).save(source / line["file_name"])
        noise(96, 96, n).save(source / line["ref"])
        os.utime(source / line["ref"], ns=(5, 5))
    write_table(source, lines)
    options = ("--control-column", "ref", "--control-size", "own", "--exclude", "before", "--exclude", "ref")
    stop_at(monkeypatch, 6)
    encode(run, source, tmp_path / "c", *options, code=130)
    monkeypatch.undo()
    for n in range(4):
        noise(144, 64, n).save(source / lines[n]["ref"])
        os.utime(source / lines[n]["ref"], ns=(5, 5))
    encode(run, source, tmp_path / "c", *options)
    assert {row["control_1"].shape[-2:] for row in rows(tmp_path / "c").values()} == {(4, 12)}
    assert run("verify", tmp_path / "c", "--source", source, "--re-encode", 4).code == 0


def test_compact_keeps_the_sizes_of_control_images(run, source, tmp_path):
    encode(run, source, tmp_path / "c", *OWN)
    old = rows(tmp_path / "c")
    noise(50, 90, 7).save(source / "ref" / "wide1.png")
    assert "1 changed" in encode(run, source, tmp_path / "c", *OWN).out
    assert run("compact", tmp_path / "c", "--min-share", 0).code == 0
    new = rows(tmp_path / "c")
    assert [key for key in new if new[key]["control_2"].shape != old[key]["control_2"].shape] == ["wide1.png"]
    assert run("verify", tmp_path / "c", "--source", source, "--re-encode", 4).code == 0
    lines = read_table(source)
    write_table(source, lines[:3])
    encode(run, source, tmp_path / "c", *OWN)
    assert run("compact", tmp_path / "c", "--min-share", 0).code == 0
    assert len(LatentDataset(tmp_path / "c", include_cond=False)) == 3


def test_a_control_image_without_a_bucket_is_named(run, source, tmp_path):
    noise(4000, 1).save(source / "ref" / "tall0.png")
    (source / "ref" / "tall1.png").write_bytes(b"no image")
    (source / "ref" / "wide0.png").write_bytes((source / "ref" / "wide0.png").read_bytes()[:-400])
    encode(run, source, tmp_path / "c", *OWN)
    skips = {skip.key: skip for skip in read_skips(Storage(tmp_path / "c"))}
    assert {key: skip.reason for key, skip in skips.items()} == {
        "tall0.png": "extreme_aspect", "tall1.png": "unreadable", "wide0.png": "truncated",
    }  # fmt: skip
    assert skips["tall0.png"].detail.startswith("control_2: of 4000x1 its bucket")
    assert skips["tall1.png"].detail.startswith(f"its control image {source}/ref/tall1.png: ")
    assert "nothing to do" in encode(run, source, tmp_path / "c", *OWN).out


def test_a_header_behind_the_first_bytes_is_found(run, source, tmp_path):
    """A JPEG with a long profile before its size."""
    noise(90, 70).save(source / "ref" / "wide0.jpg", icc_profile=bytes(200_000))
    lines = read_table(source)
    for line in lines:
        line["ref"] = "ref/wide0.jpg"
    write_table(source, lines)
    encode(run, source, tmp_path / "c", *OWN)
    assert len(rows(tmp_path / "c")) == 4


def late_exif(image, exif):
    """A PNG whose eXIf chunk is its last, as exiftool writes it."""
    plain, other = io.BytesIO(), io.BytesIO()
    image.save(plain, "PNG"), image.save(other, "PNG", exif=exif)
    end, start = plain.getvalue().rindex(b"IEND") - 4, other.getvalue().index(b"eXIf") - 4
    length = int.from_bytes(other.getvalue()[start : start + 4])
    return plain.getvalue()[:end] + other.getvalue()[start : start + 12 + length] + plain.getvalue()[end:]


def test_what_a_run_takes_counts_the_pixels_of_control_images(run, source, tmp_path, monkeypatch):
    """The estimated seconds and bytes, and how many images a GPU gets at once."""
    for path in (source / "ref").iterdir():
        noise(320, 80).save(path)
    found = []
    monkeypatch.setattr(estimate, "measure", lambda work, probes, cost: (probes[-1], float(cost(probes[-1]))))
    monkeypatch.setattr(estimate, "measure_decode", lambda prepared, rows: 0.0)  # so that a pixel takes a second
    measured = estimate.measure_vae
    monkeypatch.setattr(estimate, "measure_vae", lambda *given: found.append((*given, measured(*given))) or found[0][2])
    native = ("encode", source, "--out", tmp_path / "c", "--model", "tiny", "--no-cond", "--resolution", "native", *OWN)
    assert run(*native, "--dry-run").code == 0
    ((prepared, placements, (seconds, _)),) = found
    assert (80, 320) in prepared.plan.buckets()
    assert seconds == sum(height * width for own in placements for height, width in own.buckets)
    assert run(*native).code == 0
    names = ("latent_mean", "latent_std", "control_1", "control_2", "weight")
    stored = sum(row[name].nbytes for row in rows(tmp_path / "c").values() for name in names if name in row)
    weights = sum(row["latent_mean"][:, 0].numel() * 2 for row in rows(tmp_path / "c").values() if "weight" not in row)
    assert sum(prepared.row_bytes.latents(own.bucket, own.controls) for own in placements) == stored + weights


def test_a_control_image_that_has_its_targets_shape_no_longer_is_a_skip(run, source, tmp_path, monkeypatch):
    """It was replaced, by one of as many bytes, between plan and encode: no other row of its shard is lost."""
    lines = read_table(source)
    for n, line in enumerate(lines):
        line["ref"] = f"ref/{n}.bmp"
        noise(96, 96, n).save(source / line["file_name"])
        noise(96, 96, n).save(source / line["ref"])
    write_table(source, lines)
    worker = Prepared.latents_worker

    def replaced(self):
        noise(144, 64).save(source / "ref" / "1.bmp")
        return worker(self)

    monkeypatch.setattr(Prepared, "latents_worker", replaced)
    options = ("--control-column", "ref", "--control-size", "own", "--exclude", "before", "--exclude", "ref")
    encode(run, source, tmp_path / "c", *options)
    monkeypatch.undo()
    (skip,) = read_skips(Storage(tmp_path / "c"))
    assert (skip.key, skip.reason) == (lines[1]["file_name"], "changed")
    assert len(rows(tmp_path / "c")) == 3
    assert "1 new" in encode(run, source, tmp_path / "c", *options).out
    assert run("verify", tmp_path / "c", "--source", source, "--re-encode", 4).code == 0


@pytest.mark.parametrize("in_tar", [False, True])
def test_an_orientation_behind_the_pixels_is_found(run, source, tmp_path, in_tar):
    exif = Image.Exif()
    exif[274] = 6
    (source / "ref" / "wide0.png").write_bytes(late_exif(noise(500, 125), exif))
    where = source
    if in_tar:
        where = tmp_path / "pairs.tar"
        with tarfile.open(where, "w") as tar:
            tar.add(source, "")
    encode(run, where, tmp_path / "c", *OWN)
    encode(run, source / "ref", tmp_path / "refs")
    found = {key.rpartition("/")[2]: row for key, row in rows(tmp_path / "c").items()}
    latents = found["wide0.png"]["control_2"]
    assert latents.shape[-2:] == (16, 4)
    assert torch.equal(latents, rows(tmp_path / "refs")["wide0.png"]["latent_mean"])


def test_a_file_that_is_too_large_for_an_image_is_not_read(run, source, tmp_path, monkeypatch):
    with (source / "ref" / "wide0.png").open("wb") as file:
        file.truncate(1 << 40)  # of no bytes on disk
    opened, opens = [], Folder.open
    monkeypatch.setattr(Folder, "open", lambda self, key, limit: opened.append(key) or opens(self, key, limit))
    encode(run, source, tmp_path / "c", *OWN)
    (skip,) = read_skips(Storage(tmp_path / "c"))
    assert skip.reason == "too_large"
    assert skip.detail.startswith(f"its control image {source}/ref/wide0.png: 1.1 TB, expected at most ")
    assert "ref/wide0.png" not in opened


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--control-size", "own"], "--control-size own: there are no control images. Give them with --control."),
        ([*OWN, "--width", "64", "--height", "64"], "--control-size own with --width and --height: all images have"),
    ],
)
def test_sizes_that_are_refused(run, source, tmp_path, options, message):
    result = encode(run, source, tmp_path / "c", *options, code=1)
    assert result.err.splitlines()[-1].startswith(f"error: {message}")


def test_a_manifest_whose_recipe_allows_no_such_sizes(run, source, tmp_path):
    encode(run, source, tmp_path / "c", *OWN)
    path = tmp_path / "c" / "cache.json"
    text = path.read_text()
    body = text.replace('"control_size": "own"', '"tiling": 64').rpartition(' "blake2b"')[0]
    assert body != text.rpartition(' "blake2b"')[0]
    path.write_text(body + _seal(body))
    with pytest.raises(UserError, match="control images of sizes that the recipe does not allow"):
        LatentDataset(tmp_path / "c", include_cond=False)


def test_native_sizes(run, source, tmp_path):
    for path in (source / "ref").iterdir():
        noise(88, 72).save(path)
    result = run(
        "encode", source, "--out", tmp_path / "c", "--model", "tiny", "--no-cond", "--resolution", "native", *OWN
    )
    assert result.code == 0
    assert all(row["control_2"].shape[-2:] == (9, 11) for row in rows(tmp_path / "c").values())


def test_native_sizes_of_a_denoiser_that_takes_patches(run, source, tmp_path, monkeypatch):
    """The patch is in no manifest: what is encoded again is cut as it was all the same."""
    monkeypatch.setattr(survey, "open_models", lambda *given: replace(open_models(*given), patch=2))
    for path in (source / "ref").iterdir():
        noise(104, 72).save(path)
    native = ("--model", "tiny", "--no-cond", "--resolution", "native")
    assert run("encode", source, "--out", tmp_path / "c", *native, *OWN).code == 0
    assert all(row["control_2"].shape[-2:] == (8, 12) for row in rows(tmp_path / "c").values())
    assert run("verify", tmp_path / "c", "--source", source, "--re-encode", 4).code == 0


def test_flux2_packs_control_images_of_their_own_sizes(run, source, tmp_path):
    """What the page says of FLUX.2 holds for them too: tokens and positions of Flux2Pipeline."""
    encode(run, source, tmp_path / "c", *OWN)
    for batch in LatentLoader(LatentDataset(tmp_path / "c", include_cond=False), 2):
        one, two = batch.control
        ids = Flux2Pipeline._prepare_image_ids([one[:1], two[:1]])
        tokens = [Flux2Pipeline._pack_latents(image) for image in batch.control]
        assert ids.shape[1] == sum(own.shape[1] for own in tokens)


def test_in_python(source, tmp_path):
    done = latentprep.encode(
        source, tmp_path / "c", control_column=["source", "ref"], control_size="own", no_cond=True, model="tiny",
        resolution=64, bucket_step=32, min_side=32, progress=False,
    )  # fmt: skip
    assert done.num_cached == 4
    with pytest.raises(UserError, match="control_column"):
        latentprep.encode(source, tmp_path / "d", control_column="", control=[], model="tiny", progress=False)


def test_the_reference_of_a_control_image_of_its_own_size(run, source, tmp_path):
    """Against Pillow and diffusers: covered, cut in the middle, encoded."""
    encode(run, source, tmp_path / "c", *OWN)
    vae = open_vae(TINY).load(torch.float32)
    place = make_place(Geometry.from_options(resolution="64", bucket_step=32, min_side=32), 8)
    for key, row in rows(tmp_path / "c").items():
        image = Image.open(source / "ref" / key).convert("RGB")
        own = place((image.height, image.width))
        (height, width), (top, left, box_height, box_width) = own.resized_size, own.crop
        image = image.resize((width, height), Image.Resampling.LANCZOS)
        part = image.crop((left, top, left + box_width, top + box_height))
        mean, _ = reference(vae, np.array(part))
        assert torch.allclose(row["control_2"][0].float(), mean, atol=4e-3)
