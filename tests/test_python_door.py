"""The functions of `import latentprep`: called as a notebook or a script calls them."""

import inspect
import json
import os
import pydoc
import re
import signal
import subprocess
import sys
import threading
import time
import warnings
from contextlib import ExitStack
from pathlib import Path
from typing import Annotated

import numpy as np
import pytest
import typer
from PIL import Image

import latentprep
from latentprep import UserError
from latentprep.cli import commands as cli
from latentprep.door import PANELS, Option, door, list_parameters
from latentprep.keywords import Keywords
from latentprep.quiet import quiet_warnings
from tests.test_encode import files

SMALL = {"model": "tiny", "resolution": 64, "bucket_step": 32, "min_side": 32, "device": "cpu"}
ROOT = Path(__file__).parent.parent
COMMANDS = (
    latentprep.encode, latentprep.inspect, latentprep.verify, latentprep.diff, latentprep.compact, latentprep.merge,
    latentprep.bench,
)  # fmt: skip
FUNCTIONS = (*COMMANDS, latentprep.preview, latentprep.report)
OF_COMMANDS = (
    "help",
    "as_json",
    "as_list",
    "only_enlarged",
    "pattern",
    "sheet",
    "page",
    "is_quiet",
)  # options that no function has


def encode_once(images, cache, **options):
    return latentprep.encode(images, cache, **{**SMALL, "progress": False, **options})


def test_the_call_of_the_readme_works_as_typed(images, capfd, monkeypatch):
    monkeypatch.chdir(images.parent)
    images.rename("photos")
    result = latentprep.encode("photos", "photos.latents", model="tiny", resolution=64, device="cpu")
    assert result.ok
    assert (result.cache, result.num_cached, result.num_encoded, result.failures) == ("photos.latents", 8, 8, ())
    shown = capfd.readouterr()
    assert shown.out == ""  # nothing but what the caller prints
    assert "source   photos: 8 images" in shown.err
    assert "latents  100%  8 of 8, " in shown.err
    assert len(latentprep.LatentDataset("photos.latents")) == 8


def test_the_bytes_are_those_of_the_command(run, images, tmp_path):
    encode_once(images, tmp_path / "python", flip=True, caption_column="text", weights="none")
    options = ["--model", "tiny", "--resolution", 64, "--bucket-step", 32, "--min-side", 32, "--device", "cpu"]
    command = ["encode", images, "--out", tmp_path / "command", *options, "--flip", "--weights", "none"]
    command += ["--caption-column", "text"]
    assert run(*command).code == 0
    assert files(tmp_path / "python") == files(tmp_path / "command")


def test_without_out_the_cache_is_beside_the_source(images):
    result = latentprep.encode(f"{images}/", **SMALL, progress=False)
    assert result.cache == f"{images}.latents"
    assert Path(result.cache, "cache.json").exists()


def test_what_became_of_it_can_be_looked_at(images, tmp_path):
    (images / "bad.png").write_text("x")
    result = encode_once(images, tmp_path / "c")
    assert result.ok
    assert result.num_skipped == {"not_an_image": 1}
    assert [(skip.key, skip.reason) for skip in result.skips] == [("bad.png", "not_an_image")]
    assert {change.what for change in result.changes} == {"new"}
    lines = repr(result).splitlines()
    assert lines[0] == f"Encoded {tmp_path / 'c'}: ok"
    assert lines[1].startswith("  8 images cached, 8 encoded, ")
    assert lines[2:] == ["  skipped: 1 not_an_image"]
    assert result.report.splitlines()[-1] == f"next     latentprep inspect {tmp_path / 'c'}"
    assert 0 < result.seconds < 60


def test_strict_says_that_a_skip_is_a_fault(images, tmp_path):
    (images / "bad.png").write_text("x")
    result = encode_once(images, tmp_path / "c", strict=True)
    assert not result.ok
    assert "NOT OK" in repr(result)
    assert not encode_once(images, tmp_path / "c", strict=True).ok  # nor if there is nothing to do
    assert encode_once(images, tmp_path / "c").ok


