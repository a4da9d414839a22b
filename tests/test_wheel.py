"""The wheel has all that it needs: built, installed in a fresh virtual environment, and its demo run from there."""

import json
import subprocess
import sys
import sysconfig
import venv
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


@pytest.mark.slow
def test_demo_of_the_installed_wheel(tmp_path):
    build = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(tmp_path / "dist"), str(ROOT)]
    subprocess.run(build, check=True, capture_output=True)
    (wheel,) = (tmp_path / "dist").glob("*.whl")
    names = zipfile.ZipFile(wheel).namelist()
    for name in (
        "templates/subject.txt", "tiny/model_index.json", "tiny/vae/config.json", "py.typed", "clip/merges.txt",
        "look/page/report.html", "look/page/report.css", "look/page/report.js",
        "clip/LICENSE", "prepare/models/architectures/sdxl/tokenizer_2/tokenizer_config.json",
    ):  # fmt: skip
        assert f"latentprep/{name}" in names
    assert not [name for name in names if name.startswith(("tests", "benchmarks", "examples"))]

    venv.create(tmp_path / "venv", with_pip=True)
    python = tmp_path / "venv" / "bin" / "python"
    install = [python, "-m", "pip", "install", "--disable-pip-version-check", "--no-deps", "--no-index", wheel]
    subprocess.run(install, check=True, capture_output=True)
    # latentprep itself comes from the wheel alone; its dependencies are those that run this test
    (site,) = (tmp_path / "venv" / "lib").glob("python*/site-packages")
    (site / "dependencies.pth").write_text(sysconfig.get_paths()["purelib"] + "\n")
    where = [python, "-c", "import latentprep; print(latentprep.__file__)"]
    assert str(tmp_path) in subprocess.run(where, check=True, capture_output=True, text=True, cwd=tmp_path).stdout

    command = tmp_path / "venv" / "bin" / "latentprep"
    demo = subprocess.run([command, "demo"], check=True, capture_output=True, text=True, cwd=tmp_path)
    assert demo.stdout.endswith("next     latentprep inspect demo/cache\n")
    inspect = [command, "inspect", "demo/cache", "--json"]
    found = subprocess.run(inspect, check=True, capture_output=True, text=True, cwd=tmp_path)
    assert json.loads(found.stdout)["images"] == 24
    templates = subprocess.run([command, "templates"], check=True, capture_output=True, text=True, cwd=tmp_path)
    assert "subject_filewords" in templates.stdout
