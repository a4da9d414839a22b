"""Text encoders from files of their own, as ComfyUI has them: the same numbers as from the model's folder."""

import json
import pickle
import shutil
from pathlib import Path

import pytest
import torch
from diffusers import AutoencoderKL
from safetensors.torch import load_file, save_file

import latentprep
from latentprep.cache.manifest import open_manifest
from latentprep.cache.storage import Storage
from latentprep.errors import UserError
from latentprep.prepare.models.fit_text import BESIDE
from latentprep.prepare.models.split_text import QUANTIZED
from latentprep.prepare.models.text_folder import open_text
from tests.miniatures import make_miniature
from tests.test_single_file import configs_of, ldm_vae, make_sd1, opened, refusal

pytestmark = pytest.mark.slow

CPU = torch.device("cpu")
PROMPTS = ["a red house, snow", ""]
STEMS = ("Flux", "ZImage", "QwenImage", "HiDreamImage", "StableDiffusion3")
# what ComfyUI's files have beside the weights
BALLAST = {
    "text_model.embeddings.position_ids": torch.arange(77)[None], "logit_scale": torch.tensor(4.6),
    "spiece_model": torch.zeros(9, dtype=torch.uint8), "decoder.block.0.layer.0.k.weight": torch.zeros(2, 2),
}  # fmt: skip
SIZE = ("--resolution", 64, "--bucket-step", 32, "--min-side", 32)


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """Stem of a family -> the folder of its miniature, and a file for each text encoder; each is made once."""
    known = {}

    def make(stem):
        if stem not in known:
            folder = tmp_path_factory.mktemp(stem)
            make_miniature(stem, folder / "work").save_pretrained(folder / "model")
            files = {}
            for part in sorted(path.name for path in (folder / "model").glob("text_encoder*")):
                files[part] = folder / f"{part}.safetensors"
                save_file(tensors_in(folder / "model" / part), files[part])
            known[stem] = folder / "model", files
        return known[stem]

    return make


def tensors_in(folder):
    return {name: tensor for file in sorted(folder.glob("*.safetensors")) for name, tensor in load_file(file).items()}


def without_weights(folder, path, but=()):
    """A copy of a model's folder without the weights of text encoders."""

    def ignored(where, names):
        of_text = Path(where).name.startswith("text_encoder") and Path(where).name not in but
        return [name for name in names if of_text and (name.endswith(("safetensors", "index.json")))]

    shutil.copytree(folder, path, ignore=ignored)
    return path


def conds(text, prompts=PROMPTS):
    return text.open(CPU, torch.float32).encode(prompts)


def same(one, other):
    assert one.keys() == other.keys()
    for name, value in one.items():
        for row in range(len(PROMPTS)):
            assert torch.equal(value[row], other[name][row]), name


def text_of(model, *files, said=None, **options):
    return opened(model, said=said, text_encoders=tuple(map(str, files)), **options).text


def refused(model, *files, **options):
    return refusal(model, text_encoders=tuple(map(str, files)), **options)


@pytest.mark.parametrize("stem", STEMS)
def test_files_give_what_the_folder_gives(stem, made, tmp_path):
    folder, files = made(stem)
    bare = without_weights(folder, tmp_path / "bare")
    said = []
    text = text_of(bare, *reversed(files.values()), said=said)
    whole = open_text(folder)
    same(conds(text), conds(whole))
    assert text.given == tuple(files)
    assert said == [f"text     {part} from {file}" for part, file in files.items()]
    assert (text.widths, text.window, text.num_layers) == (whole.widths, whole.window, whole.num_layers)
    assert text.digest != whole.digest  # of a folder files are hashed, of a file tensors
    with pytest.raises(UserError, match=r"(Weights in a file of their own are|Give them with) --text-encoder"):
        open_text(bare)


