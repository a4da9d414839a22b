"""What GPUs can do at most, as their makers say: dense, without sparsity, with sums in float32."""

import re

# name as CUDA gives it -> TFLOP/s in half precision, and in TF32, in which torch convolves float32 if the GPU can.
# NVIDIA's data sheets of H100, H200, A100, L40S, L4, A10, V100 and T4; of GeForce its white papers of Ada and GA102.
# A card with other limits of its own (a laptop's, a slice of MIG) has no row.
PEAKS = {
    r"NVIDIA H100 80GB HBM3|NVIDIA H200": (989.4, 494.7),
    r"NVIDIA H100 PCIe": (756.0, 378.0),
    r"NVIDIA A100-(SXM4|PCIE)-(40|80)GB|NVIDIA A100 80GB PCIe": (312.0, 156.0),
    r"NVIDIA L40S": (362.0, 183.0),
    r"NVIDIA L4": (121.0, 60.0),
    r"NVIDIA A10": (125.0, 62.5),
    r"NVIDIA GeForce RTX 4090": (165.2, 82.6),
    r"NVIDIA GeForce RTX 3090": (71.0, 35.6),
    r"Tesla V100-SXM2-(16|32)GB": (125.0, 15.7),
    r"Tesla T4": (65.0, 8.1),
}
WITHOUT_BFLOAT16 = ("Tesla V100", "Tesla T4")


def find_peak(device: str, dtype: str) -> float | None:
    """FLOP/s that a device can do in a number type at most; None: not known."""
    import torch

    if not device.startswith("cuda") or (dtype == "float32" and not torch.backends.cudnn.allow_tf32):
        return None
    return peak_of(torch.cuda.get_device_name(device), dtype)


def peak_of(name: str, dtype: str) -> float | None:
    """The same, by the name of a GPU."""
    found = next((peaks for pattern, peaks in PEAKS.items() if re.fullmatch(pattern, name)), None)
    if found is None or (dtype == "bfloat16" and name.startswith(WITHOUT_BFLOAT16)):
        return None
    return found[dtype == "float32"] * 1e12
