"""examples/diffusers/patch.py: a script that a recipe does not fit is one clear error, and nothing is written."""

import ast
import importlib
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
SCRIPT = ROOT / "tests" / "recipes" / "train_text_to_image_lora.py"
FITS = "The recipe is for train_text_to_image_lora.py as commit c56add8081 of diffusers left it: take"


@pytest.fixture(autouse=True)
def tool(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "examples" / "diffusers"))
    return importlib.import_module("patch")


@pytest.fixture
def script(tmp_path):
    path = tmp_path / SCRIPT.name
    path.write_text(SCRIPT.read_text(encoding="utf-8"), encoding="utf-8")
    return path


@pytest.fixture
def refused(tool):
    """refused(script) -> the line that says why; it checks that no file was made."""

    def run(script, out=None):
        there = sorted(script.parent.iterdir())
        with pytest.raises(SystemExit) as exit_:
            tool.main(script, out)
        assert sorted(script.parent.iterdir()) == there
        said = str(exit_.value)
        assert said.startswith("Error: ")
        assert said.isprintable()
        return said

    return run


def test_it_is_written_beside_the_script_and_never_over_a_file(script, tool, refused, capsys):
    tool.main(script)
    out = script.with_name("train_text_to_image_lora_cached.py")
    assert capsys.readouterr().out == f"Wrote {out}. Give it --cache DIR, a cache of latentprep encode.\n"
    assert "open_loader(" in out.read_text(encoding="utf-8")
    before = script.read_bytes(), out.read_bytes()
    assert refused(script) == f"Error: {out}: is there already. Delete it, or name another file with --out."
    assert refused(script, script).startswith(f"Error: {script}: is there already.")
    assert (script.read_bytes(), out.read_bytes()) == before


def test_a_script_that_is_patched_already_is_said_to_be(script, tool, refused):
    tool.main(script)
    script.write_text(script.with_name("train_text_to_image_lora_cached.py").read_text(encoding="utf-8"))
    assert refused(script, script.with_name("more.py")) == f"Error: {script}: is patched already. Nothing was written."


@pytest.mark.parametrize(
    ("old", "new", "says"),
    [
        ("unet.train()", "unet.train(True)", "edit 19 of 21 looks for `unet.train()` and finds it nowhere, expected"),
        (
            "        unet.train()\n", "        unet.train()\n        unet.train()\n",
            "looks for `unet.train()` and finds it 2 times, in lines 106, 107, expected once.",
        ),
        (
            "    unet = UNet2D", "    vae = AutoencoderKL.from_pretrained(model)\n    unet = UNet2D",
            "looks for `vae = AutoencoderKL.from_pretrained(` and finds it 2 times, in lines",
        ),
        (
            "    vae = AutoencoderKL", "    if model:\n        vae = AutoencoderKL",
            "looks for `vae = AutoencoderKL.from_pretrained(` behind `tokenizer = CLIPTokenizer.from_pretrained(`, "
            "and it stands elsewhere.",
        ),
        (
            "        diffusers.utils.logging.set_verbosity_error()\n", "",
            "is no Python once it is patched: expected an indented block",
        ),
    ],
)  # fmt: skip
def test_a_place_that_is_not_there_once_names_edit_and_version(script, refused, old, new, says):
    text = script.read_text(encoding="utf-8")
    assert old in text
    script.write_text(text.replace(old, new, 1), encoding="utf-8")
    said = refused(script)
    assert says in said
    assert said.startswith(f"Error: {script}: ")
    assert FITS in said
    assert said.endswith("commit. Nothing was written.")


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b"def f(:\n", "is no Python of this version: invalid syntax"),
        (b"x = 1\0\n", "is no Python of this version: source code string cannot contain null bytes"),
        (b"\xff\xfe\n", "cannot be read: 'utf-8' codec can't decode byte 0xff"),
        (b"", "edit 1 of 21 looks for `import diffusers` and finds it nowhere, expected once."),
    ],
)
def test_what_is_no_script_is_said_to_be_none(script, refused, content, says):
    script.write_bytes(content)
    assert says in refused(script)


def test_a_script_without_a_recipe_or_without_a_file(tmp_path, refused):
    known = ", ".join(f"train_{name}.py" for name in importlib.import_module("patch").RECIPES)
    other = tmp_path / "train_controlnet.py"
    other.touch()
    assert refused(other) == (
        f"Error: {other}: there is no recipe for a script of this name. There is one for {known}."
    )
    gone = tmp_path / "train_dreambooth_lora_flux.py"
    assert refused(gone).startswith(f"Error: {gone}: cannot be read: [Errno 2]")


def test_formatting_and_comments_of_a_script_do_not_matter(script, tool, tmp_path):
    tool.main(script, tmp_path / "a.py")
    script.write_text(ast.unparse(ast.parse(script.read_text(encoding="utf-8"))), encoding="utf-8")
    tool.main(script, tmp_path / "b.py")
    trees = [ast.dump(ast.parse((tmp_path / name).read_text(encoding="utf-8"))) for name in ("a.py", "b.py")]
    assert trees[0] == trees[1]