def test_one_file_is_enough_where_the_folder_has_the_rest(made, tmp_path):
    folder, files = made("Flux")
    bare = without_weights(folder, tmp_path / "bare", but=("text_encoder",))
    text = text_of(bare, files["text_encoder_2"])
    assert text.given == ("text_encoder_2",)
    same(conds(text), conds(open_text(folder)))


def test_weights_of_another_training_take_the_place_of_the_folders(made, tmp_path):
    folder, files = made("ZImage")
    tensors = {name: tensor * 1.5 for name, tensor in load_file(files["text_encoder"]).items()}
    save_file(tensors, tmp_path / "tuned.safetensors")
    found = conds(text_of(folder, tmp_path / "tuned.safetensors"))
    other = without_weights(folder, tmp_path / "other")
    save_file(tensors, other / "text_encoder" / "model.safetensors", {"format": "pt"})
    same(found, conds(open_text(other)))


@pytest.mark.parametrize("beginning", ["model.", "language_model.model.", "model.language_model.", ""])
def test_names_may_begin_as_any_version_has_them(beginning, made, tmp_path):
    folder, files = made("QwenImage")
    tensors = load_file(files["text_encoder"])
    names = {name: name.replace("model.", beginning, 1) if name.startswith("model.") else name for name in tensors}
    assert any(name.startswith(f"{beginning}layers.0") for name in names.values())
    save_file({names[name]: tensor for name, tensor in tensors.items()}, tmp_path / "x.safetensors")
    text, whole = text_of(folder, tmp_path / "x.safetensors"), text_of(folder, files["text_encoder"])
    assert text.digest == whole.digest
    same(conds(text), conds(whole))


def test_what_lies_beside_the_weights_is_neither_hashed_nor_loaded(made, tmp_path):
    folder, files = made("Flux")
    plain = text_of(folder, *files.values())
    assert all(BESIDE.search(name) for name in BALLAST)
    more = []
    for part, file in files.items():
        tensors = load_file(file)
        if part == "text_encoder_2":  # some files have both names of T5's table of tokens, some the other one alone
            tensors["encoder.embed_tokens.weight"] = tensors.pop("shared.weight")
        else:  # CLIP's begin with text_model. up to transformers 4, and in all files of ComfyUI
            tensors = {f"text_model.{name.removeprefix('text_model.')}": tensor for name, tensor in tensors.items()}
        more.append(tmp_path / file.name)
        save_file(tensors | BALLAST, more[-1])
    text = text_of(folder, *more)
    assert text.digest == plain.digest
    same(conds(text), conds(plain))


def test_a_number_that_is_used_changes_the_digest(made, tmp_path):
    folder, files = made("ZImage")
    plain = text_of(folder, files["text_encoder"])
    tensors = load_file(files["text_encoder"])
    shutil.copy(files["text_encoder"], tmp_path / "same.safetensors")
    assert text_of(folder, tmp_path / "same.safetensors").digest == plain.digest
    for name in tensors:
        if name.endswith(("embed_tokens.weight", "layers.2.mlp.up_proj.weight", "layers.0.self_attn.q_norm.weight")):
            changed = {**tensors, name: tensors[name] + 1}
            save_file(changed, tmp_path / "changed.safetensors")
            assert text_of(folder, tmp_path / "changed.safetensors").digest != plain.digest


def test_a_missing_projection_is_the_identity_for_stable_diffusion_3_alone(made, tmp_path):
    """As diffusers reads clip_l; its folder has the identity too."""
    folder, files = made("StableDiffusion3")
    tensors = load_file(files["text_encoder"])
    width = len(tensors["text_projection.weight"])
    whole = without_weights(folder, tmp_path / "whole", but=("text_encoder_2", "text_encoder_3"))
    eye = {**tensors, "text_projection.weight": torch.eye(width)}
    save_file(eye, whole / "text_encoder" / "model.safetensors", {"format": "pt"})
    del tensors["text_projection.weight"]
    save_file(tensors, tmp_path / "clip_l.safetensors")
    same(conds(text_of(folder, tmp_path / "clip_l.safetensors")), conds(open_text(whole)))

    folder, files = made("HiDreamImage")
    tensors = load_file(files["text_encoder"])
    del tensors["text_projection.weight"]
    save_file(tensors, tmp_path / "clip_l.safetensors")
    assert "text_encoder (1 missing, such as text_projection.weight)" in refused(
        folder, tmp_path / "clip_l.safetensors"
    )