def test_nothing_to_do(images, tmp_path):
    encode_once(images, tmp_path / "c")
    before = files(tmp_path / "c")
    result = encode_once(images, tmp_path / "c")
    assert (result.ok, result.num_cached, result.num_encoded, result.changes) == (True, 8, 0, ())
    assert "nothing to do" in result.report
    assert files(tmp_path / "c") == before


def test_a_dry_run_tells_the_plan_and_writes_nothing(images, tmp_path):
    result = encode_once(images, tmp_path / "c", dry_run=True)
    assert (result.is_dry_run, result.num_cached, result.num_encoded) == (True, 0, 8)
    assert len(result.changes) == 8
    assert result.seconds > 0
    assert "(dry run)" in repr(result)
    assert "nothing was written" in result.report
    assert not (tmp_path / "c").exists()


def test_a_failure_is_in_the_result(images, tmp_path, monkeypatch):
    from latentprep.prepare.models.vae_encoder import VaeEncoder

    whole = VaeEncoder.start

    def fail_sometimes(self, pixels):
        if pixels.shape[1] == 32:
            raise RuntimeError("a bug\x1b[2J")
        return whole(self, pixels)

    monkeypatch.setattr(VaeEncoder, "start", fail_sometimes)
    result = encode_once(images, tmp_path / "c", shard_size="30kB")
    assert not result.ok
    assert result.num_cached == 4
    assert len(result.failures) >= 1
    assert "FAILED: " in repr(result)
    assert "\x1b" not in repr(result)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"resolution": "abc"}, "resolution='abc': expected a number of pixels, such as 512 or 768x512, or 'native'."),
        ({"bucket_step": 20}, "bucket_step=20: not a multiple of 8, this model's factor. Try 24."),
        (
            {"bucket_step": 128},
            "resolution=64: smaller than bucket_step=128, so there is no bucket. Try bucket_step=8.",
        ),
        ({"crops": 2}, "crops=2: there is only one centre. Add crop='random' or crop='focus'."),
        ({"fit": "zoom"}, "fit='zoom': expected one of crop, stretch, pad."),
        ({"width": 64}, "width without height: a fixed size needs both."),
        ({"only": "text", "overwrite": True}, "only='text' with overwrite=True: one wants cond"),
        (
            {"template": "style"},
            'template uses [name], without a placeholder. Say what [name] stands for: placeholder="',
        ),
        ({"keep_tags": 2}, "keep_tags=2: nothing is shuffled or dropped. Give shuffle_tags=True or tag_drop_out."),
        ({"shard_size": "lots"}, "shard_size='lots': expected a size such as 256MB or 1GiB."),
        ({"model": "no where"}, "model='no where': no such folder or file."),
        ({"max_megapixels": float("nan")}, "max_megapixels=nan: expected a number of more than 0."),
        ({"rank": 1}, "rank without world_size: a share of the work needs both."),
        ({"rank": 2, "world_size": 2}, "rank=2: expected 0 to 1, since world_size is 2."),
        ({"devices": "cpu,cpu"}, "device='cpu' with devices='cpu,cpu': both say where the models run."),
        ({"device": "auto", "devices": "cpu,"}, "devices='cpu,': expected all, or names with commas between them"),
        # of another type than the signature says
        ({"bucket_step": "32"}, "bucket_step='32': expected a whole number."),
        ({"bucket_step": 32.0}, "bucket_step=32.0: expected a whole number."),
        ({"batch_size": True}, "batch_size=True: expected a whole number or None."),
        ({"flip": "yes"}, "flip='yes': expected True or False."),
        ({"resolution": None}, "resolution=None: expected a whole number or a text."),
        ({"caption_column": ["a", 1]}, "caption_column=['a', 1]: expected a text or a list of texts or None."),
        ({"seed": None}, "seed=None: expected a whole number."),
        ({"progress": 1}, "progress=1: expected True, False, or an object with `say` and `bar`."),
    ],
)
def test_a_wrong_argument_is_named_by_its_keyword(images, tmp_path, options, message):
    before = files(tmp_path)
    with pytest.raises(UserError) as caught:
        encode_once(images, tmp_path / "c", **options)
    assert str(caught.value).startswith(message)
    assert "--" not in str(caught.value)
    assert files(tmp_path) == before


