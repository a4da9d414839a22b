"""Which part of the package may import which: wings do not know each other, and nothing heavy comes early."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import latentprep

PACKAGE = Path(latentprep.__file__).parent
WINGS = ("latentprep.prepare", "latentprep.read", "latentprep.look")


def imported(path: Path) -> set[str]:
    """Names of all modules that a file imports, anywhere in it."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found.add(node.module)
    return found


def wing(name: str) -> dict[str, set[str]]:
    return {str(path.relative_to(PACKAGE)): imported(path) for path in (PACKAGE / name).rglob("*.py")}


@pytest.mark.parametrize("name", ["prepare", "read", "look"])
def test_wings_import_cache_and_never_each_other(name):
    others = tuple(other for other in WINGS if not other.endswith(name))
    for path, modules in wing(name).items():
        assert not [module for module in modules if module.startswith(others)], path


def test_cache_knows_none_of_the_wings():
    for path, modules in wing("cache").items():
        assert not [m for m in modules if m.startswith(("latentprep.prepare", "latentprep.read", "latentprep.look"))], (
            path
        )


def test_stages_of_prepare_do_not_call_each_other():
    """Only plan, worker, encode, messages and engines put stages together; these share records and small helpers."""
    allowed = {
        "source/captions.py": {"source.door", "source.kohya_metadata", "source.listing", "source.metadata"},
        "source/kohya_metadata.py": {"source.listing", "source.metadata"},
        "source/content.py": {"source.door", "source.partners"},  # an image's content is its mask's, too
        "source/folder.py": {"source.door", "images.pillow"},
        "source/listing.py": {"source.door", "images.pillow"},  # reads headers
        "source/metadata.py": {"source.door", "source.listing"},  # what list_images found
        "source/joined.py": {"source.door"},
        "source/sources.py": {"source.door", "source.folder", "source.tar"},  # the table
        "source/tar.py": {"source.door", "source.folder", "source.members", "images.pillow"},  # a folder of tars
        "images/alpha.py": {"images.pillow"},
        "images/color.py": {"images.cicp", "images.pillow"},
        "images/shrink.py": {"images.cicp"},
        "images/jpeg.py": {"images.pillow"},
        "images/decode.py": {
            "images.alpha", "images.cicp", "images.color", "images.jpeg", "images.load", "images.pillow", "images.png",
            "images.shrink",
        },
        "images/load.py": {
            "source.content", "source.door", "source.partners", "images.crops", "images.decode", "images.pillow",
            "images.shrink", "plan.buckets",  # where a control image goes is known as late as this
        },
        "source/partners.py": {"source.door", "source.listing", "source.sources", "images.pillow"},  # they are a source
        "source/controls.py": {  # columns of metadata name them
            "source.door", "source.listing", "source.metadata", "source.partners", "source.sources",
        },
        "source/masks.py": {"source.listing", "source.partners"},
        "images/png.py": {"images.pillow"},
        "models/doors.py": {"models.vae_encoder", "devices"},
        "models/vaes.py": {"models.files"},
        "models/vae_config.py": {"models.files", "models.vaes"},
        "models/tiles.py": {"models.vaes"},
        "models/vae_encoder.py": {"models.tiles", "models.vaes", "devices"},  # halves its batches
        "models/vae_decoder.py": {"models.files", "models.vae_config", "models.vae_folder", "models.vaes", "devices"},
        "models/clip_windows.py": {"models.windows"},
        "models/families.py": {"models.family"},
        "models/encode_prompt.py": {"models.family", "models.files"},
        "models/files.py": {"devices"},  # whose fault a full memory is not
        "models/heard.py": {"models.encode_prompt", "models.family", "models.load_text"},
        "models/token_counter.py": {"models.clip_windows", "models.heard", "models.load_tokenizer"},
        "models/text_encoder.py": {
            "models.encode_prompt", "models.family", "models.heard", "models.processor", "models.token_counter",
            "models.windows", "devices",
        },
        "models/open_encoder.py": {"models.doors", "devices"},
        "models/find.py": {"models.files"},
        "models/vae_folder.py": {  # opens itself
            "models.doors", "models.files", "models.tiles", "models.vae_config", "models.vae_encoder", "models.vaes",
        },
        "models/load_text.py": {"models.family", "models.files"},
        "models/chat_template.py": {"models.files"},
        "models/load_tokenizer.py": {"models.chat_template", "models.files", "models.load_text"},
        "models/processor.py": {"models.files", "models.load_text"},
        "models/text_folder.py": {  # opens itself
            "models.doors", "models.encode_prompt", "models.files", "models.families", "models.family",
            "models.load_text", "models.load_tokenizer", "models.processor", "models.refused", "models.split_text",
            "models.text_encoder", "models.token_counter", "models.text_places",
        },
        "models/checkpoint.py": {"models.files"},
        "models/single_file.py": {  # what a folder has in files, a checkpoint has in tensors
            "models.checkpoint", "models.files", "models.vae_config", "models.vae_folder", "models.vae_layouts",
        },
        "models/vae_layouts.py": {"models.files"},
        "models/text_file.py": {
            "models.checkpoint", "models.clip_tokenizer", "models.families", "models.family", "models.files",
            "models.load_text", "models.load_tokenizer", "models.single_file", "models.split_text",
            "models.text_folder", "models.text_places",
        },
        "models/fit_text.py": {"models.checkpoint", "models.load_text"},
        "models/text_places.py": {  # a part of a folder may be a file
            "models.checkpoint", "models.family", "models.files", "models.fit_text", "models.load_text",
            "models.load_tokenizer", "models.single_file",
        },
        "models/split_text.py": {
            "models.checkpoint", "models.family", "models.files", "models.fit_text", "models.load_text",
            "models.text_places",
        },
    }  # fmt: skip
    stages = ["plan/buckets.py"]
    parts = [path for folder in ("images", "models", "source") for path in (PACKAGE / "prepare" / folder).glob("*.py")]
    for path in [*(PACKAGE / "prepare" / name for name in stages), *parts]:
        name = path.relative_to(PACKAGE / "prepare").as_posix()
        known = {m for m in imported(path) if m.startswith("latentprep.prepare")}
        if name != "models/model_set.py":  # puts the models of a run together
            assert known <= {f"latentprep.prepare.{module}" for module in allowed.get(name, set())}, name


def loaded_after(code: str) -> set[str]:
    command = f"{code}\nimport sys; print(' '.join(sorted({{name.partition('.')[0] for name in sys.modules}})))"
    result = subprocess.run([sys.executable, "-c", command], capture_output=True, text=True, check=True)
    return set(result.stdout.splitlines()[-1].split())


def test_help_never_imports_torch():
    code = "import sys; sys.argv = ['latentprep', 'encode', '--help']; from latentprep.cli.commands import main"
    code += "\ntry: main()\nexcept SystemExit: pass"
    heavy = {"torch", "diffusers", "transformers", "numpy", "PIL", "safetensors", "fsspec", "huggingface_hub", "tqdm"}
    assert not loaded_after(code) & heavy


def test_reader_needs_neither_diffusers_nor_transformers_nor_typer():
    code = "from latentprep import LatentDataset, LatentLoader, LatentBatch, BucketBatchSampler"
    assert not loaded_after(code) & {"diffusers", "transformers", "typer", "rich", "huggingface_hub", "PIL"}


def test_nothing_is_pickled():
    for path in PACKAGE.rglob("*.py"):
        assert not imported(path) & {"pickle", "shelve", "marshal", "joblib", "dill"}, path
        assert "torch.load" not in path.read_text(encoding="utf-8"), path
