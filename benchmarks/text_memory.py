"""Peak memory of the text pass against the bytes of the text encoder's weights: they are to be in memory once.

    python benchmarks/text_memory.py                      # a T5 of 2 GB, bfloat16 on disk, in three dtypes

Each run is `latentprep encode --only text` in a process of its own, over latents that another run has made. The T5 has
random weights, and bfloat16 on disk. The kernel counts a file that is mapped as resident too, though it may drop those
pages at any time: so the peak of anonymous memory, which nothing but swap can take back, is given apart. It is read
every 20 ms, less what such a process has once it has imported its libraries. In float16 transformers keeps T5's `wo` in
float32, which counts as weights here. In bfloat16 the file itself is mapped.
"""

import json
import os
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import torch
import typer
from drawn import draw
from results import Results, run
from safetensors.torch import save_file

TOKENIZER = Path(__file__).parent.parent / "latentprep" / "tiny" / "tokenizer"
IMPORTS = "import time, torch, diffusers, transformers; from transformers import T5EncoderModel, CLIPTextModel; "
IMPORTS += "from diffusers import FluxPipeline; time.sleep(1)"
T5 = {
    "vocab_size": 32128, "d_model": 2048, "d_kv": 64, "num_heads": 32, "d_ff": 5120, "feed_forward_proj": "gated-gelu",
}  # fmt: skip


@dataclass(frozen=True)
class Peak:
    """What a process held at most, in bytes."""

    resident: int
    anonymous: int


def save_t5(folder: Path, gigabytes: float, dtype: torch.dtype) -> dict[str, int]:
    """A T5 with random weights of about this size, without ever being in memory as a model; its tensors' sizes."""
    from transformers import T5Config, T5EncoderModel

    per_layer = 4 * T5["d_model"] * T5["num_heads"] * T5["d_kv"] + 3 * T5["d_model"] * T5["d_ff"]
    layers = max(1, round(gigabytes * 1e9 / dtype.itemsize / per_layer))
    config = T5Config(**T5, num_layers=layers)
    config.architectures = ["T5EncoderModel"]
    config.save_pretrained(folder)
    with torch.device("meta"):
        shapes = {name: value.shape for name, value in T5EncoderModel(config).state_dict().items()}
    shapes.pop("encoder.embed_tokens.weight", None)  # shared.weight
    tensors = {name: torch.empty(shape, dtype=dtype).normal_(0, 0.02) for name, shape in shapes.items()}
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    return {name: value.numel() for name, value in tensors.items()}


def count_bytes(sizes: dict[str, int], dtype: torch.dtype) -> int:
    """Bytes of the T5's weights once it is loaded in a dtype."""

    def itemsize(name: str) -> int:
        return 4 if name.endswith(".wo.weight") and dtype == torch.float16 else dtype.itemsize

    return sum(size * itemsize(name) for name, size in sizes.items())


def save_pipeline(folder: Path, gigabytes: float, dtype: torch.dtype) -> dict[str, int]:
    """A FLUX.1 folder whose T5 is large, and all else small; the sizes of the T5's tensors."""
    from diffusers import AutoencoderKL, FluxPipeline
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer, T5Config, T5EncoderModel, T5TokenizerFast

    torch.manual_seed(0)
    vocab = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("▁", -2.0)]
    vocab += [(letter, -3.0) for letter in "abcdefghijklmnopqrstuvwxyz0123456789"]
    clip = CLIPTextConfig(
        vocab_size=514, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        bos_token_id=512, eos_token_id=513, pad_token_id=513,
    )  # fmt: skip
    vae = AutoencoderKL(
        block_out_channels=(8, 8), down_block_types=("DownEncoderBlock2D",) * 2, latent_channels=16, norm_num_groups=8,
        up_block_types=("UpDecoderBlock2D",) * 2, scaling_factor=0.3611, shift_factor=0.1159,
    )  # fmt: skip
    small = T5Config(**{**T5, "vocab_size": 64, "d_model": 8, "d_ff": 8, "num_heads": 1, "num_layers": 1})
    FluxPipeline(
        scheduler=None, transformer=None, vae=vae,
        text_encoder=CLIPTextModel(clip), tokenizer=CLIPTokenizer.from_pretrained(TOKENIZER),
        text_encoder_2=T5EncoderModel(small), tokenizer_2=T5TokenizerFast(vocab=vocab, extra_ids=0),
    ).save_pretrained(folder)  # fmt: skip
    return save_t5(folder / "text_encoder_2", gigabytes, dtype)


