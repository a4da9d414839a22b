"""How fast each stage of a run is, and from that alone: what limits a run, and which options would help."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from latentprep.records import Size

WORTH = 1.05  # times as fast: an option must make a whole run so much faster to be named


@dataclass(frozen=True)
class DecodeSpeed:
    """Images from the bytes of their files to the pixels that the VAE sees; the files were read before."""

    images: tuple[tuple[str, int], ...]  # what was decoded, and how many: ("JPEG 1600x1200", 8)
    num_broken: int  # images that were passed over: they cannot be read or used
    per_core: float  # images/s of one thread, by the time that it had the processor
    threads: int
    with_threads: float  # images/s of all threads, by the clock
    num_measured: int  # images that all threads have decoded
    cores: int
    num_rounds: int  # of which the median counts, of each number of threads at least
    with_cores: float | None = None  # images/s with a thread for each core; None: there are no more cores than threads

    @property
    def num_images(self) -> int:
        return sum(count for _, count in self.images)


@dataclass(frozen=True)
class BatchSpeed:
    """The VAE in one number type, with batches of one size."""

    dtype: str
    batch_size: int
    per_second: float  # images
    num_measured: int  # times, of which the median counts
    flops: float  # a second
    peak_share: float | None  # of the most that the device can do, 0 to 1; None: that is not known
    num_retried: int = 0  # images encoded again in float32, since this type overflowed


@dataclass(frozen=True)
class VaeSpeed:
    """The VAE alone, pixels in memory -> posterior in memory."""

    device: str
    device_name: str
    bucket: Size
    size: Size  # that was measured; smaller than the bucket if one image took too long: then it counts by its area
    dtype: str  # of a run
    batch_size: int  # of a run
    batches: tuple[BatchSpeed, ...]
    ends: tuple[str, ...] = ()  # for each number type: why no larger batch was tried

    def own(self) -> BatchSpeed:
        """That of a run as it stands: its own batch size, or the next smaller one that was measured."""
        own = [batch for batch in self.batches if batch.dtype == self.dtype and batch.batch_size <= self.batch_size]
        return max(own, key=lambda batch: batch.batch_size)

    def best(self, dtype: str | None = None) -> BatchSpeed:
        """The fastest batch size of a number type; None: that of a run."""
        return max((b for b in self.batches if b.dtype == (dtype or self.dtype)), key=lambda batch: batch.per_second)


@dataclass(frozen=True)
class TextSpeed:
    """The text encoders, prompts -> cond in memory."""

    device: str
    dtype: str
    per_second: float  # prompts
    num_prompts: int  # encoded at once
    num_measured: int
    tokens: float | None  # of a prompt, on average; None: its encoder does not say
    num_bytes: float  # of a prompt's cond on disk
    cond_dtype: str


@dataclass(frozen=True)
class WriteSpeed:
    """Shards as the cache writes them: packed, hashed, written and fsynced."""

    where: str
    bytes_per_second: float
    shard_bytes: int
    image_bytes: float  # latents of one image
    num_measured: int

    @property
    def per_second(self) -> float:
        """Images/s."""
        return self.bytes_per_second / self.image_bytes


@dataclass(frozen=True)
class ReadSpeed:
    """Batches of a LatentLoader, from files in memory."""

    per_second: float  # samples
    batch_size: int
    num_samples: int  # of an epoch
    num_measured: int  # epochs


@dataclass(frozen=True)
class Rates:
    """What each stage could do alone. The text encoders have a pass of their own behind the VAE's."""

    decode: float  # images/s
    vae: float  # images/s
    write: float  # images/s
    text: float | None = None  # prompts/s; None: no cond
    write_text: float | None = None  # prompts/s

    @property
    def images_per_second(self) -> float:
        """Images/s of the first pass: those of its slowest stage, since all stages work at once."""
        return min(self.decode, self.vae, self.write)

    @property
    def limit(self) -> str:
        """The slowest stage of the first pass: decode, VAE or write."""
        stages = {"VAE": self.vae, "decode": self.decode, "write": self.write}
        return min(stages, key=lambda name: stages[name])

    @property
    def text_seconds(self) -> float:
        """For a prompt, in the second pass."""
        rates = [rate for rate in (self.text, self.write_text) if rate is not None]
        return 1 / min(rates) if rates else 0.0

    @property
    def seconds(self) -> float:
        """Of a whole run, for an image with a prompt of its own."""
        return 1 / self.images_per_second + self.text_seconds

    @property
    def text_share(self) -> float:
        """The second pass's share of a run's time, 0 to 1."""
        return self.text_seconds / self.seconds


