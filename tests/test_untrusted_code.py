"""prepare/models/: no code that lies in a model's folder ever runs, and none is downloaded."""

import json
import shutil
import sys
from types import SimpleNamespace

import diffusers
import huggingface_hub
import pytest
import transformers
from diffusers import AutoencoderKL
from huggingface_hub.utils import filter_repo_objects
from safetensors.torch import save_file

from latentprep.prepare.models.find import find_model
from tests.test_single_file import ldm_vae, make_sd1

SIZE = ("--resolution", 64, "--bucket-step", 32, "--min-side", 32)
PARTS = (".", "text_encoder", "tokenizer", "vae", "unet", "scheduler")
# What model_index.json says, and whether the model is refused for it.
CLAIMS = {
    "text encoder": ({"text_encoder": ["evil", "Evil"]}, True),
    "tokenizer": ({"tokenizer": ["evil", "Evil"]}, True),
    "pipeline": ({"_class_name": ["evil", "Evil"]}, True),
    "unet": ({"unet": ["evil", "Evil"]}, False),
    "scheduler named as its folder": ({"scheduler": ["scheduler", "Evil"]}, False),
    "vae": ({"vae": ["evil", "Evil"]}, False),
    "a custom pipeline": ({"custom_pipeline": "evil", "trust_remote_code": True}, False),
    "nothing": ({}, False),
}


def update(path, **changes):
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


@pytest.fixture
def plant(model, tmp_path, monkeypatch):
    """Makes a model's folder with a .py wherever a library may look for one, and files that name it; -> folder, mark.

    Whichever of the .py runs, in whatever way, makes the mark. All can be imported, as from a current directory.
    """

    for library in (diffusers.utils.dynamic_modules_utils, transformers.dynamic_module_utils):
        monkeypatch.setattr(library, "HF_MODULES_CACHE", str(tmp_path / "modules"))
    for module in list(sys.modules):  # what an earlier test has imported would not run again
        if module.split(".")[0] in ("diffusers_modules", "transformers_modules", "evil", *PARTS):
            monkeypatch.delitem(sys.modules, module)

    def make(claim):
        folder, mark = tmp_path / "planted", tmp_path / "ran"
        code = f"open({str(mark)!r}, 'w').close()\nclass Evil:\n    def __init__(self, *a, **k): pass\n"
        shutil.copytree(model, folder)
        update(folder / "model_index.json", **claim)
        modules = {name for value in claim.values() if isinstance(value, list) for name in value if name != "Evil"}
        modules |= {"pipeline", "modeling_evil", "eviluto", "evil"}
        auto = {"AutoConfig": "eviluto.Evil", "AutoModel": "eviluto.Evil", "AutoTokenizer": ["eviluto.Evil", None]}
        names = {"auto_map": auto, "trust_remote_code": True, "custom_pipeline": "evil"}
        for part in PARTS:
            (folder / part).mkdir(exist_ok=True)
            for name in modules:
                (folder / part / f"{name}.py").write_text(code)
        for part in ("text_encoder", "vae"):
            update(folder / part / "config.json", **names)
        shutil.copy(folder / "text_encoder" / "config.json", folder / "tokenizer" / "config.json")
        update(folder / "tokenizer" / "tokenizer_config.json", **names, tokenizer_class="Evil")
        monkeypatch.chdir(folder)
        monkeypatch.syspath_prepend(folder)
        return folder, mark

    return make


@pytest.mark.parametrize("name", CLAIMS)
def test_no_code_of_a_model_folder_runs(run, images, plant, tmp_path, name):
    claim, is_refused = CLAIMS[name]
    folder, mark = plant(claim)
    cache = tmp_path / "cache"
    result = run("encode", images, "--out", cache, "--model", folder, *SIZE)
    assert result.code == is_refused, result.err
    if not is_refused:
        assert run("verify", cache, "--source", images, "--re-encode", 2).code == 0
    other = run("encode", images, "--out", tmp_path / "other", "--model", "tiny", "--vae", folder, *SIZE)
    assert other.code == 0, other.err
    assert not mark.exists()


@pytest.mark.parametrize("name", CLAIMS)
def test_no_code_of_a_config_folder_runs(run, images, model, plant, tmp_path, name):
    folder, mark = plant(CLAIMS[name][0])
    _, texts = make_sd1(tmp_path, model)
    file = tmp_path / "model.safetensors"
    save_file(ldm_vae(AutoencoderKL.from_pretrained(model / "vae"), "first_stage_model.") | texts, file)
    run("encode", images, "--out", tmp_path / "cache", "--model", file, "--config", folder, *SIZE)
    assert not mark.exists()


def trusting(folder):
    """The libraries' own loaders, told to run what they find."""
    return (
        lambda: diffusers.DiffusionPipeline.from_pretrained(folder, trust_remote_code=True),
        lambda: transformers.AutoModel.from_pretrained(folder / "text_encoder", trust_remote_code=True),
        lambda: transformers.AutoTokenizer.from_pretrained(folder / "tokenizer", trust_remote_code=True),
    )


@pytest.mark.parametrize("name", [name for name in CLAIMS if name != "a custom pipeline"])
def test_loaders_that_trust_a_folder_run_its_code(plant, name):
    """Else the folders above would show nothing. diffusers 0.33 runs it without being told to."""
    folder, mark = plant(CLAIMS[name][0])
    calls = trusting(folder)
    for call in calls[:1] if name != "nothing" else calls[1:]:
        mark.unlink(missing_ok=True)
        with pytest.raises(AttributeError):  # of Evil, which is no model
            call()
        assert mark.exists()


@pytest.mark.parametrize("with_text", [True, False])
def test_no_code_and_no_pickle_is_downloaded(model, monkeypatch, with_text):
    there = [str(path.relative_to(model)) for path in sorted(model.rglob("*")) if path.is_file()]
    places = ("", "vae/", "text_encoder/", "text_encoder_2/", "tokenizer/", "tokenizer_2/", "unet/", "scheduler/")
    names = (
        "evil.py",
        "pipeline.py",
        "model.py",
        "tokenizer.py",
        "config.json.py",
        "setup.so",
        "a.pkl",
        "a.bin",
        "a.pt",
    )
    hostile = [place + name for place in places for name in names]
    asked = []

    def snapshot_download(name, **options):
        asked.append(SimpleNamespace(**options))
        return str(model if len(asked) > 1 else model / "vae" / "none")  # first: nothing of it is here

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    assert find_model("some/model", with_text=with_text) == model
    assert len(asked) == 2
    for options in asked:
        taken = list(filter_repo_objects([*there, *hostile], allow_patterns=options.allow_patterns))
        assert taken == [name for name in there if with_text or not name.startswith(("text_encoder", "tokenizer"))]
