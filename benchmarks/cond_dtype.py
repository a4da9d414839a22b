"""What cond in fewer bits costs, --cond-dtype: errors against float32, and how fast it is read.

    python benchmarks/cond_dtype.py                  # synthetic cond, encoders with random weights, and reading
    python benchmarks/cond_dtype.py --cache CACHE    # the cond of your own cache, stored in float32 or float16

No trained encoder comes with this repository. Synthetic cond has outliers as trained ones have: channels with values
10 to 50 times the rest (T5), single values of thousands at the first token (language models; Sun et al., "Massive
Activations in Large Language Models", 2024), two channels of about 30 (CLIP ViT-L). What your own model gives, --cache
tells.
"""

import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from types import MappingProxyType
from typing import Annotated

import torch
import typer
from read import write_cache
from torch import Tensor
from torch.nn.functional import cosine_similarity, pad

from latentprep import LatentDataset, LatentLoader
from latentprep.cache.cond import open_uncond, write_uncond
from latentprep.cache.int8 import dtype_of, nbytes_of, pack, store_as, unpack
from latentprep.cache.manifest import Uncond, commit, open_manifest
from latentprep.cache.ragged import values_of
from latentprep.cache.storage import Storage
from latentprep.cache.text import write_text
from latentprep.prepare.devices import quiet_libraries

ORDINARY = 5  # times the median channel: what is above is an outlier
PROMPTS = 64  # of a cache are measured

Form = Callable[[Tensor], Tensor]  # values [T,D] float32 -> what a reader gets back


def in_blocks(block: int, largest: float, dtype: torch.dtype, round_them: Form) -> Form:
    """Values that are rounded after each block of them is scaled to `largest`; 0: each token."""

    def there_and_back(values: Tensor) -> Tensor:
        size = block or values.shape[-1]
        blocks = pad(values, (0, -values.shape[-1] % size)).unflatten(-1, (-1, size))
        scale = (blocks.abs().amax(-1, keepdim=True) / largest).to(dtype).float()
        kept = round_them((blocks / scale.clamp(min=1e-30)).clamp(-largest, largest)) * scale
        return kept.flatten(-2)[..., : values.shape[-1]]

    return there_and_back


def to_float8(values: Tensor) -> Tensor:
    return values.to(torch.float8_e4m3fn).float()


def int8(block: int, dtype: torch.dtype = torch.float16) -> Form:
    return in_blocks(block, 127, dtype, torch.round)


# name -> bytes a value without the scale of a token, and what a reader gets back
FORMS: dict[str, tuple[float, Form]] = {
    "float16": (2, lambda values: values.half().float()),
    "bfloat16": (2, lambda values: values.bfloat16().float()),
    "float8_e4m3": (1, to_float8),
    "float8_e4m3, a scale for 32": (1 + 2 / 32, in_blocks(32, 448, torch.float16, to_float8)),
    "int8, a scale for a token": (1, int8(0)),
    "int8, a scale for 128": (1 + 2 / 128, int8(128)),
    "int8, a scale for 64": (1 + 2 / 64, int8(64)),
    "int8, a float32 scale for 64": (1 + 4 / 64, int8(64, torch.float32)),
    "--cond-dtype int8 (a scale for 32)": (nbytes_of(32, "int8") / 32, lambda values: unpack(*pack(values))),
}


@dataclass(frozen=True)
class Error:
    """Of what is read back. RMS errors are relative to the RMS of the same values."""

    whole: float  # of all values
    token: float  # of the worst token
    cosine: float  # 1 - cosine similarity of a token, on average
    worst_cosine: float
    ordinary: float  # of the channels that are no outliers


def rms(values: Tensor, *dims: int) -> Tensor:
    return values.double().square().mean(dims or None).sqrt()


def error_of(found: Tensor, exact: Tensor) -> Error:
    """[T,D] against [T,D]."""
    typical = exact.abs().median(0).values
    usual = typical <= ORDINARY * typical.median()
    away = 1 - cosine_similarity(found.double(), exact.double(), dim=-1)
    return Error(
        float(rms(found - exact) / rms(exact)),
        float((rms(found - exact, -1) / rms(exact, -1).clamp(min=1e-30)).max()),
        float(away.mean()),
        float(away.max()),
        float(rms((found - exact)[:, usual]) / rms(exact[:, usual])),
    )