def watch(command: list[str]) -> Peak:
    """Run a command; what it held at most. Linux alone."""
    anonymous, resident = 0, 0
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    while process.poll() is None:
        try:
            status = Path(f"/proc/{process.pid}/status").read_text()
        except OSError:
            break
        fields = dict(line.split(":", 1) for line in status.splitlines() if ":" in line)
        if "RssAnon" in fields:
            anonymous = max(anonymous, 1024 * int(fields["RssAnon"].split()[0]))
            resident = max(resident, 1024 * int(fields["VmHWM"].split()[0]))
        time.sleep(0.02)
    _, err = process.communicate()
    if process.returncode:
        raise SystemExit(f"exit code {process.returncode}: {' '.join(command)}\n{err}")
    return Peak(resident, anonymous)


def main(
    results: Results,
    gigabytes: Annotated[float, typer.Option(help="Size of the T5 on disk.")] = 2.0,
    stored: Annotated[str, typer.Option(help="Its number type on disk: bfloat16, float16 or float32.")] = "bfloat16",
    dtypes: Annotated[str, typer.Option(help="Of the runs, with commas between them.")] = "bfloat16,float32,float16",
    count: Annotated[int, typer.Option(help="Images, and prompts.")] = 8,
) -> None:
    with tempfile.TemporaryDirectory() as folder:
        model, images = Path(folder) / "model", Path(folder) / "images"
        sizes = save_pipeline(model, gigabytes, getattr(torch, stored))
        draw(images, count, (64, 64))
        for n in range(count):
            (images / f"{n:05}.txt").write_text(f"picture number {n}")
        idle = watch([sys.executable, "-c", IMPORTS])
        on_disk = sum(sizes.values()) * getattr(torch, stored).itemsize
        columns = {"weights": "GB", "anonymous": "GB", "of the weights": "times", "resident": "GB"}
        table = results.table("most memory of the text pass", columns)
        table.add(f"the file, in {stored}", on_disk / 1e9, None, None, None)
        table.add("libraries alone", None, idle.anonymous / 1e9, None, idle.resident / 1e9)
        for dtype in dtypes.split(","):
            in_memory = count_bytes(sizes, getattr(torch, dtype))
            command = [
                sys.executable, "-m", "latentprep", "encode", str(images), "--out", str(Path(folder) / dtype),
                "--model", str(model), "--resolution", "64", "--dtype", dtype, "--max-tokens", "16", "--only",
            ]  # fmt: skip
            watch([*command, "latents"])
            peak = watch([*command, "text"])
            texts = [path for path in Path(folder, dtype).rglob("*.text.safetensors") if has_cond(path)]
            assert texts, "nothing was encoded"
            anonymous = peak.anonymous - idle.anonymous
            numbers = (in_memory / 1e9, anonymous / 1e9, anonymous / in_memory, peak.resident / 1e9)
            table.add(f"`--dtype {dtype}`", *numbers)


def has_cond(path: Path) -> bool:
    """Whether a text file holds cond."""
    data = path.read_bytes()
    return any(name.startswith("cond/") for name in json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")]))


if __name__ == "__main__":
    if not os.path.exists("/proc/self/status"):
        raise SystemExit("text_memory.py: needs /proc, which Linux has")
    run(main)
