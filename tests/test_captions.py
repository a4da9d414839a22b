"""prepare/captions.py and metadata.py, and the templates of prompts.py: where captions come from."""

import csv
import json
import re
import shutil
import sys

import pytest
import regex

import latentprep
from latentprep import LatentDataset
from latentprep.cache.manifest import open_manifest
from latentprep.cache.storage import Storage
from latentprep.errors import UserError
from latentprep.options import TextOptions
from latentprep.prepare.source import metadata
from latentprep.prepare.source.captions import add_captions, caption_from_name
from latentprep.prepare.source.listing import list_images
from latentprep.prepare.source.sources import open_source
from latentprep.prompts import list_templates, load_template, make_prompt
from tests.conftest import SMALL, gradient


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "sub").mkdir()
    for name in ("01-a cat.png", "b.png", "sub/b.png", "c.png", "d.png", "sub/e.png"):
        gradient(16, 16).save(tmp_path / name)
    (tmp_path / "b.txt").write_text("  the letter b \n\n", encoding="utf-8")
    (tmp_path / "sub" / "b.caption").write_bytes("\ufeffwith a mark\r\n".encode())
    (tmp_path / "d.txt").write_bytes("größer\n".encode("utf-16"))
    (tmp_path / "lost.txt").write_text("nobody's caption", encoding="utf-8")
    (tmp_path / "metadata.jsonl").write_text(
        '{"file_name": "c.png", "text": "from metadata"}\n\n{"file_name": "b.png", "text": "not this"}\n',
        encoding="utf-8",
    )
    (tmp_path / "sub" / "metadata.jsonl").write_text('{"file_name": "e.png", "text": "deeper"}\n', encoding="utf-8")
    return tmp_path


def captions(folder, **options):
    return add_captions(list_images(open_source(folder)), TextOptions(**options))


def test_files_that_are_neither_images_nor_captions_are_counted(folder, run):
    for name in ("clip.mp4", "other.MP4", "raw.cr2", "LICENCE"):
        (folder / name).write_bytes(b"x")
    assert captions(folder).ignored == {".mp4": 2, ".cr2": 1, "LICENCE": 1}
    result = run("encode", folder, "--model", "tiny", "--dry-run")
    assert "         4 files of other kinds left out: .mp4, " in result.err


def test_a_second_caption_file_of_an_image_is_named(folder, run):
    (folder / "b.caption").write_text("not this")
    (folder / "lost.caption").write_text("nobody's")
    found = captions(folder)
    assert found.second == ["b.caption"]
    assert found_captions(folder)["b.png"] == (("the letter b",), "txt")
    said = run("encode", folder, "--model", "tiny", "--dry-run").err
    assert "         1 caption file not read, since the image has a .txt too: b.caption\n" in said
    assert captions(folder, caption_extension=".caption").second == []
    assert "not read" not in run("encode", folder, "--model", "tiny", "--dry-run", "--caption-from", "name").err


def test_sidecar_then_metadata_then_file_name(folder):
    found = captions(folder)
    assert {item.key: (item.captions, item.caption_origin) for item in found.items} == {
        "01-a cat.png": (("a cat",), "filename"),
        "b.png": (("the letter b",), "txt"),
        "sub/b.png": (("with a mark",), "caption"),
        "c.png": (("from metadata",), "metadata"),
        "d.png": (("größer",), "txt"),
        "sub/e.png": (("deeper",), "metadata"),
    }
    assert found.origins == {"filename": 1, "txt": 2, "caption": 1, "metadata": 2}


def test_captions_without_image_and_shared_stems_are_reported(folder):
    gradient(16, 16).save(folder / "b.jpg")
    found = captions(folder)
    assert found.without_image == ["lost.txt"]
    assert found.shared == ["b"]


@pytest.mark.parametrize(
    "name", ["0012-34 a red fox.png", "a red fox.png", "7a red fox.jpeg", "-- a red fox.x.png", "3.png"]
)
def test_file_name_rule_is_the_ancestors(name):
    # stable-diffusion-webui: re.sub(r"^[-\d]+\s*", "", stem), then the word regex's findall joined
    stem = name.rpartition(".")[0]
    assert caption_from_name(f"some/where/{name}") == re.sub(r"^[-\d]+\s*", "", stem)
    word = regex.compile(r"[a-z]{2,}")
    assert caption_from_name(name, word, ", ") == ", ".join(word.findall(re.sub(r"^[-\d]+\s*", "", stem)))


