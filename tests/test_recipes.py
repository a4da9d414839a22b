"""examples/diffusers/: recipes applied to small scripts of our own, which train from a cache as they did from images.

With LATENTPREP_DIFFUSERS=FOLDER, in which diffusers' own scripts lie, they are applied to those too.
"""

import builtins
import importlib
import json
import os
import re
import runpy
import shutil
import subprocess
import symtable
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

import latentprep
from tests.conftest import gradient
from tests.recipes.common import FLAGS
from tests.recipes.miniatures import make_pipeline

ROOT = Path(__file__).parent.parent
TOOL = ROOT / "examples" / "diffusers"
RUNNER = ROOT / "tests" / "recipes" / "same_noise.py"
NAMES = ("text_to_image_lora", "text_to_image_lora_sdxl", "dreambooth_lora_flux", "dreambooth_lora_z_image")
REAL = os.environ.get("LATENTPREP_DIFFUSERS")
COUNT = 6  # images
WORDS = ("LOG", "SEEN", "RATE", "DRAWN", "VALIDATION")  # what lines of the scripts begin with


@pytest.fixture(autouse=True)
def tool(monkeypatch):
    monkeypatch.syspath_prepend(str(TOOL))
    return importlib.import_module("patch")


@dataclass
class Desk:
    """What a training starts from."""

    name: str
    script: Path
    photos: Path
    model: Path
    cache: Path
    is_ours: bool = True

    @property
    def options(self):
        own = ["--instance_prompt", "x"] if self.name.startswith("dreambooth") else []
        return ["--pretrained_model_name_or_path", self.model, "--learning_rate", 1e-3, "--lr_warmup_steps", 0, *own]

    @property
    def images(self):
        """The options of the script as it was."""
        option = "--train_data_dir" if self.name.startswith("text") else "--dataset_name"
        return [option, self.photos, "--caption_column", "text", "--resolution", 64, "--center_crop"]


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """name -> the folder of its images, its miniature and its cache; made when it is first asked for."""
    folders: dict[str, Path] = {}

    def make(name):
        if name in folders:
            return folders[name]
        folder = folders[name] = tmp_path_factory.mktemp(name)
        photos = folder / "photos"
        photos.mkdir()
        rows = [{"file_name": f"{n}.png", "text": f"house {n}"} for n in range(COUNT)]
        for n, row in enumerate(rows):
            gradient(96 + 16 * n, 96 + 16 * n).rotate(20 * n).save(photos / row["file_name"])
        (photos / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        make_pipeline(name, folder / "model")
        is_bilinear = name.startswith("dreambooth")
        done = latentprep.encode(
            photos, folder / "cache", model=str(folder / "model"), width=64, height=64, store_dtype="float32",
            filter="bilinear" if is_bilinear else "lanczos", caption_column=["text"], progress=False,
            no_draft=True,  # the scripts resize with Pillow
        )  # fmt: skip
        assert done.ok
        return folder

    return make


def depth(path):
    """Copies in examples/research_projects lie deeper than the scripts themselves."""
    return len(path.parts), path


def list_desks():
    for name in NAMES:
        yield pytest.param((name, RUNNER.with_name(f"train_{name}.py")), id=f"ours-{name}")
    for name in NAMES:
        found = sorted(Path(REAL).rglob(f"train_{name}.py"), key=depth) if REAL else []
        without = pytest.mark.skipif(not found, reason=f"LATENTPREP_DIFFUSERS names no folder with train_{name}.py")
        yield pytest.param((name, found[0] if found else None), id=f"diffusers-{name}", marks=without)


def one_desk(name):
    """All desks, of which but one is for continuous integration: each takes half a minute."""
    for own in list_desks():
        marks = own.marks if own.values[0][0] == name else [*own.marks, pytest.mark.long]
        yield pytest.param(*own.values, id=own.id, marks=marks)


@pytest.fixture(params=list_desks())
def desk(request, made):
    name, script = request.param
    folder = made(name)
    return Desk(name, script, folder / "photos", folder / "model", folder / "cache", script.parent == RUNNER.parent)


@pytest.fixture
def patched(desk, tool, tmp_path):
    """The desk's script, patched."""
    tool.main(desk.script, tmp_path / "patched.py")
    return tmp_path / "patched.py"


def start(script, *options, ranks=1, free=False):
    """What a script prints: the lines that begin with each word."""
    torchrun = ["-m", "torch.distributed.run", "--nproc_per_node", ranks] if ranks > 1 else []
    command = [sys.executable, *torchrun, RUNNER, script, *options]
    own = {"PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1", "ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"}
    own["FREE"] = "1" if free else ""
    result = subprocess.run(
        [*map(str, command)], capture_output=True, text=True, timeout=300, env={**os.environ, **own}, check=False
    )
    assert result.returncode == 0, result.stderr[-3000:]
    return {word: re.findall(rf"\b{word} (.*)", result.stdout) for word in WORDS}


def losses(printed):
    return [value for line in printed["LOG"] for value in json.loads(line).values()]


def undefined(text):
    """Names that a script uses and nothing in it defines."""
    module = symtable.symtable(text, "script", "exec")
    known = {symbol.get_name() for symbol in module.get_symbols() if symbol.is_assigned() or symbol.is_imported()}
    tables, found = [module], set()
    while tables:
        table = tables.pop()
        tables += table.get_children()
        found |= {symbol.get_name() for symbol in table.get_symbols() if symbol.is_global() and symbol.is_referenced()}
    return found - known - {*dir(builtins), "__file__"}


def test_a_patched_script_compiles_and_defines_what_it_uses(desk, patched):
    text = patched.read_text(encoding="utf-8")
    compile(text, "patched", "exec")
    assert undefined(text) == set()
    assert not re.search(r"^\s*(import|from) (torchvision|datasets)\b", text, re.MULTILINE)
    assert not re.search(r"(?<!transforms\.)\btransforms\.\w", text)
    assert text.count("train_dataloader.set_epoch(epoch)") == 1
    assert not (TOOL / "__init__.py").exists()  # with examples/ on the path, it would stand before diffusers itself


@pytest.mark.slow
@pytest.mark.parametrize("desk", one_desk("text_to_image_lora"), indirect=True)
def test_losses_from_a_cache_are_those_from_images(desk, patched, tmp_path):
    options = [*desk.options, "--train_batch_size", 3, "--max_train_steps", 4]
    options += ["--validation_prompt", "a house"] if desk.is_ours else []
    wanted = start(desk.script, *desk.images, *options, "--output_dir", tmp_path / "a")
    found = start(patched, "--cache", desk.cache, *options, "--output_dir", tmp_path / "b")
    assert len(losses(wanted)) == 4
    assert losses(found)[0] == pytest.approx(losses(wanted)[0], rel=1e-6)
    assert losses(found) == pytest.approx(losses(wanted), rel=1e-4)
    assert (found["DRAWN"], found["VALIDATION"]) == (wanted["DRAWN"], wanted["VALIDATION"])
    assert bool(wanted["DRAWN"] or wanted["VALIDATION"]) == (desk.is_ours and desk.name != "text_to_image_lora")


@pytest.mark.slow
@pytest.mark.parametrize("desk", one_desk("text_to_image_lora_sdxl"), indirect=True)
def test_a_run_that_goes_on_from_a_checkpoint_ends_the_same(desk, patched, tmp_path):
    options = [*desk.options, "--cache", desk.cache, "--train_batch_size", 2, "--max_train_steps", 5]
    options += ["--checkpointing_steps", 1, "--seed", 1]
    whole = start(patched, *options, "--output_dir", tmp_path / "whole", free=True)
    for at in (3, 4):  # an epoch has three steps
        again = tmp_path / f"again{at}"
        shutil.copytree(tmp_path / "whole" / f"checkpoint-{at}", again / f"checkpoint-{at}")
        found = start(patched, *options, "--resume_from_checkpoint", "latest", "--output_dir", again, free=True)
        assert losses(found) == pytest.approx(losses(whole)[at:], rel=1e-5)
        assert found["SEEN"] == whole["SEEN"][at:]


@pytest.mark.slow
@pytest.mark.parametrize("desk", one_desk("dreambooth_lora_flux"), indirect=True)
def test_two_processes_share_an_epoch_and_its_learning_rate(desk, patched, tmp_path):
    if not desk.is_ours:
        pytest.skip("diffusers' scripts do not say what they have seen")
    options = [*desk.options, "--cache", desk.cache, "--num_train_epochs", 1, "--output_dir", tmp_path / "out"]
    alone, shared = start(patched, *options), start(patched, *options, ranks=2)
    assert len(losses(alone)) == COUNT
    assert len(losses(shared)) == COUNT // 2
    assert sorted(shared["SEEN"]) == sorted(alone["SEEN"])
    assert len({*shared["SEEN"]}) == COUNT
    assert {*map(float, alone["RATE"] + shared["RATE"])} == {0.0}  # a linear schedule ends with the last step


@pytest.mark.slow
@pytest.mark.long
def test_class_images_count_as_prior_loss_weight_says(desk, patched, tmp_path):
    if desk.name.startswith("text") or not desk.is_ours:
        pytest.skip("a matter of DreamBooth")
    other = tmp_path / "classes"
    shutil.copytree(desk.cache, other)
    options = [*desk.options, "--cache", desk.cache, "--class_cache", other, "--max_train_steps", 12]
    found = losses(start(patched, *options, "--prior_loss_weight", 0, "--output_dir", tmp_path / "out"))
    assert sorted(loss > 0 for loss in found) == [False] * 6 + [True] * 6


def parse(script, monkeypatch, *options):
    """What the parse_args of a script does with options."""
    monkeypatch.setattr(sys, "argv", ["train.py", *map(str, options)])
    return runpy.run_path(str(script), run_name="train")["parse_args"]()


def test_options_that_do_nothing_with_a_cache_are_refused_by_name(desk, patched, monkeypatch, capsys):
    if not desk.is_ours:
        pytest.skip("ours have every option of theirs that is refused")
    refused = runpy.run_path(str(patched), run_name="train")["REFUSED"]
    assert len(refused) > 8
    assert parse(patched, monkeypatch, "--cache", "c").cache == "c"
    for name, reason in refused.items():
        value = [] if name in FLAGS else ["lanczos" if "mode" in name else "1"]
        with pytest.raises(SystemExit) as exit_:
            parse(patched, monkeypatch, "--cache", "c", f"--{name}", *value)
        assert (exit_.value.code, capsys.readouterr().err) == (2, f"Error: --{name}: {reason}\n")