def print_errors(title: str, values: Tensor, others: Mapping[str, Tensor] = MappingProxyType({})) -> None:
    """The table of some cond [T,D] float32; `others` are rows that were made in another way."""
    tokens, width = values.shape
    print(f"\n{title}: {tokens:,} tokens of {width:,} values, the largest {float(values.abs().max()):.4g}")
    print(f"{'':36} {'bytes':>6} {'error':>9} {'worst token':>12} {'1-cos':>9} {'worst':>9} {'ordinary':>9}")
    rows = [(name, f"{nbytes:6.3f}", form(values)) for name, (nbytes, form) in FORMS.items()]
    for name, nbytes, found in (*rows, *((name, "", found) for name, found in others.items())):
        if not found.isfinite().all():
            print(f"{name:36} {nbytes:6} cannot hold them")
            continue
        e = error_of(found, values)
        shown = f"{e.whole:9.2%} {e.token:12.2%} {e.cosine:9.1e} {e.worst_cosine:9.1e} {e.ordinary:9.2%}"
        print(f"{name:36} {nbytes:6} {shown}")


def spread_channels(tokens: int, width: int, random: torch.Generator) -> tuple[Tensor, Tensor]:
    """[T,D] normal numbers of which channels differ in size, and the channels in random order."""
    size = (0.4 * torch.randn(width, generator=random)).exp()
    return torch.randn(tokens, width, generator=random) * size, torch.randperm(width, generator=random)


def like_t5(random: torch.Generator, tokens: int = 512, width: int = 4096) -> Tensor:
    """Six channels 10 to 50 times the rest, at every token."""
    values, channels = spread_channels(tokens, width, random)
    values[:, channels[:6]] = torch.linspace(10, 50, 6) * (1 + 0.2 * torch.randn(tokens, 6, generator=random))
    return values / 10


def like_language_model(random: torch.Generator, tokens: int = 256, width: int = 2560) -> Tensor:
    """Eight channels 10 to 40 times the rest; at the first token -6000 and 900, at one other 400."""
    values, channels = spread_channels(tokens, width, random)
    values[:, channels[:8]] = torch.linspace(10, 40, 8) * (1 + 0.3 * torch.randn(tokens, 8, generator=random))
    values[0, channels[0]], values[0, channels[1]], values[5, channels[0]] = -6000, 900, 400
    return values


def like_clip(random: torch.Generator, tokens: int = 77, width: int = 768) -> Tensor:
    """Two channels of about -28 and 33."""
    values, channels = spread_channels(tokens, width, random)
    values[:, channels[:2]] = torch.tensor([-28.0, 33.0]) * (1 + 0.02 * torch.randn(tokens, 2, generator=random))
    return values


@torch.inference_mode()
def encode_at_random() -> Iterator[tuple[str, Tensor, dict[str, Tensor]]]:
    """What encoders of the true widths, with random weights and fewer layers, make of random tokens.

    In float32, and for comparison in half precision.
    """
    from transformers import CLIPTextConfig, CLIPTextModel, Qwen3Config, Qwen3Model, T5Config, T5EncoderModel

    torch.manual_seed(0)
    tokens = torch.randint(0, 1000, (1, 77))
    clip = CLIPTextConfig(vocab_size=1000, hidden_size=768, intermediate_size=3072, num_attention_heads=12)
    t5 = T5Config(vocab_size=1000, d_model=4096, d_kv=64, d_ff=2048, num_layers=2, num_heads=16)
    qwen = Qwen3Config(
        vocab_size=1000, hidden_size=2560, intermediate_size=2048, num_hidden_layers=3, num_attention_heads=8,
        num_key_value_heads=2, head_dim=64,
    )  # fmt: skip
    for name, model in (
        ("CLIP", CLIPTextModel(clip)),
        ("T5", T5EncoderModel(t5)),
        ("Qwen3", Qwen3Model(qwen)),
    ):
        found = {
            dtype: model.eval().to(dtype)(tokens).last_hidden_state[0].float()
            for dtype in (torch.float32, torch.float16, torch.bfloat16)  # in this order: weights are rounded for good
        }
        halves = {f"the encoder in {dtype}".replace("torch.", ""): found[dtype] for dtype in list(found)[1:]}
        yield f"{name}, random weights", found[torch.float32], halves