def test_word_regex_and_joiner_only_touch_file_names(folder):
    found = {item.key: item.captions[0] for item in captions(folder, word_regex=r"\w+", joiner="+").items}
    assert found["01-a cat.png"] == "a+cat"
    assert found["b.png"] == "the letter b"


def test_bad_regex(folder):
    with pytest.raises(UserError, match=r"--word-regex \(\[: not a regular expression"):
        captions(folder, word_regex="([")


ADVICE = "Save it as UTF-8, or give its encoding, such as --caption-encoding cp1252."


def test_captions_that_are_not_text_are_named_and_counted(folder):
    (folder / "b.txt").write_bytes(b"caf\xe9")
    (folder / "d.txt").write_bytes(b"\xff\xff\xff")
    found = add_captions(list_images(open_source(folder)), TextOptions())
    assert [(skip.key, skip.reason, skip.detail) for skip in found.skips] == [
        ("b.png", "bad_caption", f"b.txt: not UTF-8 text at byte 3. {ADVICE}"),
        ("d.png", "bad_caption", f"d.txt: not UTF-8 text at byte 0. {ADVICE}"),
    ]
    assert {item.key for item in found.items}.isdisjoint({"b.png", "d.png"})


def test_captions_are_read_in_the_encoding_that_is_given(folder):
    (folder / "b.txt").write_bytes("größer — 5 €".encode("cp1252"))
    (folder / "metadata.jsonl").write_bytes('{"file_name": "c.png", "text": "naïve"}'.encode("cp1252"))
    (folder / "sub" / "metadata.jsonl").unlink()
    (folder / "sub" / "metadata.csv").write_bytes("file_name,text\ne.png,çà\n".encode("cp1252"))
    found = found_captions(folder, caption_encoding="cp1252")
    assert found["b.png"] == (("größer — 5 €",), "txt")
    assert found["c.png"] == (("naïve",), "metadata")
    assert found["sub/e.png"] == (("çà",), "metadata")
    assert found["sub/b.png"] == (("with a mark",), "caption")  # UTF-8, as its mark says
    assert found["d.png"] == (("größer",), "txt")  # UTF-16, likewise
    (folder / "metadata.jsonl").unlink()
    (folder / "sub" / "metadata.csv").unlink()
    assert [skip.detail for skip in captions(folder, caption_encoding="ascii").skips] == [
        f"b.txt: not ASCII text at byte 2. {ADVICE}"
    ]


@pytest.mark.parametrize(
    ("text", "encoding"),
    [("größer", "utf-32"), ("größer", "utf-32-be"), ("猫", "shift_jis"), ("猫", "iso2022_jp"), ("größer", "UTF_8")],
)
def test_any_encoding_of_text_that_python_knows_can_be_given(folder, text, encoding):
    (folder / "metadata.jsonl").unlink()
    (folder / "sub" / "metadata.jsonl").unlink()
    (folder / "b.txt").write_bytes(text.encode(encoding))
    assert found_captions(folder, caption_encoding=encoding)["b.png"][0] == (text,)


@pytest.mark.parametrize("name", ["", "no-such", "hex", "rot13", "undefined", "cp1252\0", "../utf_8"])
def test_an_encoding_that_is_none_is_refused_before_anything_is_read(name):
    with pytest.raises(UserError, match=rf"^--caption-encoding {re.escape(ascii(name)[1:-1])}: no encoding of text"):
        TextOptions(caption_encoding=name)


def test_an_encoding_without_caption_files_is_refused():
    with pytest.raises(UserError, match="--caption-encoding with --caption-from name: no caption file is read"):
        TextOptions(caption_encoding="cp1252", caption_from="name")