def test_a_wrong_folder_is_named_by_its_keyword(images, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=r"^source='missing': no such folder\."):
        latentprep.encode("missing", progress=False)
    with pytest.raises(UserError, match=r"^source=7: expected a text or a path\."):
        latentprep.encode(7)  # type: ignore[arg-type]
    with pytest.raises(UserError, match=r"^source: is empty"):
        latentprep.encode("")
    with pytest.raises(UserError, match=r"^out=.*: is the image folder itself"):
        encode_once(images, images)
    with pytest.raises(UserError, match="not a latent cache"):
        latentprep.inspect("missing")
    with pytest.raises(UserError, match=r"^re_encode needs the images: give their folder with source\."):
        latentprep.verify("missing", re_encode=1)
    with pytest.raises(UserError, match=r"^re_encode=-1: expected at least 0\."):
        latentprep.verify("missing", re_encode=-1)
    with pytest.raises(UserError, match=r"^min_share=2: expected 0 to 1\."):
        latentprep.compact("missing", min_share=2)


def test_an_unknown_keyword_is_named():
    with pytest.raises(TypeError, match="resolutoin"):
        latentprep.encode("photos", resolutoin=64)  # type: ignore[call-arg]


def test_numpys_numbers_will_do(images, tmp_path):
    options = {"bucket_step": np.int64(32), "min_side": np.int16(32), "max_aspect": np.float32(4)}
    encode_once(images, tmp_path / "numpy", **options)
    encode_once(images, tmp_path / "python")
    assert files(tmp_path / "numpy") == files(tmp_path / "python")


def test_a_cache_is_inspected_verified_and_compacted(images, tmp_path, run):
    cache = tmp_path / "c"
    encode_once(images, cache)
    summary = latentprep.inspect(cache)
    assert summary["images"] == 8
    assert json.loads(json.dumps(dict(summary))) == json.loads(run("inspect", cache, "--json").out)
    assert "Buckets" in repr(summary)
    assert str(summary) == repr(summary)
    sample = latentprep.inspect(str(cache), key="tall1.png")
    assert sample["caption"] == ["picture number 1"]
    assert "picture number 1" in repr(sample)
    checked = latentprep.verify(cache, source=images, re_encode=1, progress=False)
    assert checked.ok
    assert checked.problems == ()
    assert checked.differences.keys() == {"latents", "cond"}
    assert repr(checked).endswith(f"{cache}: 8 images in 1 shard, nothing wrong")
    (images / "wide0.png").unlink()
    (problem,) = latentprep.verify(cache, source=images, progress=False).problems
    assert (problem.name, problem.problem) == ("wide0.png", "gone")
    encode_once(images, cache)
    done = latentprep.compact(cache, min_share=0)
    assert (done.ok, done.num_rows, done.num_left) == (True, 1, 0)
    assert "1 row and " in repr(done)
    (next((cache / "shards").glob("*.latents.*"))).write_bytes(b"x")
    assert not latentprep.verify(cache, progress=False).ok


class Heard:
    """What a program of its own does with a run's progress."""

    def __init__(self):
        self.lines, self.done = [], {}

    def say(self, text):
        self.lines.append(text)

    def bar(self, total, stage, unit="img"):
        heard = self

        class Bar:
            initial = 0

            def __enter__(self):
                return self

            def __exit__(self, *_):
                return None

            def set_postfix_str(self, text, refresh=True):
                pass

            def update(self, count):
                heard.done[stage] = heard.done.get(stage, 0) + count

        return Bar()


def test_progress_may_be_silent_or_the_callers_own(images, tmp_path, capfd):
    encode_once(images, tmp_path / "c")
    shown = capfd.readouterr()
    assert (shown.out, shown.err) == ("", "")
    heard = Heard()
    encode_once(images, tmp_path / "d", progress=heard)
    assert heard.done == {"latents": 8, "text": 8}
    assert any(line.startswith("model    tiny") for line in heard.lines)
    latentprep.verify(tmp_path / "d", source=images, progress=heard)
    assert heard.done["source"] == 8


