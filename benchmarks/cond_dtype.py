"""What cond in fewer bits costs, `--cond-dtype`: errors against float32, and how fast it is read.

    python benchmarks/cond_dtype.py                  # synthetic cond, encoders with random weights, and reading
    python benchmarks/cond_dtype.py --cache CACHE    # the cond of your own cache, stored in float32 or float16

**No trained encoder was at hand.** Cond that is "like" that of one is synthetic, with outliers as trained encoders
have: channels with values 10 to 50 times the rest (T5), single values of up to 6000 at the first token (language
models; Sun et al., "Massive Activations in Large Language Models", 2024), two channels of about 30 (CLIP ViT-L).
"random" are encoders of the true widths with random weights and fewer layers, which have no outliers. To measure your
own model, encode some images with `--cond-dtype float32`, and give that cache to
`python benchmarks/cond_dtype.py --cache CACHE`.

Errors are root mean squares of the difference to float32, relative to those of the values: of all values, of the worst
token, and of the channels whose values are at most 5 times those of the median channel: an outlier costs its neighbours
more. "1 - cosine" is of the worst token. A float16 scale for 32 values is what `--cond-dtype int8` has. float8_e4m3
ends at 448, and is no choice of `--cond-dtype`.

What is read are prompts of 77 x 4096 values in batches of 8, from warm files on one core: int8 against float16.
"""

import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated

import torch
import typer
from read import write_cache
from results import Results, run
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
    "float8_e4m3, a scale for 32 values": (1 + 2 / 32, in_blocks(32, 448, torch.float16, to_float8)),
    "int8, a scale for each token": (1, int8(0)),
    "int8, a scale for 128": (1 + 2 / 128, int8(128)),
    "int8, a scale for 64": (1 + 2 / 64, int8(64)),
    "int8, a float32 scale for 64": (1 + 4 / 64, int8(64, torch.float32)),
    "`--cond-dtype int8`": (nbytes_of(32, "int8") / 32, lambda values: unpack(*pack(values))),
}


@dataclass(frozen=True)
class Error:
    """Of what is read back. RMS errors are relative to the RMS of the same values."""

    whole: float  # of all values
    token: float  # of the worst token
    ordinary: float  # of the channels that are no outliers
    cosine: float  # 1 - cosine similarity of the worst token


def rms(values: Tensor, *dims: int) -> Tensor:
    return values.double().square().mean(dims or None).sqrt()


def error_of(found: Tensor, exact: Tensor) -> Error:
    """[T,D] finite against [T,D]."""
    typical = exact.abs().median(0).values
    usual = typical <= ORDINARY * typical.median()
    away = 1 - cosine_similarity(found.double(), exact.double(), dim=-1)
    return Error(
        float(rms(found - exact) / rms(exact)),
        float((rms(found - exact, -1) / rms(exact, -1).clamp(min=1e-30)).max()),
        float(rms((found - exact)[:, usual]) / rms(exact[:, usual])),
        float(away.max()),
    )


@dataclass(frozen=True, eq=False)
class Cond:
    """Some cond, and the same as it was made in other ways."""

    name: str
    values: Tensor  # [T,D] float32
    others: Mapping[str, Tensor] = field(default_factory=dict)

    def errors(self) -> dict[str, Error | None]:
        """Of each form, and of each other way. None: the form cannot hold the values."""
        found = {name: form(self.values) for name, (_, form) in FORMS.items()} | dict(self.others)
        return {name: error_of(value, self.values) if value.isfinite().all() else None for name, value in found.items()}


def show_errors(results: Results, conds: list[Cond]) -> None:
    """A table of each kind of error, with a column for each cond."""
    measured = results.table("what is stored", {"tokens": "", "values of each": "", "the largest value": ""})
    for cond in conds:
        measured.add(cond.name, *cond.values.shape, float(cond.values.abs().max()))
    errors = [cond.errors() for cond in conds]
    names = dict.fromkeys(name for found in errors for name in found)
    for title, kind, unit in (
        ("error of all values", "whole", "%"),
        ("error of the worst token", "token", "%"),
        ("error of the channels without outliers", "ordinary", "%"),
        ("1 - cosine", "cosine", ""),
    ):
        table = results.table(title, {"bytes a value": "", **{cond.name: unit for cond in conds}})
        for name in names:
            row = [getattr(found.get(name), kind, None) for found in errors]
            row = [value if value is None or not unit else 100 * value for value in row]
            table.add(name, FORMS[name][0] if name in FORMS else None, *row)


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
def encode_at_random() -> Iterator[Cond]:
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
        halves = {f"the encoder itself in {dtype}".replace("torch.", ""): found[dtype] for dtype in list(found)[1:]}
        yield Cond(f"{name}, random", found[torch.float32], halves)


def read_cond(cache: str) -> Iterator[Cond]:
    """Of a cache each cond that 8 bits would hold: the values of its first prompts."""
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
        yield Cond(name, torch.cat(rows))


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


def measure_reading(results: Results, runs: int, width: int, batch_size: int) -> None:
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
        table = results.table("reading int8, against float16", {"as fast": "times"})
        for title, dtype in (
            ("`stored_cond`, as it is", None),
            ("`batch.cond`, float32", torch.float32),
            ("`batch.cond` after `to(torch.bfloat16)`", torch.bfloat16),
        ):
            pairs = [[epoch(loader, dtype) for loader in loaders] for _ in range(runs + 1)][1:]  # the first warms up
            ratio = statistics.median(half / int8 for half, int8 in pairs)
            table.add(title, ratio)


def main(
    results: Results,
    cache: Annotated[str | None, typer.Option(help="Measure the stored cond of this cache, and nothing else.")] = None,
    runs: Annotated[int, typer.Option(help="Epochs of each kind of cache; the median counts.")] = 9,
    width: Annotated[int, typer.Option(help="Values of a token, for reading.")] = 4096,
    batch_size: Annotated[int, typer.Option(help="Samples of a batch, for reading.")] = 8,
) -> None:
    quiet_libraries()
    if cache is not None:
        show_errors(results, list(read_cond(cache)))
        return
    random = torch.Generator().manual_seed(0)
    synthetic = [
        Cond("like T5", like_t5(random)),
        Cond("like a language model", like_language_model(random)),
        Cond("like CLIP", like_clip(random)),
    ]
    show_errors(results, [*synthetic, *encode_at_random()])
    measure_reading(results, runs, width, batch_size)


if __name__ == "__main__":
    run(main)