def give_folder(folder, part, path):
    """A text encoder as a folder of transformers, with its tokenizer."""
    shutil.copytree(folder / part.replace("text_encoder", "tokenizer"), path)
    for file in (folder / part).iterdir():
        shutil.copy(file, path)
    return path


@pytest.mark.parametrize(
    ("stem", "part", "is_named"),
    [("StableDiffusion3", "text_encoder_3", True), ("StableDiffusion3", "text_encoder_3", False),
     ("HiDreamImage", "text_encoder_4", True), ("HiDreamImage", "text_encoder_4", False)],
)  # fmt: skip
def test_an_encoder_that_a_model_lacks_comes_from_its_own_folder(stem, part, is_named, made, tmp_path):
    """With config and tokenizer; whether model_index.json names it or not."""
    folder, files = made(stem)
    bare = tmp_path / "bare"
    tokenizer = part.replace("text_encoder", "tokenizer")
    shutil.copytree(folder, bare, ignore=shutil.ignore_patterns(part, tokenizer))
    if not is_named:
        index = json.loads((bare / "model_index.json").read_text())
        (bare / "model_index.json").write_text(json.dumps({**index, part: [None, None], tokenizer: [None, None]}))
    own = give_folder(folder, part, tmp_path / "own")
    (own / "notes.md").write_text("of no model")
    text, whole = text_of(bare, own), open_text(folder)
    assert text.left_out == ()
    assert text.digest == whole.digest
    same(conds(text), conds(whole))
    assert f"{bare / part} has no config.json" in refused(bare, files[part])


def test_a_folder_may_take_the_place_of_the_models_own(made, tmp_path):
    folder, _ = made("Flux")
    bare = without_weights(folder, tmp_path / "bare")
    text = text_of(bare, folder / "text_encoder", folder / "text_encoder_2")
    assert text.digest == open_text(folder).digest
    same(conds(text), conds(open_text(folder)))


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2, torch.bfloat16])
def test_eight_bit_floats_are_cast_and_said(dtype, made, tmp_path):
    folder, files = made("Flux")
    tensors = {name: tensor.to(dtype) for name, tensor in load_file(files["text_encoder_2"]).items()}
    save_file(tensors, tmp_path / "t5.safetensors")
    said = []
    text = text_of(folder, tmp_path / "t5.safetensors", said=said)
    note = f", whose 8-bit floats ({str(dtype).removeprefix('torch.')}) are cast" if dtype.itemsize == 1 else ""
    assert said == [f"text     text_encoder_2 from {tmp_path / 't5.safetensors'}{note}"]
    other = without_weights(folder, tmp_path / "other", but=("text_encoder",))
    floats = {name: tensor.float() for name, tensor in tensors.items()}
    save_file(floats, other / "text_encoder_2" / "model.safetensors", {"format": "pt"})
    same(conds(text), conds(open_text(other)))
    half = text.load_pipeline(torch.float16).text_encoder_2
    assert {tensor.dtype for tensor in half.parameters()} <= {torch.float16, torch.float32}
    assert half.encoder.block[0].layer[1].DenseReluDense.wo.weight.dtype == torch.float32  # overflows in float16