def test_what_is_said_speaks_of_keywords_and_obeys_nobody(images, tmp_path, capfd):
    (images / "tall0.txt").write_text("one\ntwo\n", encoding="utf-8")
    (images / "wide0.png").rename(images / "\x1b[31m.png")
    (images / "\x1b[2J.txt").write_text("of no image")
    encode_once(images, tmp_path / "c", progress=True)
    err = capfd.readouterr().err
    assert "(caption_lines=True makes each line a caption)" in err
    assert "\x1b[2J" not in err


def test_other_libraries_are_afterwards_as_they_were(images, tmp_path):
    import diffusers.utils.logging
    import huggingface_hub.utils
    import transformers.utils.logging

    from latentprep.prepare.devices import quiet_libraries

    logs = diffusers.utils.logging, transformers.utils.logging
    try:
        for log in logs:
            log.set_verbosity_info()
            log.enable_progress_bar()
        huggingface_hub.utils.enable_progress_bars()
        filters = list(warnings.filters)
        handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
        encode_once(images, tmp_path / "c")
        assert [log.get_verbosity() for log in logs] == [log.INFO for log in logs]
        assert all(log.is_progress_bar_enabled() for log in logs)
        assert not huggingface_hub.utils.are_progress_bars_disabled()
        assert warnings.filters == filters
        assert handlers == {number: signal.getsignal(number) for number in handlers}
    finally:
        quiet_libraries()


QUIET = """
import os, sys
import latentprep
latentprep.encode(sys.argv[1], sys.argv[2], model="tiny", resolution=64, bucket_step=32, device="cpu", progress=False)
import transformers
logging = transformers.utils.logging
print(logging.get_verbosity() == logging.WARNING, "TRANSFORMERS_VERBOSITY" in os.environ)
"""


@pytest.mark.slow
def test_a_silent_call_prints_nothing_at_all(images, tmp_path):
    environment = {name: value for name, value in os.environ.items() if name != "TRANSFORMERS_VERBOSITY"}
    command = [sys.executable, "-c", QUIET, str(images), str(tmp_path / "c")]
    done = subprocess.run(command, capture_output=True, text=True, check=True, env=environment)
    assert (done.stdout, done.stderr) == ("True False\n", "")


def test_it_works_in_a_thread_and_in_two_at_once(images, tmp_path):
    filters = list(warnings.filters)
    results = {}
    errors = []

    def work(name):
        try:
            results[name] = encode_once(images, tmp_path / name)
        except BaseException as error:
            errors.append(error)
            raise

    threads = [threading.Thread(target=work, args=(name,)) for name in ("a", "b")]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not errors
    assert all(result.ok for result in results.values())
    assert files(tmp_path / "a") == files(tmp_path / "b")
    assert warnings.filters == filters


def test_a_cache_that_another_thread_writes_is_refused(images, tmp_path, monkeypatch):
    from latentprep.cache.lock import hold
    from latentprep.cache.storage import Storage

    monkeypatch.setattr(sys, "argv", ["/home/me/train.py", "--fast"])
    with (
        hold(Storage(tmp_path / "c")),
        pytest.raises(UserError, match=r"another latentprep run is writing it .*: train\.py --fast\)"),
    ):
        encode_once(images, tmp_path / "c")


SCRIPT = """
import sys, latentprep
images, cache = sys.argv[1:]
try:
    latentprep.encode(images, cache, model="tiny", resolution=64, bucket_step=32, min_side=32, device="cpu",
                      shard_size="30kB", progress=False)
except KeyboardInterrupt as stop:
    print("\\n".join(stop.__notes__))
    sys.exit(7)
"""