def read_cond(cache: str) -> Iterator[tuple[str, Tensor]]:
    """Of a cache each cond that 8 bits would hold: name and values [T,D] float32 of its first prompts."""
    storage = Storage(cache)
    found: dict[str, list[Tensor]] = {}
    for shard in open_manifest(storage).shards:
        text = shard.open_text(storage)
        for name, cond in text.cond.items():
            if cond.dtype == torch.int8:
                raise SystemExit(f"{cache}: {name} is in 8 bits already. Give a cache in float32 or float16.")
            if dtype_of(name, cond, "int8") == torch.int8:
                rows = found.setdefault(name, [])
                rows += [cond[n].float().flatten(0, -2) for n in range(min(len(cond), PROMPTS - len(rows)))]
    if not found:
        raise SystemExit(f"{cache}: holds no cond that --cond-dtype int8 would change.")
    for name, rows in found.items():
        yield f"{name} of {len(rows)} prompts, stored in {cond_dtype(storage)}", torch.cat(rows)


def cond_dtype(storage: Storage) -> str | None:
    return open_manifest(storage).recipe.text.store_dtype


def pack_cache(folder: Path) -> None:
    """Give a cache of read.write_cache its cond in 8 bits."""
    storage = Storage(folder)
    manifest = open_manifest(storage)
    shards = []
    for shard in manifest.shards:
        text = shard.open_text(storage)
        exact = {name: values_of(value).float() for name, value in text.cond.items()}
        stamp = write_text(storage, shard.id, "p", replace(text, cond=store_as(exact, "int8")))
        shards.append(shard.with_text("p", stamp))
    assert manifest.uncond is not None
    empty = {name: values_of(value).float() for name, value in open_uncond(storage, manifest.uncond.id)[1].items()}
    uncond = Uncond("1" * 16, write_uncond(storage, "1" * 16, store_as(empty, "int8"), {}))
    recipe = replace(manifest.recipe, text=replace(manifest.recipe.text, store_dtype="int8"))
    commit(storage, replace(manifest, recipe=recipe, shards=shards, uncond=uncond), [])


def print_reading(runs: int, width: int, batch_size: int) -> None:
    """How fast cond in 8 bits is read, against float16, by the time of one core: epochs of both in turn, files warm."""

    def epoch(loader: LatentLoader, dtype: torch.dtype | None) -> float:
        begun = time.process_time()
        for batch in loader:
            if dtype is not None:
                batch.to(dtype).cond  # noqa: B018 (made when it is asked for)
        return time.process_time() - begun

    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as root:
        halves, packed = Path(root) / "float16", Path(root) / "int8"
        for folder in (halves, packed):
            write_cache(folder, 4, 50, (4, 8, 8), width)
        pack_cache(packed)
        kinds = [LatentDataset(folder, latent_sampling_method="deterministic") for folder in (halves, packed)]
        loaders = [LatentLoader(data, batch_size) for data in kinds]
        print(
            f"\nreading 200 prompts of 77 x {width} in batches of {batch_size}, warm, on one core: int8 against float16"
        )
        for title, dtype in (
            ("as stored (stored_cond)", None),
            ("batch.cond, float32", torch.float32),
            ("batch.cond after to(torch.bfloat16)", torch.bfloat16),
        ):
            pairs = [[epoch(loader, dtype) for loader in loaders] for _ in range(runs + 1)][1:]  # the first warms up
            ratio = statistics.median(half / int8 for half, int8 in pairs)
            print(f"{title:36} {ratio:.2f} times as fast")


def main(
    cache: Annotated[str | None, typer.Option(help="Measure the stored cond of this cache, and nothing else.")] = None,
    runs: Annotated[int, typer.Option(help="Epochs of each kind of cache; the median counts.")] = 9,
    width: Annotated[int, typer.Option(help="Values of a token, for reading.")] = 4096,
    batch_size: Annotated[int, typer.Option(help="Samples of a batch, for reading.")] = 8,
) -> None:
    quiet_libraries()
    print("error: RMS of the difference to float32, relative to the RMS of the values: of all, and of the worst token;")
    print("1-cos: 1 - cosine similarity of a token: on average, and of the worst; ordinary: error of the channels")
    print(f"whose values are at most {ORDINARY} times those of the median channel")
    if cache is not None:
        for title, values in read_cond(cache):
            print_errors(title, values)
        return
    random = torch.Generator().manual_seed(0)
    print_errors("synthetic, outliers as of T5", like_t5(random))
    print_errors("synthetic, outliers as of a language model", like_language_model(random))
    print_errors("synthetic, outliers as of CLIP ViT-L", like_clip(random))
    for title, values, halves in encode_at_random():
        print_errors(title, values, halves)
    print_reading(runs, width, batch_size)


if __name__ == "__main__":
    typer.run(main)
