"""text_encoder.py, token_counter.py: batches of prompts by memory and by length, and tokens counted without weights."""

from dataclasses import replace

import numpy as np
import pytest
import torch
import transformers

from latentprep import LatentDataset
from latentprep.options import TextOptions
from latentprep.prepare.models import text_encoder
from latentprep.prepare.models.text_encoder import TextEncoder
from latentprep.prepare.models.text_folder import open_text
from tests.conftest import SMALL
from tests.test_encode import files
from tests.test_families import CPU, NAMES, make_mini, minis  # noqa: F401 (a fixture)

PROMPTS = [f"{'word ' * n}end" for n in (3, 40, 1, 0, 25, 2, 60, 0)]


@pytest.fixture(scope="module")
def flux(tmp_path_factory):
    return make_mini("flux", tmp_path_factory.mktemp("flux"))


class Full:
    """A device whose memory holds so many prompts at once, with the error of the real one."""

    def __init__(self, monkeypatch, most=10**9):
        self.batches = []
        whole = TextEncoder._encode_batch

        def encode(encoder, prompts):
            self.batches.append(list(prompts))
            if len(prompts) > most:
                raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
            return whole(encoder, prompts)

        monkeypatch.setattr(TextEncoder, "_encode_batch", encode)

    @property
    def sizes(self):
        return [len(batch) for batch in self.batches]


def assert_same(found, wanted):
    assert found.keys() == wanted.keys()
    for name, value in wanted.items():
        assert torch.allclose(found[name], value, atol=2e-6), name


def test_a_full_memory_halves_the_batch_and_is_remembered(flux, monkeypatch):
    options = TextOptions(max_tokens=64)
    wanted = TextEncoder(open_text(flux.folder), CPU, torch.float32, options).encode(PROMPTS)
    device = Full(monkeypatch, 3)
    encoder = TextEncoder(open_text(flux.folder), CPU, torch.float32, options)
    assert_same(encoder.encode(PROMPTS), wanted)
    assert device.sizes == [8, 4, 2, 2, 2, 2]
    assert encoder.batch_limit == "out of memory with 4 prompts at once: went on with 2"
    encoder.encode(PROMPTS[:4])
    assert device.sizes[6:] == [2, 2]


def test_another_error_is_no_full_memory(flux, monkeypatch):
    monkeypatch.setattr(TextEncoder, "_encode_batch", lambda *_: (_ for _ in ()).throw(RuntimeError("no kernel")))
    with pytest.raises(RuntimeError, match="no kernel"):
        TextEncoder(open_text(flux.folder), CPU, torch.float32).encode(PROMPTS)


def test_a_run_goes_on_with_half_and_says_so(run, images, tmp_path, monkeypatch):
    assert run("encode", images, "--out", tmp_path / "whole", *SMALL).code == 0
    with monkeypatch.context() as patch:
        device = Full(patch, 4)
        result = run("encode", images, "--out", tmp_path / "c", *SMALL)
    assert result.code == 0
    assert device.sizes == [8, 4, 4, 1]
    assert "         out of memory with 8 prompts at once: went on with 4\n" in result.out
    one, other = (LatentDataset(tmp_path / name) for name in ("c", "whole"))
    for n in range(len(other)):
        assert torch.allclose(one[n].cond["prompt_embeds"], other[n].cond["prompt_embeds"], atol=1e-3)


@pytest.mark.parametrize("where", ["_encode_batch", "__init__"])
def test_a_memory_that_holds_not_one_prompt_ends_the_run_with_what_to_do(run, images, tmp_path, monkeypatch, where):
    command = ("encode", images, "--out", tmp_path / "c", *SMALL, "--shard-size", "30kB")
    asked = []

    def full(*_arguments):
        asked.append(1)
        raise torch.OutOfMemoryError("CUDA out of memory.")

    with monkeypatch.context() as patch:
        patch.setattr(TextEncoder, where, full)
        assert "error: --text-device cpu: its memory does not hold" in run(*command, "--dry-run").err
        del asked[:]
        result = run(*command)
    assert result.code == 1
    assert "error: --text-device cpu: its memory does not hold the text encoder and one prompt. Use " in result.err
    assert len(asked) < 5  # and not for each shard
    assert run(*command).code == 0
    assert run("encode", images, "--out", tmp_path / "whole", *SMALL, "--shard-size", "30kB").code == 0
    assert files(tmp_path / "c") == files(tmp_path / "whole")


@pytest.mark.parametrize("name", ["forward", "from_pretrained"])
def test_a_memory_that_a_library_finds_full_is_no_fault_of_the_model(run, images, tmp_path, monkeypatch, name):
    def full(*_arguments, **_options):
        raise RuntimeError("[enforce fail at alloc_cpu.cpp] DefaultCPUAllocator: not enough memory")

    monkeypatch.setattr(transformers.CLIPTextModel, name, full)
    result = run("encode", images, "--out", tmp_path / "c", *SMALL)
    assert result.code == 1
    assert "error: --text-device cpu: its memory does not hold the text encoder and one prompt. Use " in result.err
    assert "Download the model again" not in result.err


def test_prompts_of_like_length_are_batched_where_padding_is_to_the_longest(flux, monkeypatch):
    facts = open_text(flux.folder)
    wanted = TextEncoder(facts, CPU, torch.float32).encode(PROMPTS)
    device, counts = Full(monkeypatch), []
    longest = replace(facts, family=replace(facts.family, pads_to_longest=True))
    encoder = TextEncoder(longest, CPU, torch.float32)
    count = encoder.counter.count
    monkeypatch.setattr(encoder.counter, "count", lambda prompts: counts.append(1) or count(prompts))
    monkeypatch.setattr(text_encoder, "TOKENS_AT_ONCE", 700)
    encoder.tokens_at_once = 700
    tokens = encoder.count_tokens(PROMPTS)
    assert_same(encoder.encode(PROMPTS), wanted)
    assert len(counts) == 1
    assert [prompt for batch in device.batches for prompt in batch] == [
        PROMPTS[n] for n in np.argsort(-tokens, kind="stable")
    ]
    assert all(len(batch) * int(encoder.count_tokens(batch)[0]) <= 700 for batch in device.batches)
    assert len(device.batches) < len(PROMPTS) // 2  # with 512 tokens each it would be one by one


def test_prompts_that_are_all_padded_alike_keep_their_order(flux, monkeypatch):
    device = Full(monkeypatch)
    TextEncoder(open_text(flux.folder), CPU, torch.float32).encode(PROMPTS)
    assert device.batches == [PROMPTS[:4], PROMPTS[4:]]


@pytest.mark.parametrize("name", NAMES)
def test_a_family_says_whether_its_pipeline_pads_to_the_longest(minis, name):  # noqa: F811
    encoder = TextEncoder(open_text(minis[name].folder), CPU, torch.float32)
    family, widths = encoder.family, []

    def note(_module, arguments, options):
        ids = options.get("input_ids", arguments[0] if arguments else None)
        widths.append(ids.shape[1])

    part = getattr(encoder.pipeline, family.sequence or "text_encoder")
    part.register_forward_pre_hook(note, with_kwargs=True)
    encoder.encode(["a", "a bb"])
    longest = int(encoder.count_tokens(["a bb"])[0])
    assert set(widths) == ({longest} if family.pads_to_longest else {encoder.counter.max_tokens})