@pytest.mark.slow
def test_ctrl_c_raises_keyboard_interrupt_and_keeps_what_is_done(images, tmp_path):
    for n in range(50):
        (images / f"copy{n}.png").write_bytes((images / "wide0.png").read_bytes())
    cache = tmp_path / "c"
    command = [sys.executable, "-c", SCRIPT, str(images), str(cache)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 60
    while len(list(cache.glob("shards/*.latents.*"))) < 3:
        assert time.monotonic() < deadline
        assert process.poll() is None
        time.sleep(0.005)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 7, err
    assert "finished shard" in out
    assert f"safe in {cache}. The same call goes on from there." in out
    assert not (cache / ".lock").exists()
    finished = {name: data for name, data in files(cache / "shards").items() if ".latents." in name}
    assert finished
    encode_once(images, cache, shard_size="30kB")
    assert finished.items() <= files(cache / "shards").items()
    encode_once(images, tmp_path / "whole", shard_size="30kB")
    assert files(tmp_path / "whole") == files(cache)


# the table of options


@pytest.mark.parametrize("function", COMMANDS, ids=lambda f: f.__name__)
def test_every_option_of_a_command_is_a_keyword_with_the_same_default(function):
    command = typer.main.get_command(cli.app).commands[function.__name__]
    parameters = dict(inspect.signature(function).parameters)
    if function is latentprep.inspect:  # it draws too, and makes pages
        parameters = {**inspect.signature(latentprep.preview).parameters, **parameters}
    found = {option.name: option for option in command.params if option.name not in OF_COMMANDS}
    assert found.keys() == parameters.keys() - {"progress", "pattern"}
    for name, option in found.items():
        default = parameters[name].default
        if option.param_type_name == "argument":
            assert option.required == (default is inspect.Parameter.empty)
            continue
        assert option.opts == [f"--{name.replace('_', '-')}"]
        assert not option.secondary_opts  # no --no-no-draft
        assert option.default == default or (name, option.default) in (("resolution", "512"), ("num", None))
        assert option.multiple == (name in ("caption_column", "control", "control_column", "exclude", "text_encoder"))


@pytest.mark.parametrize("function", FUNCTIONS, ids=lambda f: f.__name__)
def test_help_names_every_argument_in_a_line_and_what_is_raised(function):
    lines = function.__doc__.splitlines()
    for parameter in list_parameters(function):
        (line,) = [line for line in lines if re.match(rf"  {parameter.name}(=|  )", line)]
        assert parameter.option.help.split("--")[0].split("SOURCE")[0] in line
    assert "Raises UserError" in function.__doc__
    assert "In Python" in function.__doc__
    assert " --" not in function.__doc__
    signature = str(inspect.signature(function))
    assert "Annotated" not in signature
    assert "Option(" not in signature


def test_every_panel_is_one_of_the_list_and_every_text_has_a_word_for_its_value():
    for function in FUNCTIONS:
        for parameter in list_parameters(function):
            assert parameter.option.panel in ("", *PANELS)
            if parameter.kinds not in ((bool,), (int,)) and not parameter.option.in_python_only:
                assert parameter.metavar, parameter.name


def test_public_names_are_listed_and_documented():
    assert set(latentprep.__all__) <= set(dir(latentprep))
    assert [name for name in dir(latentprep) if not name.startswith("__")] == sorted(
        name for name in latentprep.__all__ if not name.startswith("__")
    )
    for name in latentprep.__all__:
        assert getattr(latentprep, name).__doc__, name
    page = pydoc.render_doc(latentprep, renderer=pydoc.plaintext)
    page = re.sub(r"\(\s+", "(", page)  # from Python 3.13 on a long signature has a line for each argument
    for words in ("encode(source: ", "class LatentDataset(", "class UserError(", "Encode an image folder once"):
        assert words in page
    with pytest.raises(AttributeError, match="no attribute 'enocde'"):
        latentprep.enocde  # noqa: B018


def test_an_option_is_added_in_one_place():
    """A function with one more argument has it on the command line, in its checks, its words and its help."""
    from latentprep.cli.face import face

    def scale(
        source: Annotated[str, Option("SOURCE", "A folder.", is_argument=True)],
        *,
        grow_by: Annotated[int | None, Option("N", "Times; see --in-place.", shown="twice", least=1)] = None,
        in_place: Annotated[bool, Option(help="Keep no copy.")] = False,
    ) -> int:
        """Grow."""
        if grow_by == 13:
            raise UserError(f"--grow-by {grow_by} with --in-place: unlucky. Try --grow-by 14.")
        return grow_by or 2

    grown = door(scale)
    assert (grown("x"), grown("x", grow_by=3)) == (2, 3)
    with pytest.raises(UserError, match=r"^grow_by=0: expected at least 1\.$"):
        grown("x", grow_by=0)
    with pytest.raises(UserError, match=r"^grow_by=13 with in_place=True: unlucky\. Try grow_by=14\.$"):
        grown("x", grow_by=13)
    assert "  grow_by=None  N: Times; see in_place=True. Default: twice." in grown.__doc__.splitlines()
    heard = []
    app = typer.Typer()
    app.command()(face(grown, heard.append))
    with pytest.raises(SystemExit):
        app(["x", "--grow-by", "4", "--in-place"])
    assert heard == [{"source": "x", "grow_by": 4, "in_place": True}]


@pytest.mark.parametrize(
    ("said", "wanted"),
    [
        ("--out /a/--out.b/SOURCE: no", "out='/a/--out.b/SOURCE': no"),
        ("--max-side 8, --max-side -1.5 and --max-side 30kB", "max_side=8, max_side=-1.5 and max_side 30kB"),
        ("--crop random or --crop randomly", "crop='random' or crop randomly"),
        ("Give --out DIR, or --flip.", "Give out=DIR, or flip=True."),
        ("--max-side-by-side, --flipped, x--flip", "--max-side-by-side, --flipped, x--flip"),
        ("(--flip mirrors; see SOURCE)", "(flip=True mirrors; see source)"),
        ('--out "a --flip b"', 'out="a --flip b"'),
    ],
)
def test_options_in_a_text_become_keywords(said, wanted):
    names = {"--out": "out", "--max-side": "max_side", "--crop": "crop", "--flip": "flip=True", "SOURCE": "source"}
    keywords = Keywords(names, {"--out": ("DIR",), "--max-side": ("PIXELS",), "--crop": ("random",), "SOURCE": ()})
    assert keywords.translate(said, {"out": "/a/--out.b/SOURCE"}) == wanted


def test_the_functions_need_no_torch_until_they_are_called_and_never_typer(tmp_path):
    code = "import latentprep, sys; latentprep.encode, latentprep.Encoded; print(*sys.modules)"
    shown = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT).stdout
    assert not {"torch", "numpy", "PIL", "rich", "tqdm", "typer"} & set(shown.split())
    code = (
        "import latentprep, sys\ntry: latentprep.inspect('missing')\nexcept latentprep.UserError: print(*sys.modules)"
    )
    shown = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT).stdout
    assert "typer" not in shown.split()


