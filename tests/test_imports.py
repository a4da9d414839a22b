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
        # works on what list_folder found, and asks the metadata files in it
        "captions.py": {"latentprep.prepare.source", "latentprep.prepare.metadata"},
        # reads orientation and errors in the same way as source; the others are its own parts
        "load.py": {f"latentprep.prepare.{name}" for name in ("source", "alpha", "color", "crops", "masks")},
        "masks.py": {"latentprep.prepare.source"},
        "vae.py": {"latentprep.prepare.vae_folder", "latentprep.prepare.devices"},  # halves its batches
        "models.py": {"latentprep.prepare.model_files"},
        "vae_folder.py": {"latentprep.prepare.model_files"},
        "text_folder.py": {"latentprep.prepare.model_files", "latentprep.prepare.families"},
        # what a folder has in files, a checkpoint has in tensors
        "single_file.py": {
            f"latentprep.prepare.{name}"
            for name in ("checkpoint", "clip_tokenizer", "families", "model_files", "text_folder", "vae_folder")
        },
        "text.py": {"latentprep.prepare.families", "latentprep.prepare.windows"},
    }
    stages = "source captions metadata buckets load alpha color crops masks vae windows text"
    models = "models model_files families vae_folder text_folder checkpoint clip_tokenizer single_file"
    for name in (f"{stage}.py" for stage in f"{stages} {models}".split()):
        modules = {m for m in imported(PACKAGE / "prepare" / name) if m.startswith("latentprep.prepare")}
        assert modules <= allowed.get(name, set()), name


def loaded_after(code: str) -> set[str]:
    command = f"{code}\nimport sys; print(' '.join(sorted({{name.partition('.')[0] for name in sys.modules}})))"
    result = subprocess.run([sys.executable, "-c", command], capture_output=True, text=True, check=True)
    return set(result.stdout.splitlines()[-1].split())


def test_help_never_imports_torch():
    code = "import sys; sys.argv = ['latentprep', 'encode', '--help']; from latentprep.cli import main"
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