def test_an_encoding_is_remembered_and_a_set_may_have_its_own(run, images, tmp_path):
    other = tmp_path / "other"
    shutil.copytree(images, other)
    (images / "tall0.txt").write_bytes(b"caf\xe9")
    (other / "tall0.txt").write_bytes("café".encode("cp850"))
    table = f'caption_encoding = "cp1252"\n[[set]]\nsource = {str(images)!r}\n[[set]]\nsource = {str(other)!r}\n'
    (tmp_path / "s.toml").write_text(f'{table}caption_encoding = "cp850"\n')
    cache = tmp_path / "s.latents"
    assert run("encode", tmp_path / "s.toml", *SMALL).code == 0
    for name in ("images", "other"):
        assert latentprep.inspect(cache, key=f"{name}/tall0.png")["caption"] == ["café"]
    assert run("encode", images, "--out", tmp_path / "c", *SMALL, "--caption-encoding", "cp1252").code == 0
    assert "nothing to do" in run("encode", "--again", tmp_path / "c").out
    assert open_manifest(Storage(tmp_path / "c")).made_with.again["caption_encoding"] == "cp1252"


def test_a_caption_file_that_cannot_be_read(folder):
    (folder / "c.txt").symlink_to(folder / "nowhere")
    (skip,) = add_captions(list_images(open_source(folder)), TextOptions()).skips
    assert (skip.key, skip.detail) == ("c.png", "c.txt: cannot be read (No such file or directory).")


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", r'expected {"file_name": "...", "text": "..."}, got {'),
        ("[1]", r'expected {"file_name": "...", "text": "..."}, got [1]'),
        ("[" * 99999, r'expected {"file_name": "...", "text": "..."}, got [[['),
        ('{"text": "x"}', "no column 'file_name', only 'text'."),
        ('{"file_name": "a.png", "label": 3}', "no column 'text', only 'file_name', 'label'. Say which holds the"),
        ('{"file_name": 1, "text": "x"}', "expected a text as 'file_name', got 1."),
        ('{"file_name": "a.png", "text": 3}', "expected a text or a list of texts as 'text', got 3."),
        (
            '{"file_name": "a.png", "text": ["x", null]}',
            "expected a text or a list of texts as 'text', got [\"x\", null].",
        ),
    ],
)
def test_broken_metadata_names_file_and_line(folder, line, message):
    (folder / "metadata.jsonl").write_text('{"file_name": "c.png", "text": "fine"}\n' + line, encoding="utf-8")
    with pytest.raises(UserError, match="^metadata.jsonl line 2: " + re.escape(message)):
        captions(folder)


def test_lines_of_a_caption_file_are_captions_where_asked_for(folder):
    (folder / "b.txt").write_bytes(b"\xef\xbb\xbf one \r\n\r\n two, three\r\n")
    (folder / "d.txt").write_text("\n \n")
    gradient(16, 16).save(folder / "b.jpg")  # shares its caption file
    found = captions(folder)
    assert {item.captions for item in found.items if item.key.startswith("b.")} == {("one \r\n\r\n two, three",)}
    assert found.num_long == 1
    found = captions(folder, caption_lines=True)
    assert found.num_long == 0
    own = {item.key: item.captions for item in found.items}
    assert own["b.png"] == own["b.jpg"] == ("one", "two, three")
    assert own["d.png"] == ("",)
    assert own["sub/b.png"] == ("with a mark",)


def test_the_start_of_a_run_says_where_captions_come_from_and_how_many_there_are(run, folder, tmp_path):
    (folder / "b.txt").write_text("one\ntwo\n")
    options = ("encode", folder, "--out", tmp_path.parent / "c", *SMALL, "--dry-run")
    said = run(*options).err
    assert "6 images; captions: 2 from .txt, 1 from .caption, 2 from metadata files, 1 from file names\n" in said
    assert "1 caption file of several lines, taken as one caption (--caption-lines makes each line a caption)" in said
    assert "captions without an image: lost.txt\n" in said
    said = run(*options, "--caption-lines").err
    assert "         7 captions in all, up to 2 an image\n" in said
    assert "of several lines" not in said


def test_suffixes_of_caption_files_in_capitals(folder):
    (folder / "b.txt").rename(folder / "b.TXT")
    assert {item.key: item.captions for item in captions(folder).items}["b.png"] == ("the letter b",)


TABLE = [  # file_name and two columns of captions
    ("01-a cat.png", ["first", " second "], "tag one, tag two"),
    ("sub/e.png", [], 'a "quoted" text, with\na line break and \u2028'),
    ("./c.png", ["größer"], None),
    ("c.png", ["of another row"], " "),
]


def write_jsonl(path):
    rows = [{"file_name": name, "captions": many, "tags": one, "other": 1} for name, many, one in TABLE]
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\r\n" for row in rows), encoding="utf-8", newline="")


