"""cli/usage.py, cli/foreign.py: a command line that cannot be understood is one line, which says what to type."""

import inspect
import os
import re
import subprocess
import sys

import pytest

import latentprep
from latentprep.cli.foreign import HINTS, TRAINING, hint_for
from latentprep.door import list_parameters

FLAGS = {parameter.flag for parameter in list_parameters(latentprep.encode)}
KOHYA = (
    "train_data_dir", "pretrained_model_name_or_path", "enable_bucket", "output_dir", "train_batch_size",
    "vae_batch_size", "bucket_no_upscale", "min_bucket_reso", "max_bucket_reso", "bucket_reso_steps", "flip_aug",
    "random_crop", "shuffle_caption", "keep_tokens", "caption_dropout_rate", "max_token_length", "mixed_precision",
    "cache_latents", "cache_latents_to_disk", "cache_text_encoder_outputs", "xformers", "sdpa", "learning_rate",
    "network_module", "optimizer_type", "lr_scheduler", "max_train_steps", "save_every_n_epochs", "logging_dir",
    "gradient_checkpointing", "noise_offset", "min_snr_gamma", "unet_lr", "reg_data_dir", "color_aug",
)  # fmt: skip


def said(run, *words):
    """The one line that is printed; the exit code is 2."""
    result = run(*words)
    assert (result.code, result.out) == (2, ""), result
    assert result.err.startswith("error: ")
    assert result.err.count("\n") == 1
    assert not set("│╭{}<>") & set(result.err)
    return result.err.removeprefix("error: ").rstrip("\n")


@pytest.mark.parametrize("name", KOHYA)
@pytest.mark.parametrize("value", [(), ("=x",), (" x",)])
def test_options_of_kohyas_scripts_are_answered(run, images, name, value):
    words = f"--{name}{''.join(value)}".split()
    assert said(run, "encode", images, *words) == f"--{name}: no such option; {hint_for(name)}"
    assert said(run, *words) == f"--{name}: no such option; {hint_for(name)}"  # also without a command


def test_hints_speak_of_options_that_are_there():
    for name, hint in HINTS.items():
        assert set(re.findall(r"--[a-z-]+", hint)) <= FLAGS, name
        assert hint.endswith("."), name
        for argument in re.findall(r"LatentDataset\((?:cache, )?(\w+)=", hint):
            assert argument in inspect.signature(latentprep.LatentDataset).parameters, name
        for argument in re.findall(r"LatentLoader\(data, (\w+)=", hint):
            assert argument in inspect.signature(latentprep.LatentLoader).parameters, name
    ours = {flag.removeprefix("--").replace("-", "_") for flag in FLAGS}
    assert not ours & HINTS.keys()
    assert not [name for name in ours if name.startswith(TRAINING)]


@pytest.mark.parametrize("flag", sorted(FLAGS - {"SOURCE"}))
def test_our_own_options_with_underscores_are_known(run, images, flag):
    wrong = "--" + flag.removeprefix("--").replace("-", "_")
    if wrong != flag:
        assert said(run, "encode", images, wrong, "x") == f"{wrong}: no such option, it is {flag} here."


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("verify",), "CACHE: is missing, expected: A cache folder. Type: latentprep verify CACHE"),
        (("encode", "x", "--bucket-step", "abc"), "--bucket-step abc: expected a whole number."),
        (("encode", "x", "--min-side=1.5"), "--min-side 1.5: expected a whole number."),
        (("encode", "x", "--max-aspect", "wide"), "--max-aspect wide: expected a number."),
        (("inspect", "x", "--most-cropped", "-1"), "--most-cropped -1: expected a whole number, at least 0."),
        (("compact", "x", "--min-share", "3"), "--min-share 3: expected a number, 0 to 1."),
        (("encode", "x", "--out"), "--out: needs a value."),
        (("encode", "x", "--flip=yes"), "--flip: takes no value."),
        (("encode", "x", "y", "z"), "y z: not expected here."),
        (
            ("encode", "x", "--resolutoin", "3"),
            "--resolutoin: no such option of latentprep encode. Did you mean --reso",
        ),
        (
            ("inspect", "x", "--zzz"),
            "--zzz: no such option of latentprep inspect. latentprep inspect --help lists them.",
        ),
        (("enocde", "x"), "enocde: no such command. Did you mean encode? There are encode, inspect, "),
        (("--nothing",), "--nothing: no such option of latentprep."),
        (("demo", "a", "b"), "b: not expected here."),
        (("encode", "x", "--\x1b[31m"), "--\\x1b[31m: no such option"),
    ],
)
def test_what_is_wrong_is_one_line(run, words, message):
    assert said(run, *words).startswith(message)


def test_a_folder_without_a_command_is_one_to_encode(run, images, monkeypatch):
    monkeypatch.chdir(images.parent)
    assert said(run, "images") == "images: no such command. To encode it: latentprep encode images"


def test_no_words_at_all_are_answered_with_the_help(run):
    result = run()
    assert (result.code, result.err) == (2, "")
    assert result.out.count("Usage:") == 1
    assert "encode" in result.out


def test_help_has_plain_names(run):
    page = run("encode", "--help").out
    assert "latentprep encode [OPTIONS] [SOURCE]" in page
    assert "[default: 4.0]" in page


def test_a_source_that_is_an_option_is_called_so(run, images, tmp_path):
    assert run("encode", images, "--out", tmp_path / "c", "--model", "tiny", "--resolution", 64).code == 0
    (tmp_path / "empty").mkdir()
    for source, words in (("nofolder", "no such folder"), (tmp_path / "empty", "no images"), (__file__, "a file")):
        result = run("verify", tmp_path / "c", "--source", source)
        assert result.err.startswith(f"error: --source {source}: {words}")
        with pytest.raises(latentprep.UserError, match=r"^source='.*': " + words):
            latentprep.verify(tmp_path / "c", source=str(source), progress=False)


@pytest.mark.parametrize(
    ("words", "found"), [("latentprep enc", "encode"), ("latentprep encode photos --bucket", "--bucket-step")]
)
def test_bash_completes_commands_and_options_without_torch(words, found):
    code = (
        "import sys; sys.argv = ['latentprep']\nfrom latentprep.cli.commands import main\n"
        "try: main()\nexcept SystemExit: pass\nassert 'torch' not in sys.modules"
    )
    asked = {"_LATENTPREP_COMPLETE": "complete_bash", "COMP_WORDS": words, "COMP_CWORD": str(words.count(" "))}
    result = subprocess.run([sys.executable, "-c", code], env={**os.environ, **asked}, capture_output=True, text=True)
    assert (result.stdout.split(), result.stderr, result.returncode) == ([found], "", 0)


def test_help_shows_how_to_install_the_completion(run):
    assert "--install-completion" in run("--help").out