USER = """
from pathlib import Path

import latentprep


def prepare(photos: Path) -> int:
    result: latentprep.Encoded = latentprep.encode(
        photos, "photos.latents", model="tiny", resolution=64, device="cpu", fit="pad", caption_column=["a", "b"]
    )
    if not result.ok:
        raise SystemExit("; ".join(result.failures))
    images: int = latentprep.inspect("photos.latents")["images"]
    problems = latentprep.verify("photos.latents", source=photos, re_encode=2).problems
    names: list[str] = [problem.name for problem in problems]
    latentprep.compact("photos.latents", min_share=0.5)
    return images + len(names)


try:
    latentprep.encode("photos", fit="zoom")
    latentprep.encode("photos", resolutoin=64)
    latentprep.encode("photos", flip="yes")
except latentprep.UserError as error:
    print(error)
"""


@pytest.mark.slow
def test_a_users_script_is_checked_strictly_by_mypy(tmp_path):
    pytest.importorskip("mypy")
    (tmp_path / "user.py").write_text(USER, encoding="utf-8")
    command = [sys.executable, "-m", "mypy", "--strict", "--config-file", str(ROOT / "pyproject.toml"), "user.py"]
    environment = {**os.environ, "MYPYPATH": str(ROOT)}
    options = ["--cache-dir", str(tmp_path / "mypy"), "--follow-imports", "silent"]
    result = subprocess.run([*command, *options], capture_output=True, text=True, cwd=tmp_path, env=environment)
    wrong = [line for line in result.stdout.splitlines() if line.startswith("user.py")]
    first = USER.splitlines().index('    latentprep.encode("photos", fit="zoom")') + 1
    found = {int(line.split(":")[1]) for line in wrong if "error:" in line}
    assert found == {first, first + 1, first + 2}, result.stdout + result.stderr


