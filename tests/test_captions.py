"""prepare/captions.py and prompts.py: where captions come from, and what becomes of them."""

import re

import pytest

from latentprep.config import TextOptions
from latentprep.errors import UserError
from latentprep.prepare.captions import add_captions, caption_from_name
from latentprep.prepare.source import list_folder
from latentprep.prompts import list_templates, load_template, make_prompt
from tests.conftest import gradient


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
    return add_captions(list_folder(folder), TextOptions(**options))


def test_sidecar_then_metadata_then_file_name(folder):
    found = captions(folder)
    assert {item.key: (item.caption, item.caption_origin) for item in found.items} == {
        "01-a cat.png": ("a cat", "filename"),
        "b.png": ("the letter b", "txt"),
        "sub/b.png": ("with a mark", "caption"),
        "c.png": ("from metadata", "metadata"),
        "d.png": ("größer", "txt"),
        "sub/e.png": ("deeper", "metadata"),
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
    word = re.compile(r"[a-z]{2,}")
    assert caption_from_name(name, word, ", ") == ", ".join(word.findall(re.sub(r"^[-\d]+\s*", "", stem)))


def test_word_regex_and_joiner_only_touch_file_names(folder):
    found = {item.key: item.caption for item in captions(folder, word_regex=r"\w+", joiner="+").items}
    assert found["01-a cat.png"] == "a+cat"
    assert found["b.png"] == "the letter b"


def test_bad_regex(folder):
    with pytest.raises(UserError, match=r"--word-regex \(\[: not a regular expression"):
        captions(folder, word_regex="([")


def test_captions_that_are_not_text_are_named_and_counted(folder):
    (folder / "b.txt").write_bytes(b"caf\xe9")
    (folder / "d.txt").write_bytes(b"\xff\xff\xff")
    with pytest.raises(UserError) as error:
        captions(folder)
    assert str(error.value) == "b.txt: not UTF-8-SIG text at byte 3. Save it as UTF-8. (1 more such files.)"


def test_a_caption_file_that_cannot_be_read(folder):
    (folder / "c.txt").symlink_to(folder / "nowhere")
    with pytest.raises(UserError, match=r"^c.txt: cannot be read \(No such file or directory\)."):
        captions(folder)


@pytest.mark.parametrize("line", ["{", "[1]", '{"file_name": "a.png"}', '{"file_name": 1, "text": "x"}'])
def test_broken_metadata_names_file_and_line(folder, line):
    (folder / "metadata.jsonl").write_text('{"file_name": "c.png", "text": "fine"}\n' + line, encoding="utf-8")
    with pytest.raises(UserError, match=r"^metadata.jsonl line 2: expected .*file_name.*, got "):
        captions(folder)


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