def write_parquet(path):
    pa = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    names, many, one = zip(*TABLE, strict=True)
    table = pa.table({"captions": many, "other": [b"\xff"] * len(names), "file_name": names, "tags": one})
    parquet.write_table(table, path, row_group_size=2, compression="none")


@pytest.mark.parametrize(("name", "write"), [("metadata.jsonl", write_jsonl), ("metadata.parquet", write_parquet)])
def test_lists_of_captions_and_several_columns(folder, name, write):
    (folder / "sub" / "metadata.jsonl").unlink()
    (folder / "metadata.jsonl").unlink()
    write(folder / name)
    found = captions(folder, caption_columns=("tags", "captions"))
    own = {item.key: item.captions for item in found.items if item.caption_origin == "metadata"}
    assert own == {
        "01-a cat.png": ("tag one, tag two", "first", "second"),
        "sub/e.png": ('a "quoted" text, with\na line break and',),
        "c.png": ("größer", "of another row"),
    }
    assert found.without_image == ["lost.txt"]
    own = {item.key: item.captions for item in captions(folder, caption_columns=("captions",)).items}
    assert own["sub/e.png"] == ("",)  # the row says that there is none: the file name is not asked


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16"])
def test_csv_is_what_pythons_own_writer_writes(folder, encoding):
    (folder / "metadata.jsonl").unlink()
    texts = ['a cat, "sitting"', "two\nlines", "größer"]
    with (folder / "metadata.csv").open("w", encoding=encoding, newline="") as file:
        writer = csv.writer(file)
        writer.writerows([["id", "caption", "file_name"], [1, texts[0], "c.png"], [], [2, texts[1], "01-a cat.png"]])
        writer.writerow([3, texts[2], "c.png"])
    (folder / "sub" / "metadata.jsonl").write_text('{"file_name": "e.png", "caption": "deeper"}\n', encoding="utf-8")
    own = {item.key: item.captions for item in captions(folder, caption_columns=("caption",)).items}
    assert own["c.png"] == (texts[0], texts[2])
    assert own["01-a cat.png"] == (texts[1],)
    assert own["sub/e.png"] == ("deeper",)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "metadata.csv: no column 'file_name', only none."),
        ("file_name,caption\nc.png,x\n", "metadata.csv: no column 'text', only 'file_name', 'caption'. Say which"),
        ("file_name,text\nc.png,a cat\n\nb.png,a cat, sitting\n",
         "metadata.csv line 4: 3 values, expected 2, as in the first line. A text with a comma stands between quotes"),
        ("file_name,text\nc.png\n", "metadata.csv line 2: 1 values, expected 2"),
        ('file_name,text\nc.png,"a"b\n', "metadata.csv line 2: not CSV ("),
        ('file_name,text\nc.png,"a\n', "metadata.csv line 2: not CSV ("),
    ],
)  # fmt: skip
def test_broken_csv_names_file_and_line(folder, content, message):
    (folder / "metadata.csv").write_text(content)
    with pytest.raises(UserError, match="^" + re.escape(message)):
        captions(folder)


def test_parquet_that_is_none_or_lacks_a_column(folder):
    pytest.importorskip("pyarrow")
    (folder / "metadata.jsonl").unlink()
    write_parquet(folder / "metadata.parquet")
    message = "metadata.parquet: no column 'text', only 'captions', 'other', 'file_name', 'tags'. Say which"
    with pytest.raises(UserError, match="^" + re.escape(message)):
        captions(folder)
    whole = (folder / "metadata.parquet").read_bytes()
    assert "größer".encode() in whole
    for damaged in (whole[:-9], whole.replace("größer".encode(), "größer".encode("latin-1") + b"  "), b""):
        (folder / "metadata.parquet").write_bytes(damaged)
        with pytest.raises(UserError, match=r"^metadata.parquet: cannot be read as Parquet \("):
            captions(folder, caption_columns=("captions",))


@pytest.mark.parametrize("kind", ["date32", "timestamp[s]", "timestamp[ns]", "duration[s]"])
def test_parquet_with_times_that_python_has_not_is_one_line(folder, kind):
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    (folder / "metadata.jsonl").unlink()
    value = pyarrow.array([2**31 - 1], "int32" if kind == "date32" else "int64")
    if kind == "timestamp[ns]":
        value = pyarrow.array([1], "int64")
    table = pyarrow.table({"file_name": ["a.png"], "text": value.cast(kind)})
    parquet.write_table(table, folder / "metadata.parquet")
    with pytest.raises(UserError, match=r"^metadata.parquet"):
        captions(folder)