@pytest.mark.parametrize(
    "name",
    ["scaled_fp8", "encoder.block.0.layer.0.SelfAttention.k.scale_weight", "x.comfy_quant", "x.weight_scale",
     "x.weight_scale_inv", "x.weight.absmax", "x.weight.quant_state.bitsandbytes__nf4", "x.qweight", "x.SCB"],
)  # fmt: skip
def test_quantized_files_are_refused(name, made, tmp_path):
    folder, files = made("Flux")
    assert QUANTIZED.search(name)
    save_file({**load_file(files["text_encoder_2"]), name: torch.zeros(2)}, tmp_path / "x.safetensors")
    assert refused(folder, tmp_path / "x.safetensors") == (
        f"--text-encoder {tmp_path / 'x.safetensors'}: its weights are quantized ({name} is F32), which is not "
        "supported. Give the file in bfloat16, float16 or float32, or in plain 8-bit floats."
    )


def test_no_name_of_an_encoder_is_taken_for_quantized(made):
    for stem in STEMS:
        for file in made(stem)[1].values():
            assert not [name for name in load_file(file) if QUANTIZED.search(name)]


def change(tensors, name, value):
    return {**tensors, name: value}


DAMAGES = {
    "of another shape": (
        lambda t: change(t, "shared.weight", torch.zeros(7, 80)),
        "text_encoder_2 (1 of another shape: shared.weight is [7, 80], expected [400, 80])",
    ),
    "without a weight": (
        lambda t: {name: tensor for name, tensor in t.items() if "final_layer_norm" not in name},
        "text_encoder_2 (1 missing, such as encoder.final_layer_norm.weight)",
    ),
    "with a layer too many": (
        lambda t: change(t, "encoder.block.2.layer.0.layer_norm.weight", torch.zeros(80)),
        "text_encoder_2 (1 too many, such as encoder.block.2.layer.0.layer_norm.weight)",
    ),
    "of whole numbers": (
        lambda t: change(t, "shared.weight", t["shared.weight"].int()),
        "its weights are quantized (shared.weight is I32)",
    ),
    "empty": (lambda t: {}, "seems to be no model known here (no tensors), and fits no text encoder of"),
    "of a LoRA": (lambda t: {"lora_te1_x.lora_down.weight": torch.zeros(2)}, "seems to be a LoRA, and fits no text"),
    "with names for a terminal": (lambda t: {"\x1b[2J\n": torch.zeros(2)}, "1 too many, such as \\x1b[2J\\n"),
}


@pytest.mark.parametrize("name", DAMAGES)
def test_a_file_that_fits_no_encoder_is_refused(name, made, tmp_path):
    folder, files = made("Flux")
    damage, message = DAMAGES[name]
    save_file(damage(load_file(files["text_encoder_2"])), tmp_path / "x.safetensors")
    found = refused(folder, tmp_path / "x.safetensors")
    assert found.startswith(f"--text-encoder {tmp_path / 'x.safetensors'}: ")
    assert message in found
    assert found.isprintable()
    assert len(found) < 900


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_numbers_that_are_none_are_never_loaded(value, made, tmp_path):
    folder, files = made("Flux")
    tensors = load_file(files["text_encoder_2"])
    tensors["encoder.final_layer_norm.weight"][3] = value
    save_file(tensors, tmp_path / "x.safetensors")
    text = text_of(folder, tmp_path / "x.safetensors")
    with pytest.raises(UserError, match=r"encoder\.final_layer_norm\.weight holds NaN or infinite numbers"):
        text.load_pipeline(torch.float32)