def test_what_all_threads_share_ends_with_the_last_of_them():
    filters = list(warnings.filters)
    with ExitStack() as first, ExitStack() as second:
        first.enter_context(quiet_warnings)
        second.enter_context(quiet_warnings)
        first.close()
        assert warnings.filters != filters
        second.close()
        assert warnings.filters == filters
        assert quiet_warnings.num_inside == 0


def test_in_a_notebook_a_summary_is_what_repr_gives(images, tmp_path, monkeypatch, capfd):
    encode_once(images, tmp_path / "c")
    monkeypatch.setattr("rich.console._is_jupyter", lambda: True)
    assert "Buckets" in repr(latentprep.inspect(tmp_path / "c"))
    assert capfd.readouterr().out == ""


@pytest.mark.slow
def test_a_script_without_a_guard_may_use_several_devices(images, tmp_path):
    script = tmp_path / "script.py"
    script.write_text(
        "import sys, latentprep\nprint('begun')\nprint(latentprep.encode(sys.argv[1], sys.argv[2], model='tiny', "
        "resolution=64, devices='cpu,cpu', shard_size='30kB', progress=False).ok)\n"
    )
    command = [sys.executable, str(script), str(images), str(tmp_path / "c")]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    result = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=300)
    assert result.stdout.split() == ["begun", "True"], result.stderr


def test_ranks_share_the_work_and_merge_commits_what_they_did(images, tmp_path):
    whole = encode_once(images, tmp_path / "whole", shard_size="30kB")
    cache = tmp_path / "c"
    first = encode_once(images, cache, shard_size="30kB", rank=0, world_size=2)
    assert (first.ok, first.absent) == (True, (1,))
    assert "not committed yet: rank 1 is still at work" in repr(first)
    with pytest.raises(UserError, match=r"ranks, some have not finished: 1\. .* give incomplete=True to commit"):
        latentprep.merge(cache)
    part = latentprep.merge(cache, incomplete=True)
    assert (part.ok, part.absent) == (False, (1,))
    assert 0 < part.num_images < 8
    assert encode_once(images, cache, shard_size="30kB").num_cached == whole.num_cached == 8


def test_merge_as_a_command(images, tmp_path, run):
    encode_once(images, tmp_path / "c", shard_size="30kB", rank=0, world_size=2)
    refused = run("merge", tmp_path / "c")
    assert (refused.code, "--incomplete" in refused.err) == (1, True)
    merged = run("merge", tmp_path / "c", "--incomplete")
    assert merged.code == 0
    assert re.search(r"c: \d images?; without rank 1: run encode again", merged.out)


def test_the_last_rank_commits(images, tmp_path):
    encode_once(images, tmp_path / "whole", shard_size="30kB")
    for rank in (1, 0):
        done = encode_once(images, tmp_path / "c", shard_size="30kB", rank=rank, world_size=2)
    assert done.absent == ()
    assert files(tmp_path / "c") == files(tmp_path / "whole")


def test_pillows_limit_is_put_back(images, tmp_path, monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 12_345)
    latentprep.encode(images, tmp_path / "c", model="tiny", resolution=64, max_megapixels=1, progress=False)
    assert Image.MAX_IMAGE_PIXELS == 12_345


@pytest.mark.slow
def test_several_devices_in_a_process_that_may_start_none(images, tmp_path):
    code = """
import multiprocessing, sys, latentprep
def work(images, out):
    try:
        latentprep.encode(images, out, model="tiny", resolution=64, devices="cpu,cpu", progress=False)
    except latentprep.UserError as error:
        print(error, flush=True)
if __name__ == "__main__":
    process = multiprocessing.get_context("fork").Process(target=work, args=sys.argv[1:], daemon=True)
    process.start()
    process.join()
"""
    command = [sys.executable, "-c", code, str(images), str(tmp_path / "c")]
    shown = subprocess.run(command, capture_output=True, text=True, check=True, cwd=ROOT)
    assert "devices='cpu,cpu': each needs a process, and a DataLoader's worker may start none" in shown.stdout