@pytest.mark.slow
def test_a_small_parquet_file_that_says_a_long_text_often_takes_no_memory(folder, monkeypatch):
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    monkeypatch.setattr(metadata, "MAX_METADATA", 5_000_000)
    (folder / "metadata.jsonl").unlink()
    texts = pyarrow.array(["x" * 60_000] * 100_000).dictionary_encode()
    names = pyarrow.array(["a.png"] * 100_000).dictionary_encode()
    parquet.write_table(pyarrow.table({"file_name": names, "text": texts}), folder / "metadata.parquet")
    assert (folder / "metadata.parquet").stat().st_size < 10_000
    with pytest.raises(UserError, match=r"metadata.parquet row 84: over 5,000,000 characters of captions up to here"):
        captions(folder)


def test_parquet_without_pyarrow_says_what_to_install(folder, monkeypatch):
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    (folder / "metadata.parquet").write_bytes(b"")
    with pytest.raises(UserError, match=r"^metadata.parquet: .* pyarrow. Type: pip install 'latentprep\[parquet\]'$"):
        captions(folder)


def test_metadata_of_images_that_are_not_there_is_reported(folder):
    (folder / "bad.png").write_text("no picture")
    names = ["../outside.png", "/etc/passwd", "gone.png", "bad.png", "c.png"]
    lines = [json.dumps({"file_name": name, "text": "x"}) for name in names]
    (folder / "sub" / "metadata.jsonl").write_text("\n".join(lines))
    assert captions(folder).without_image == [
        "lost.txt", "outside.png", "/etc/passwd", "sub/gone.png", "sub/bad.png", "sub/c.png",
    ]  # fmt: skip


def test_a_caption_column_without_a_metadata_file(folder):
    (folder / "metadata.jsonl").unlink()
    (folder / "sub" / "metadata.jsonl").unlink()
    with pytest.raises(
        UserError, match=r"^--caption-column tags: SOURCE .* holds no metadata.jsonl, metadata.csv, meta"
    ):
        captions(folder, caption_columns=("tags",))


def test_the_ancestors_six_templates_ship():
    assert set(list_templates()) == {"none", "style", "style_filewords", "subject", "subject_filewords", "hypernetwork"}
    for name, lines in list_templates().items():
        assert lines
        text = "\n".join(lines)
        assert ("[filewords]" in text) == (name in ("style_filewords", "subject_filewords", "hypernetwork"))
        assert ("[name]" in text) == (name not in ("none", "hypernetwork"))


def test_prompt_is_the_template_line_filled_in(tmp_path):
    path = tmp_path / "mine.txt"
    path.write_text("\n  [name] and [filewords] and [name]\n\n", encoding="utf-8")
    assert make_prompt(load_template(str(path)), "a [b]", "sks", 0, "k") == "sks and a [b] and sks"
    assert make_prompt(None, "a [name]", "sks", 0, "k") == "a [name]"


def test_template_line_depends_on_seed_and_key_alone():
    template = load_template("subject")
    keys = [f"{n}.png" for n in range(200)]
    prompts = [make_prompt(template, "", "sks", 1, key) for key in keys]
    assert prompts == [make_prompt(template, "", "sks", 1, key) for key in keys]
    assert prompts != [make_prompt(template, "", "sks", 2, key) for key in keys]
    assert len(set(prompts)) == len(template)  # all lines are used


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "neither a file nor a shipped template. Shipped: hypernetwork, none, style"),
        (b"\n \n", "has no lines"),
        (b"\xff", "not UTF-8"),
    ],
)
def test_template_errors(tmp_path, content, message):
    path = tmp_path / "t.txt"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(UserError, match=message):
        load_template(str(path))