@dataclass(frozen=True)
class Advice:
    """What would make a run faster."""

    what: str  # an option with its value, or words
    gain: float | None  # how many times as fast a whole run would be; None: not measured
    why: str


@dataclass(frozen=True)
class Change:
    """Something that could be done otherwise."""

    what: str  # an option with its value, or words
    then: Rates  # what the stages would do
    why: str
    num_measured: int  # times that the numbers were measured on which it rests, at least
    tried: str = ""  # all values that were tried, if there are more

    def gain(self, now: Rates) -> float:
        """How many times as fast a whole run would be."""
        return now.seconds / self.then.seconds


def list_changes(
    now: Rates, decode: DecodeSpeed, vae: VaeSpeed, text: TextSpeed | None, write: WriteSpeed, num_devices: int
) -> Iterator[Change]:
    """All that was tried."""
    if decode.with_cores is not None:
        why = f"decodes {decode.with_cores:.3g} images/s, not {now.decode:.3g}"
        then = replace(now, decode=decode.with_cores)
        yield Change(f"--workers {decode.cores}", then, why, decode.num_rounds)
    own, best = vae.own(), vae.best()
    others = [b.batch_size for b in vae.batches if b.dtype == vae.dtype and b.batch_size != own.batch_size]
    if others:
        why = f"the VAE makes {best.per_second:.3g} images/s, not {now.vae:.3g}"
        tried = f"--batch-size {', '.join(map(str, others))}"
        then = replace(now, vae=best.per_second) if best != own else now
        count = min(own.num_measured, best.num_measured)
        yield Change(f"--batch-size {best.batch_size}", then, why, count, tried)
    for dtype in dict.fromkeys(batch.dtype for batch in vae.batches):
        found = [b for b in vae.batches if b.dtype == dtype and not b.num_retried]
        if dtype != vae.dtype and found:
            fastest = max(found, key=lambda batch: batch.per_second)
            why = f"the VAE makes {fastest.per_second:.3g} images/s in batches of {fastest.batch_size}; other numbers"
            then, count = replace(now, vae=fastest.per_second), min(own.num_measured, fastest.num_measured)
            yield Change(f"--dtype {dtype}", then, why, count)
    if num_devices > 1 and vae.device.startswith("cuda"):
        is_with = text is not None and text.device == vae.device
        texts = now.text * num_devices if now.text is not None and is_with else now.text
        why = f"at most, with {num_devices} devices that decode and write no faster"
        yield Change("--devices all", replace(now, vae=now.vae * num_devices, text=texts), why, own.num_measured)
    if text is not None and now.write_text is not None and text.cond_dtype not in ("int8", "float32"):
        then = replace(now, write_text=now.write_text / 0.53)
        yield Change("--cond-dtype int8", then, "cond takes 53% of the space", write.num_measured)
    faster = replace(now, write=now.write * 4, write_text=now.write_text * 4 if now.write_text is not None else None)
    yield Change("a faster disk for --out", faster, "if it were 4 times as fast", write.num_measured)


@dataclass(frozen=True)
class Advices:
    """What was tried, and what came of it."""

    found: tuple[Advice, ...]  # what would make a whole run at least 5% faster, the best first
    unsure: tuple[str, ...]  # what seems to, but was measured once
    tried: tuple[str, ...]


def advise(
    now: Rates, decode: DecodeSpeed, vae: VaeSpeed, text: TextSpeed | None, write: WriteSpeed, num_devices: int = 0
) -> Advices:
    """What of all that was tried would help; `num_devices` are those of CUDA."""
    changes = list(list_changes(now, decode, vae, text, write, num_devices))
    good = sorted((own for own in changes if own.gain(now) >= WORTH), key=lambda own: -own.gain(now))
    found = [Advice(own.what, own.gain(now), own.why) for own in good if own.num_measured > 1]
    if text is not None and text.device == "cpu" and num_devices and now.text_share >= 1 - 1 / WORTH:
        why = f"the text encoders take {now.text_share:.0%} of a run on the CPU; not measured there"
        found.append(Advice("--text-device cuda", None, why))
    unsure = tuple(own.what for own in good if own.num_measured < 2)
    return Advices(tuple(found), unsure, tuple(own.tried or own.what for own in changes))


def choose_evenly(count: int, most: int, seed: int) -> Sequence[int]:
    """Numbers below `count`, at most `most` of them: one by chance from each of as many parts of like length."""
    import random

    most = min(count, most)
    chance = random.Random(seed)
    return [chance.randrange(n * count // most, (n + 1) * count // most) for n in range(most)]
