"""prepare/devices.py: where no GPU can be used, it is said why and what to do."""

import os

import pytest
import torch

from latentprep.errors import UserError
from latentprep.prepare.devices import choose_device, choose_devices


def refused(device, devices=None):
    with pytest.raises(UserError) as caught:
        choose_devices(device, devices)
    return str(caught.value)


@pytest.fixture
def build(monkeypatch):
    """A build of torch for a version of CUDA, or None; no GPU is there."""

    def make(cuda, hip=None):
        monkeypatch.setattr(torch.version, "cuda", cuda)
        monkeypatch.setattr(torch.version, "hip", hip)
        monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
        monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)

    return make


@pytest.mark.parametrize(("device", "devices"), [("cuda", None), ("cuda:1", None), ("auto", "all"), ("auto", "cuda:0")])
def test_a_build_without_cuda_says_how_to_get_one(build, device, devices):
    build(None)
    said = refused(device, devices)
    option = (
        f"--devices {devices}: " if devices == "all" else f"--{'devices cuda:0' if devices else f'device {device}'}: "
    )
    assert said.startswith(f"{option}torch {torch.__version__} is built without CUDA. Install a build that has it")
    assert "https://pytorch.org/get-started/locally" in said
    assert said.endswith(", or use --device cpu.")


def test_a_build_with_cuda_speaks_of_the_driver(build):
    build("12.8")
    said = refused("cuda")
    assert "is built for CUDA, but finds no GPU: its driver is missing or too old (nvidia-smi shows it)" in said
    build(None, "6.2")
    assert "is built for ROCm, but finds no GPU" in refused("cuda")


@pytest.mark.parametrize("visible", ["", "-1", "7"])
def test_a_gpu_that_is_hidden_is_said_to_be(build, monkeypatch, visible):
    build("12.8")
    monkeypatch.setitem(os.environ, "CUDA_VISIBLE_DEVICES", visible)
    assert f"CUDA_VISIBLE_DEVICES is {visible!r}, which may hide it. Unset that" in refused("cuda")


def test_auto_says_if_torch_has_no_cuda(build):
    build(None)
    assert choose_device("auto") == ("cpu", "auto: no GPU that torch can use; it is built without CUDA")
    build("12.8")
    assert choose_device("auto") == ("cpu", "auto: no GPU that torch can use")


def test_mps_is_not_spoken_of_as_cuda(build):
    build(None)
    assert refused("mps") == f"--device mps: torch {torch.__version__} finds none here. Use --device auto or cpu."