@pytest.mark.slow
def test_captions_and_expressions_without_measure(folder):
    (folder / "b.txt").write_text("cat " * 2_500_000)
    found = add_captions(list_images(open_source(folder)), TextOptions())
    assert [(skip.key, skip.reason) for skip in found.skips] == [("b.png", "bad_caption")]
    assert found.skips[0].detail == "b.txt: 10.0 MB, expected at most 64.0 kB. Shorten it."
    (folder / "metadata.jsonl").write_text(json.dumps({"file_name": "a.png", "text": "x" * 64_001}))
    with pytest.raises(UserError, match=r"metadata.jsonl line 1: a caption of over 64,000 characters"):
        add_captions(list_images(open_source(folder)), TextOptions())
    (folder / "metadata.jsonl").unlink()
    gradient(8, 8).save(folder / ("x" * 60 + "!.png"))
    (folder / "b.txt").unlink()
    with pytest.raises(UserError, match=r"--word-regex .*: takes over 2 s for the file name x+!.png"):
        add_captions(list_images(open_source(folder)), TextOptions(word_regex="((x|x)+)+[yz]$"))


def found_captions(folder, **options):
    return {item.key: (item.captions, item.caption_origin) for item in captions(folder, **options).items}


def test_captions_come_from_where_they_are_asked_to(folder, monkeypatch):
    with_files = {
        "b.png": (("the letter b",), "txt"), "sub/b.png": (("with a mark",), "caption"),
        "c.png": (("from metadata",), "metadata"), "d.png": (("größer",), "txt"),
        "sub/e.png": (("deeper",), "metadata"),
    }  # fmt: skip
    assert found_captions(folder, caption_from="file") == {**with_files, "01-a cat.png": (("",), "nothing")}
    names = {"01-a cat.png": "a cat", "b.png": "b", "sub/b.png": "b", "c.png": "c", "d.png": "d", "sub/e.png": "e"}
    assert found_captions(folder, caption_from="name") == {key: ((n,), "filename") for key, n in names.items()}
    assert found_captions(folder, caption_from="none") == dict.fromkeys(names, (("",), "nothing"))
    (folder / "sub").rename(folder / "10_sks dog")
    found = found_captions(folder, caption_from="folder")
    assert found["10_sks dog/b.png"] == (("sks dog",), "folder")
    assert found["b.png"] == ((folder.name,), "folder")
    shutil.move(folder, folder.parent / "3_flat")
    assert found_captions(folder.parent / "3_flat", caption_from="folder")["b.png"] == (("flat",), "folder")
    monkeypatch.chdir(folder.parent / "3_flat")
    assert found_captions(".", caption_from="folder")["b.png"] == (("flat",), "folder")


@pytest.mark.parametrize("extension", [".wd14", "wd14", " .WD14"])
def test_caption_files_have_the_ending_that_is_said(folder, extension):
    (folder / "b.wd14").write_text("1girl, hat")
    (folder / "b.json").write_text("{}")
    found = captions(folder, caption_extension=extension)
    by_key = {item.key: (item.captions, item.caption_origin) for item in found.items}
    assert by_key["b.png"] == (("1girl, hat",), "wd14")
    assert by_key["d.png"] == (("d",), "filename")
    assert found.ignored == {".json": 1}


@pytest.mark.parametrize("extension", [".", ".tar.txt", "a b/c", ".png", "jpg"])
def test_an_ending_that_caption_files_cannot_have_is_refused(folder, extension):
    with pytest.raises(UserError, match=rf"^--caption-extension {re.escape(extension)}: expected the ending"):
        captions(folder, caption_extension=extension)


def test_prefix_suffix_and_trigger_stand_where_they_should(folder):
    (folder / "c.txt").write_text("SKS dog, on grass")
    options = {"caption_prefix": "a photo of", "caption_suffix": " in the rain ", "trigger": "sks dog"}
    found = found_captions(folder, **{**options, "caption_prefix": ""})
    assert found["b.png"][0] == ("sks dog, the letter b in the rain",)
    assert found["c.png"][0] == ("SKS dog, on grass in the rain",)  # it begins with it
    assert found_captions(folder, **options)["b.png"][0] == ("sks dog, a photo of the letter b in the rain",)
    assert found_captions(folder, trigger="s", caption_prefix="sks")["b.png"][0] == (
        "s, sks the letter b",
    )  # a whole word
    assert found_captions(folder, trigger="sks dog", caption_from="none")["b.png"][0] == ("sks dog",)
    assert found_captions(folder, caption_prefix="p", caption_suffix="s", caption_from="none")["b.png"][0] == ("p s",)
    (folder / "b.txt").write_text("one\ntwo")
    assert found_captions(folder, trigger="x", caption_lines=True)["b.png"][0] == ("x, one", "x, two")


