"""README.md and docs/: every command and snippet in them runs, and they speak of what there is."""

import re
import runpy
import shlex
import shutil
import subprocess
import tarfile
from pathlib import Path

import pytest
import typer
from diffusers import DDPMScheduler, UNet2DConditionModel
from PIL import Image, ImageChops, ImageStat

from latentprep.cli import commands as cli
from latentprep.prompts import list_templates
from latentprep.records import REASONS
from tests.conftest import gradient, make_model

ROOT = Path(__file__).parent.parent
# in the order in which one reads them; tests/test_training_loops.py takes the snippets of training.md
NAMES = (
    "README.md", "docs/getting-started.md", "docs/captions.md", "docs/images.md", "docs/models.md", "docs/caches.md",
    "docs/reader.md", "docs/training.md", "docs/recipes.md", "docs/coming-from.md", "docs/options.md",
    "docs/fidelity.md", "docs/speed.md", "docs/measured.md", "docs/troubleshooting.md", "docs/faq.md",
)  # fmt: skip
PAGES = {name: (ROOT / name).read_text(encoding="utf-8") for name in NAMES}
TEXT = "\n".join(PAGES.values())


def blocks(language):
    """Blocks of code of all pages. "bash", "python", "toml": they run; "sh", "py": they need what a test has not."""
    texts = [text for name, text in PAGES.items() if name != "docs/training.md"]
    return [b for text in texts for b in re.findall(rf"^```{language}\n(.*?)^```", text, re.MULTILINE | re.DOTALL)]


def commands(language="bash"):
    return [shlex.split(line) for block in blocks(language) for line in block.splitlines()]


