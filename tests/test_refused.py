"""refused.py: models that no row can say are refused in one line that says why, and docs/models.md lists them."""

import json
import re
from pathlib import Path

import diffusers
import pytest

from latentprep.prepare.models.families import find_family
from latentprep.prepare.models.refused import REFUSALS, refusal_of
from tests.conftest import SMALL

PAGE = (Path(__file__).parent.parent / "docs" / "models.md").read_text(encoding="utf-8")
# Neither a family nor refused by a row: older than what people train, or small variants; refused all the same.
OTHERS = """AltDiffusion BlipDiffusion Bria CogView3Plus Cycle DiT Diffusion FluxPriorRedux LDM
LatentConsistency Lumina NucleusMoE Onnx Ovis PaintByExample RFD4 Semantic StableDiffusion UniDiffuser Versatile
VisualCloze""".split()


def test_every_pipeline_of_diffusers_is_a_family_or_refused_or_known_to_be_neither():
    names = [name for name in dir(diffusers) if name.endswith("Pipeline") and "Modular" not in name]
    for name in names:
        assert find_family(name) is None or refusal_of(name) is None, name
        known = find_family(name) or refusal_of(name) or any(name.startswith(other) for other in OTHERS)
        assert known, f"{name}: a new row of FAMILIES, or of REFUSALS?"


@pytest.mark.parametrize(
    ("name", "why"),
    [
        ("WanPipeline", "makes videos, and a cache holds images. Its latents alone: --no-cond."),
        ("QwenImageLayeredPipeline", "encodes its prompts together with images"),
        ("GlmImagePipeline", "takes tokens that a language model of its own makes"),
        ("OmniGenPipeline", "has no encode_prompt"),
        ("Kandinsky5T2IPipeline", "packs the prompts of a batch into one row"),
        ("IFPipeline", "works on pixels: it has no latents to encode once. Give another model."),
        ("PRXPixelPipeline", "works on pixels"),
        ("StableAudioPipeline", "makes sound. Give another model."),
    ],
)
def test_the_line_says_why(name, why, model, images, tmp_path, run):
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "model_index.json").write_text(json.dumps({"_class_name": name}))
    (folder / "vae").symlink_to(model / "vae")
    result = run("encode", images, *SMALL, "--model", folder, "--out", tmp_path / "c")
    assert result.code == 1
    (line,) = [line for line in result.err.splitlines() if line.startswith("error:")]
    assert f": {name} {why}" in line
    result = run("encode", images, *SMALL, "--model", folder, "--out", tmp_path / "c", "--no-cond")
    assert result.code == (0 if refusal_of(name).has_latents else 1)


def test_the_page_has_the_list():
    section = PAGE.partition("## Models that are refused")[2].partition("\n#")[0]
    assert re.sub(r"\s+", " ", section).count("| ") >= len(REFUSALS)
    for row in REFUSALS:
        assert row.why in section, row.why