def test_tags_are_shuffled_behind_the_trigger(run, folder, tmp_path):
    (folder / "b.txt").write_text("a, b, c, d, e, f")
    shuffled = ("--trigger", "sks, dog", "--shuffle-tags", "--tag-drop-out", 0.3, "--prompts-per-image", 20)
    options = ("encode", folder, "--out", tmp_path / "c", *SMALL, *shuffled)
    assert run(*options).code == 0
    data = LatentDataset(tmp_path / "c", repeats=20)
    (index,) = (n for n in range(data.num_images) if data.key(n) == "b.png")
    prompts = [data[index + repeat * data.num_images].cond_text[0] for repeat in range(20)]
    assert len(set(prompts)) > 10
    assert all(prompt == "sks, dog" or prompt.startswith("sks, dog, ") for prompt in prompts)
    assert run("verify", tmp_path / "c", "--source", folder, "--re-encode", 3).code == 0
    again = run(*options)
    assert "nothing to do" in again.out
    changed = run(*(word if word != "sks, dog" else "sks, cat" for word in options))
    assert changed.code == 0
    assert "the text of 6 images is written anew, in whole shards; latents left alone" in changed.out


@pytest.mark.slow
def test_what_the_prompts_will_be_is_said_before_anything_is_encoded(run, folder):
    (folder / "empty.png").write_bytes((folder / "b.png").read_bytes())
    (folder / "empty.txt").write_text(" ")
    (folder / "20230714_123456.png").write_bytes((folder / "b.png").read_bytes())
    said = run("encode", folder, "--model", "tiny", "--dry-run").err
    assert "2 from file names" in said
    assert "file names as captions: 'a cat', '_123456' (--caption-from file leaves such images without)" in said
    assert "1 caption empty (--trigger or a --template gives words to all)" in said
    assert re.search(r"^prompts  such as 'a cat', 'the letter b', ", said, re.MULTILINE)
    said = run("encode", folder, "--model", "tiny", "--dry-run", "--caption-from", "file", "--trigger", "a\x1b[1m").err
    assert "2 without one" in said
    assert "file names" not in said
    assert "empty (" not in said
    assert "\x1b" not in said


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--placeholder", "sks dog"), "--placeholder sks dog: without a --template nothing has a [name] to be filled. "
         "To begin each caption with it: --trigger 'sks dog'."),
        (("--caption-from", "none", "--word-regex", "x"), "--word-regex x: with --caption-from none no caption comes"),
        (("--caption-from", "name", "--caption-column", "x"), "--caption-column with --caption-from name: no"),
        (("--caption-from", "folder", "--caption-extension", "x"), "--caption-extension with --caption-from folder"),
        (("--caption-from", "name", "--caption-lines"), "--caption-lines with --caption-from name: no caption file is"),
    ],
)  # fmt: skip
def test_captions_that_cannot_be_meant_are_refused(folder, run, arguments, message):
    result = run("encode", folder, "--model", "tiny", "--dry-run", *arguments)
    assert result.code == 1
    assert message in result.err


@pytest.mark.parametrize("encoding", ["utf-16-le", "utf-16-be"])
@pytest.mark.parametrize("text", ["a cat on a mat", "a café on a mat"])
def test_utf_16_without_its_mark_is_a_skip_that_says_so(run, images, tmp_path, encoding, text):
    (images / "tall0.txt").write_bytes(text.encode(encoding))
    out = run("encode", images, "--out", tmp_path / "c", *SMALL).out
    assert "skipped  1 bad_caption (tall0.png: tall0.txt: no" in out
    assert f". It looks like {encoding} without a byte order mark: name that with --caption-encoding.)" in out
    out = run("encode", images, "--out", tmp_path / "c", *SMALL, "--caption-encoding", encoding).out
    assert "encoded  1 image" in out
    assert latentprep.inspect(tmp_path / "c", key="tall0.png")["caption"] == [text]


def test_a_caption_with_a_nul_is_a_skip(run, images, tmp_path):
    (images / "tall0.txt").write_bytes(b"a long cat\0 on a mat")
    out = run("encode", images, "--out", tmp_path / "c", *SMALL).out
    said = f"not a text file, it has NUL characters. {ADVICE}"
    assert f"skipped  1 bad_caption (tall0.png: tall0.txt: {said})" in out