def test_errors_say_which_file_is_wrong(made, tmp_path):
    folder, files = made("Flux")
    t5, clip = files["text_encoder_2"], files["text_encoder"]
    shutil.copy(t5, tmp_path / "t5.safetensors")
    assert refused(folder, t5, tmp_path / "t5.safetensors") == (
        f"--text-encoder {tmp_path / 't5.safetensors'}: is for text_encoder_2 of {folder}, and so is {t5}. "
        "Give one of them."
    )
    assert refused(folder, tmp_path / "none.safetensors") == (
        f"--text-encoder {tmp_path / 'none.safetensors'}: no such file or folder. Give a .safetensors file of weights, "
        "or a folder of transformers with config.json, weights and tokenizer."
    )
    (tmp_path / "x.bin").write_bytes(b"x")
    assert "a pickle, and loading one can run any code" in refused(folder, tmp_path / "x.bin")
    (tmp_path / "x.gguf").write_bytes(b"x")
    assert "a file of another kind, expected a .safetensors file of weights" in refused(folder, tmp_path / "x.gguf")
    (tmp_path / "x.safetensors").write_bytes(t5.read_bytes()[:-1])
    assert "x.safetensors: cannot be read as safetensors (" in refused(folder, tmp_path / "x.safetensors")
    assert "has no config.json, expected a folder of transformers" in refused(folder, tmp_path)
    assert "fits no text encoder of" in refused(made("ZImage")[0], clip)


def test_weights_that_fit_two_encoders_are_refused(made, tmp_path):
    folder, files = made("StableDiffusion3")
    twins = without_weights(folder, tmp_path / "twins")
    shutil.copy(twins / "text_encoder" / "config.json", twins / "text_encoder_2")
    assert refused(twins, files["text_encoder"]) == (
        f"--text-encoder {files['text_encoder']}: fits text_encoder and text_encoder_2 of {twins}, expected one of "
        f"them. Save it as {twins / 'text_encoder' / 'model.safetensors'}, or where it belongs."
    )


def test_a_folder_of_another_kind_is_refused(made, tmp_path):
    folder, _ = made("StableDiffusion3")
    bare = tmp_path / "bare"
    shutil.copytree(folder, bare, ignore=shutil.ignore_patterns("text_encoder_3", "tokenizer_3"))
    llama = give_folder(made("HiDreamImage")[0], "text_encoder_4", tmp_path / "llama")
    assert "text_encoder_3 (is no T5EncoderModel)" in refused(bare, llama)
    index = json.loads((bare / "model_index.json").read_text())
    without = {"text_encoder_3": [None, None], "tokenizer_3": [None, None]}
    (bare / "model_index.json").write_text(json.dumps({**index, **without}))
    own = give_folder(folder, "text_encoder_3", tmp_path / "own")
    config = json.loads((own / "tokenizer_config.json").read_text())
    (own / "tokenizer_config.json").write_text(json.dumps({**config, "tokenizer_class": "Evil"}))
    assert "says that its tokenizer is Evil, expected T5Tokenizer or" in refused(bare, own)
    (own / "config.json").write_text(json.dumps({"model_type": "t5", "d_model": 10**9, "num_layers": 2}))
    assert "d_model is 1000000000, expected 1 to" in refused(bare, own)


def test_no_cond_needs_no_text_encoder(made, tmp_path):
    folder, _ = made("Flux")
    assert text_of(folder, tmp_path / "none.safetensors", cond=False) is None


def test_descriptions_go_to_other_processes(made):
    folder, files = made("Flux")
    text = text_of(folder, *files.values())
    data = pickle.dumps(text)
    assert len(data) < 20_000
    assert pickle.loads(data) == text


