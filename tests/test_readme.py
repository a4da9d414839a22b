"""README.md: every command and snippet in it runs, and it speaks of what there is."""

import re
import runpy
import shlex
import shutil
import subprocess
import tarfile
from pathlib import Path

import pytest
from diffusers import DDPMScheduler, UNet2DConditionModel

import latentprep
from latentprep.cli import commands as cli
from latentprep.door import list_parameters
from latentprep.prompts import list_templates
from latentprep.records import REASONS
from tests.conftest import gradient, make_model

ROOT = Path(__file__).parent.parent
COMMANDS = ("encode", "inspect", "verify", "diff", "compact", "merge", "preview", "report", "bench")
README = (ROOT / "README.md").read_text(encoding="utf-8")


def blocks(language):
    return re.findall(rf"^```{language}\n(.*?)^```", README, re.MULTILINE | re.DOTALL)


def commands():
    return [shlex.split(line) for block in blocks("bash") for line in block.splitlines()]


@pytest.fixture
def desk(photos, tmp_path, monkeypatch):
    """A folder as the README's reader has it: ./photos, ./shards, and a small model in the place of the large one."""
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
        exec(compile(snippet, "README.md", "exec"), scope)
    assert scope["loss"].isfinite()
    assert scope["loader"].epoch == 2


def test_every_other_command_is_a_target_of_the_makefile():
    others = [command for command in commands() if command[0] != "latentprep"]
    assert others == [["make", "demo"], ["make", "test"]]
    assert shutil.which("make")
    for command in [*others, ["make", "lint"], ["make", "bench"]]:
        subprocess.run([command[0], "-n", *command[1:]], cwd=ROOT, check=True, capture_output=True)


def test_continuous_integration_runs_the_readmes_commands():
    assert {"make demo", "make test"} <= set((ROOT / ".ci" / "run").read_text().splitlines())


def test_options_and_files_that_it_names_exist():
    functions = [getattr(latentprep, name) for name in COMMANDS]
    table = {parameter.flag for function in functions for parameter in list_parameters(function)}
    shown = table | {"--json", "--list", "--preview", "--html", "--quiet"}
    shown |= {"--help", "--version", "--install-completion"}
    scripts = re.findall(r"`python (\S+\.py)([^`]*)`", README)
    assert len(scripts) >= 4
    for script, arguments in scripts:
        for option in re.findall(r"--([a-z-]+)", arguments):
            assert f" {option.replace('-', '_')}: Annotated[" in (ROOT / script).read_text(encoding="utf-8")
    without_scripts = re.sub(r"`python [^`]*`", "", README)
    for option in set(re.findall(r"(?<![\w-])--[a-z][a-z-]+", without_scripts)):
        assert option in shown, option
    for path in set(re.findall(r"`((?:examples|benchmarks|templates)/[\w./]*)`", README)):
        assert (ROOT / path).exists(), path
    for name in re.findall(r"--template (\w+)", README):
        assert name in list_templates()
    for command in set(re.findall(r"`latentprep (\w+)", README)):
        assert hasattr(cli, command)


@pytest.mark.parametrize("name", COMMANDS)
def test_every_option_is_named(name):
    for parameter in list_parameters(getattr(latentprep, name)):
        if not parameter.option.in_python_only and not parameter.option.is_argument:
            assert re.search(rf"{parameter.flag}(?![\w-])", README), parameter.flag
    assert f"latentprep.{name}" in README or f"latentprep {name}" in README


def test_its_table_of_models_is_that_of_the_rows():
    pytest.importorskip("diffusers", minversion="0.42")  # before, some of the pipelines are not there
    script = runpy.run_path(str(ROOT / "docs" / "make_table.py"))
    assert script["find_table"](README) == script["make_table"](), "python docs/make_table.py writes it anew"


def test_reasons_that_it_lists_are_those_of_the_code():
    listed = set(re.findall(r"`(\w+)`", README.split("with its reason")[1].split("\n\n")[0]))
    assert listed == set(REASONS)
    source = "".join(path.read_text(encoding="utf-8") for path in (ROOT / "latentprep" / "prepare").rglob("*.py"))
    for reason in REASONS:
        assert f'"{reason}"' in source
    assert set(re.findall(r'(?:Skip\([\w.]+, |skip\(|return )"([a-z_]+)", ', source)) <= set(REASONS)