@pytest.fixture
def desk(photos, tmp_path, monkeypatch):
    """A folder as the pages' reader has it: ./photos, ./shards, and a small model in the place of the large one."""
    folder = make_model(tmp_path / "stable-diffusion-v1-5")
    UNet2DConditionModel(
        block_out_channels=(8, 16),
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        layers_per_block=1,
        cross_attention_dim=32,
        attention_head_dim=4,
        norm_num_groups=8,
    ).save_pretrained(folder / "unet")
    DDPMScheduler().save_pretrained(folder / "scheduler")
    shutil.copy(folder / "vae" / "diffusion_pytorch_model.safetensors", tmp_path / "vae-ft-mse.safetensors")
    (tmp_path / "shards").mkdir()
    with tarfile.open(tmp_path / "shards" / "00000.tar", "w") as tar:
        for path in sorted(photos.iterdir()):
            tar.add(path, path.name)
    (photos / "birds").mkdir()
    for n in range(16):  # as BMP: the same bytes whatever the version of Pillow, so that the split is the same
        gradient(32, 32).rotate(n * 6).save(photos / "birds" / f"{n}.bmp")
    (tmp_path / "sets.toml").write_text(blocks("toml")[0], encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.slow
def test_every_command_and_snippet_runs_in_its_order(desk, run):
    latentprep = [command for command in commands() if command[0] == "latentprep"]
    assert len(latentprep) >= 6
    for command in latentprep:
        result = run(*command[1:])
        assert result.code == 0, (command, result.err)
    scope = {}
    for snippet in blocks("python"):
        exec(compile(snippet, "a page", "exec"), scope)
        if "loss.backward()" in snippet:
            assert scope["loss"].isfinite()
            assert scope["loader"].epoch == 2
    assert len(scope["sizes"]) > 2
    with Image.open("preview.png") as drawn, Image.open(ROOT / "docs" / "images" / "preview.png") as shown:
        assert drawn.size == shown.size  # letters and JPEGs differ a little between versions of Pillow
        assert ImageStat.Stat(ImageChops.difference(drawn.convert("RGB"), shown.convert("RGB"))).mean < [4, 4, 4]


def test_every_other_command_is_a_target_of_the_makefile():
    others = [command for command in commands() if command[0] != "latentprep"]
    assert others == [["make", "demo"], ["make", "test"]]
    assert shutil.which("make")
    named = set(re.findall(r"`make (\w+)`", TEXT))
    assert named >= {"demo", "test", "docs", "slow", "lint"}
    for command in [*others, *(["make", name] for name in sorted(named))]:
        subprocess.run([command[0], "-n", *command[1:]], cwd=ROOT, check=True, capture_output=True)


def test_continuous_integration_runs_the_readmes_commands():
    assert {"make demo", "make test"} <= set((ROOT / ".ci" / "run").read_text().splitlines())


def shown_options():
    """Every option that latentprep has, of all its commands and of no command."""
    app = typer.main.get_command(cli.app)
    params = [param for command in (app, *app.commands.values()) for param in command.params]
    return {option for param in params for option in param.opts} | {"--help", "--install-completion"}


def test_options_and_files_that_pages_name_exist():
    scripts = re.findall(r"`?python (\S+\.py)([^`\n]*)", TEXT)
    assert len(scripts) >= 20
    for script, arguments in scripts:
        for option in re.findall(r"--([a-z-]+)", arguments):
            assert f" {option.replace('-', '_')}: Annotated[" in (ROOT / script).read_text(encoding="utf-8")
    shown = shown_options()
    for name, text in PAGES.items():
        for option in set(re.findall(r"(?<![\w-])--[a-z][a-z-]+", re.sub(r"`?python \S+\.py[^`\n]*", "", text))):
            assert option in shown, (name, option)
    for path in set(re.findall(r"`((?:examples|benchmarks|templates|docs)/[\w./]*)`", TEXT)):
        assert (ROOT / path).exists(), path
    for name in re.findall(r"--template ([a-z]\w+)", TEXT):
        assert name in list_templates()
    for command in set(re.findall(r"`latentprep ([a-z]\w*)", TEXT)):
        assert hasattr(cli, command)


@pytest.mark.parametrize("language", ["bash", "sh"])
def test_every_command_line_is_understood(language):
    """Also of the commands that no test runs, since their models are not here."""
    app = typer.main.get_command(cli.app)
    lines = [words for words in commands(language) if "latentprep" in words]
    assert len(lines) >= 15
    for words in lines:
        name, *arguments = words[words.index("latentprep") + 1 :]
        app.commands[name].make_context(name, arguments)


def test_every_option_is_named():
    for option in shown_options() - {"--show-completion"}:
        assert re.search(rf"{option}(?![\w-])", TEXT), option
    for name in ("encode", "inspect", "verify", "diff", "compact", "merge", "preview", "report", "bench"):
        assert f"latentprep.{name}" in TEXT or f"latentprep {name}" in TEXT


def test_the_page_of_options_is_that_of_the_signatures():
    script = runpy.run_path(str(ROOT / "docs" / "make_options.py"))
    assert PAGES["docs/options.md"] == script["make_page"](), "python docs/make_options.py writes it anew"


def test_the_table_of_models_is_that_of_the_rows():
    pytest.importorskip("diffusers", minversion="0.42")  # before, some of the pipelines are not there
    script = runpy.run_path(str(ROOT / "docs" / "make_table.py"))
    found = script["find_table"](PAGES["docs/models.md"])
    assert found == script["make_table"](), "python docs/make_table.py writes it anew"


def test_reasons_that_a_page_lists_are_those_of_the_code():
    section = PAGES["docs/images.md"].partition("\n## Images that cannot be used\n")[2].partition("\n## ")[0]
    listed = dict(re.findall(r"^\| `(\w+)` \| (.*) \|$", section, re.MULTILINE))
    assert listed == {reason: meaning for reason, (_, meaning) in REASONS.items()}
    source = "".join(path.read_text(encoding="utf-8") for path in (ROOT / "latentprep" / "prepare").rglob("*.py"))
    for reason in REASONS:
        assert f'"{reason}"' in source
    assert set(re.findall(r'(?:Skip\([\w.]+, |skip\(|return )"([a-z_]+)", ', source)) <= set(REASONS)