def test_a_cache_remembers_the_files(made, images, run, tmp_path, monkeypatch):
    """Options, files of options and --again; verify finds the encoders again, and so does --text-encoder."""
    folder, files = made("Flux")
    work = tmp_path / "work"
    work.mkdir()
    for part, file in files.items():
        shutil.copy(file, work / f"{part}.safetensors")
    bare = without_weights(folder, work / "bare")
    (work / "o.toml").write_text(
        'model = "bare"\ntext-encoder = ["text_encoder.safetensors", "text_encoder_2.safetensors"]\n'
    )
    options = ("--out", tmp_path / "c", *SIZE)
    assert run("encode", images, "--options", work / "o.toml", *options).code == 0
    made_with = open_manifest(Storage(str(tmp_path / "c"))).made_with
    wanted = [str(work / f"{part}.safetensors") for part in files]
    assert list(made_with.text_encoders) == made_with.again["text_encoder"] == wanted
    shown = "".join(run("inspect", tmp_path / "c").out.split()).partition("geometry")[0]
    assert shown.count("textencoder/") == 2
    given = [word for name in wanted for word in ("--text-encoder", name)]
    for more in (("--again", tmp_path / "c"), (images, "--model", bare, *given, *options)):
        result = run("encode", *more)
        assert (result.code, "nothing to do" in result.out) == (0, True), result.err
    monkeypatch.chdir(work)
    done = latentprep.encode(
        images, tmp_path / "c", model="bare", text_encoder=[Path("text_encoder.safetensors"), wanted[1]],
        resolution=64, bucket_step=32, min_side=32, progress=False,
    )  # fmt: skip
    assert (done.ok, done.num_encoded, done.num_retexted) == (True, 0, 0)
    check = ("verify", tmp_path / "c", "--source", images, "--re-encode", 1)
    assert run(*check).code == 0
    moved = tmp_path / "moved.safetensors"
    (work / "text_encoder_2.safetensors").rename(moved)
    assert "text_encoder_2.safetensors: no such file or folder" in run(*check).err
    assert run(*check, "--text-encoder", wanted[0], "--text-encoder", moved).code == 0


# A checkpoint of a family: what its denoiser is known by, the prefix of its VAE, and that of each text encoder.
CHECKPOINTS = {
    "StableDiffusion3": (
        "model.diffusion_model.joint_blocks.0.x_block.mlp.fc1.weight", "first_stage_model.",
        {"text_encoder": "clip_l", "text_encoder_2": "clip_g", "text_encoder_3": "t5xxl"},
    ),
    "Flux": (
        "model.diffusion_model.double_blocks.0.img_attn.qkv.weight", "vae.",
        {"text_encoder": "clip_l", "text_encoder_2": "t5xxl"},
    ),
}  # fmt: skip


def make_checkpoint(stem, folder, files, path, but=()):
    denoiser, vae, names = CHECKPOINTS[stem]
    tensors = ldm_vae(AutoencoderKL.from_pretrained(folder / "vae"), vae)
    tensors[denoiser] = torch.zeros(8, 8, dtype=torch.uint8)  # never read, and its number type is no matter
    for part, name in names.items():
        if part not in but:
            prefix = f"text_encoders.{name}.transformer."
            tensors |= {f"{prefix}{key}": tensor for key, tensor in load_file(files[part]).items()}
            tensors[f"text_encoders.{name}.logit_scale"] = torch.tensor(4.6)
    save_file(tensors, path)
    return path


@pytest.fixture
def checkpoint(made, tmp_path):
    """Stem -> the folder of a miniature, a folder of its configs alone, and a checkpoint."""

    def make(stem, **options):
        folder, files = made(stem)
        configs = configs_of(folder, tmp_path / "configs")
        return folder, configs, make_checkpoint(stem, folder, files, tmp_path / "model.safetensors", **options)

    return make


@pytest.mark.parametrize("stem", CHECKPOINTS)
def test_a_checkpoint_gives_what_the_folder_gives(stem, checkpoint):
    folder, configs, file = checkpoint(stem)
    said = []
    models, whole = opened(file, config=configs, said=said), opened(folder)
    names = CHECKPOINTS[stem][2]
    assert said == [f"text     {part} from {file} (text_encoders.{name}.transformer.*)" for part, name in names.items()]
    same(conds(models.text), conds(whole.text))
    assert models.patch == whole.patch == 2
    assert models.vae.normalization == whole.vae.normalization
    pixels = torch.randint(0, 256, (1, 32, 48, 3), dtype=torch.uint8).numpy()
    one, other = (found.vae.open(CPU, torch.float32).encode(pixels) for found in (models, whole))
    assert torch.equal(one.mean, other.mean)
    assert torch.equal(one.std, other.std)


@pytest.mark.parametrize("stem", CHECKPOINTS)
def test_a_checkpoint_says_what_it_lacks(stem, checkpoint, made):
    folder, configs, file = checkpoint(stem)
    kind = {"Flux": "a FLUX checkpoint", "StableDiffusion3": "a Stable Diffusion 3 checkpoint"}[stem]
    assert refusal(file) == (
        f"--model {file}: seems to be {kind}, whose tensors do not tell its config and scaling_factor. Give a "
        "diffusers folder that has them with --config, or give it as --vae of a --model that has them."
    )
    assert refusal(file, vae=folder / "vae") == (
        f"--model {file}: seems to be {kind}, and the configs and tokenizers of its text encoders are not built in. "
        "Give its diffusers folder, which need not have weights, as --config, or --no-cond."
    )
    assert "fits no text encoder of" in refusal(file, config=made("ZImage")[0])
    again = made(stem)[1]["text_encoder"]
    assert f"{again}: is for text_encoder of {configs}, and so is {file}" in refused(file, again, config=configs)


def test_the_t5_of_a_checkpoint_without_one_is_given_or_left_out(checkpoint, made):
    folder, configs, file = checkpoint("StableDiffusion3", but=("text_encoder_3",))
    t5 = made("StableDiffusion3")[1]["text_encoder_3"]
    assert refusal(file, config=configs) == (
        f"--config {configs / 'text_encoder_3'}: has no weights. Give them with --text-encoder, or do without: remove "
        "that folder."
    )
    same(conds(text_of(file, t5, config=configs)), conds(open_text(folder)))
    shutil.rmtree(configs / "text_encoder_3")
    said = []
    text = text_of(file, config=configs, said=said)
    assert said[0] == "text     Stable Diffusion 3 without its text_encoder_3"
    assert text.left_out == ("text_encoder_3",)
    assert not conds(text)["prompt_embeds"][0, 77:].any()


def test_a_denoiser_alone_goes_with_files_for_all_else(checkpoint, made, tmp_path):
    folder, configs, _ = checkpoint("Flux")
    file = tmp_path / "flux1-dev.safetensors"
    save_file({"double_blocks.0.img_attn.qkv.weight": torch.zeros(8, 8)}, file)
    save_file(ldm_vae(AutoencoderKL.from_pretrained(folder / "vae")), tmp_path / "ae.safetensors")
    text = text_of(file, *made("Flux")[1].values(), vae=tmp_path / "ae.safetensors", config=configs)
    same(conds(text), conds(open_text(folder)))
    assert refusal(file, vae=tmp_path / "ae.safetensors", config=configs) == (
        f"--model {file}: has no text encoder, it seems to be a FLUX checkpoint. Give a checkpoint or a pipeline "
        "folder that has them, or files of them with --text-encoder, or --no-cond."
    )


def test_a_checkpoint_with_encoders_of_its_own_takes_no_others(made, model, tmp_path):
    folder, texts = make_sd1(tmp_path, model)
    file = tmp_path / "sd1.safetensors"
    save_file(ldm_vae(AutoencoderKL.from_pretrained(folder / "vae"), "first_stage_model.") | texts, file)
    t5 = made("Flux")[1]["text_encoder_2"]
    assert refused(file, t5, config=folder) == (
        f"--text-encoder {t5}: is for a model without text encoders, and --model {file} seems to be a Stable Diffusion "
        "1.x checkpoint, which has its own. Leave it out."
    )


def test_a_cache_of_a_checkpoint_is_verified(checkpoint, images, run, tmp_path):
    _, configs, file = checkpoint("Flux")
    options = ("--model", file, "--config", configs, "--out", tmp_path / "c", *SIZE)
    assert run("encode", images, *options).code == 0
    assert run("verify", tmp_path / "c", "--source", images, "--re-encode", 1).code == 0
