"""Rows -> the text file of a shard: every distinct prompt is encoded once, and none whose cond is there already."""

from typing import Any

import numpy as np

from latentprep.cache.ragged import Conds, Ragged, finite_rows, stack_rows
from latentprep.cache.schema import TORCH_DTYPES
from latentprep.cache.seal import check_seal
from latentprep.cache.shard import Groups, Text, TextGroup, open_uncond, uncond_name, write_uncond
from latentprep.cache.storage import Stamp
from latentprep.errors import UnreadableError, UserError
from latentprep.human import shortened
from latentprep.prepare.work.job import Job
from latentprep.prompts import make_prompts
from latentprep.recipe import digest_of
from latentprep.records import Row


def make_text(rows: list[Row], groups: Groups, job: Job, old: Text | None, tombstones: frozenset[int]) -> Text:
    """The text file of a shard: every distinct prompt is encoded once, and none whose cond `old` holds.

    Tombstones have no prompts of their own: they point to the first.
    """
    prompts_of_row = [
        [] if n in tombstones else make_prompts(row.captions, row.key, job.text_options, job.seed)
        for n, row in enumerate(rows)
    ]
    prompts = list(dict.fromkeys(prompt for own in prompts_of_row for prompt in own))
    index = {prompt: n for n, prompt in enumerate(prompts)}
    prompt_of = np.zeros((len(rows), job.text_options.prompts_per_image), np.int32)
    for n, own_prompts in enumerate(prompts_of_row):
        prompt_of[n, : len(own_prompts)] = [index[prompt] for prompt in own_prompts]
    made: list[TextGroup] = []
    start = 0
    for label, count, _ in groups:
        own = rows[start : start + count]
        made.append(
            TextGroup(
                label,
                key=[row.key for row in own],
                caption=[list(row.captions) for row in own],
                prompt_of=prompt_of[start : start + count],
                nbytes=np.array([row.nbytes for row in own], np.int64),
                version=np.array([row.version for row in own], np.int64),
            )
        )
        start += count
    if job.text is None:
        return Text(made, prompts)
    cond, num_tokens, max_tokens = make_cond(prompts, job, old)
    return Text(made, prompts, cond, num_tokens, max_tokens)


def make_cond(prompts: list[str], job: Job, old: Text | None = None) -> tuple[Conds, np.ndarray | None, int | None]:
    """Cond of P prompts, name -> [P,...] in the store dtype; their numbers of tokens, and the encoder's window.

    What `old` holds of them is taken over, if it was made by the same encoder in the same precision.
    """
    sources = [old] if old is not None and is_same_encoder(old.metadata.get("recipe", {}), job.recipe["text"]) else []
    known = {prompt for source in sources for prompt in source.prompt}
    missing = [prompt for prompt in prompts if prompt not in known]
    if missing:
        assert job.text is not None
        encoder, dtype = job.text(), TORCH_DTYPES[job.recipe["text"]["store_dtype"]]
        encoded = encoder.encode(missing)
        cond: Conds = {name: value.to(dtype) for name, value in encoded.items()}
        check_finite(missing, encoded, cond, job.recipe["text"])
        tokens_of = encoder.count_tokens(missing)
        job.counts["prompts"] += len(missing)
        if tokens_of is not None and encoder.max_tokens is not None:
            job.truncated.add(missing, tokens_of, encoder.max_tokens)
        sources.append(Text([], missing, cond, tokens_of, encoder.max_tokens))
    place = {prompt: (source, n) for source in sources for n, prompt in enumerate(source.prompt)}
    chosen = [place[prompt] for prompt in prompts]
    tokens = [source.num_tokens[n] for source, n in chosen if source.num_tokens is not None]
    return (
        {
            name: stack_rows([source.cond[name][n] for source, n in chosen], isinstance(cond, Ragged))
            for name, cond in sources[-1].cond.items()
        },
        np.array(tokens, np.int32) if len(tokens) == len(chosen) else None,
        sources[-1].max_tokens,
    )


# What of a text recipe decides the cond of a prompt; the last three stand there only where they are not the default.
COND_FIELDS = ("text_encoder", "dtype", "store_dtype", "max_tokens", "clip_skip", "emphasis")


def is_same_encoder(before: dict[str, Any], now: dict[str, Any]) -> bool:
    """Whether two text recipes give the same cond for the same prompt."""
    return all(before.get(name) == now.get(name) for name in COND_FIELDS)


def check_finite(prompts: list[str], encoded: Conds, stored: Conds, recipe: dict[str, Any]) -> None:
    """Raise UserError for cond that overflows in the encoder, or in the store dtype: training would not show it."""
    for name, value in stored.items():
        is_finite = finite_rows(value)
        if is_finite.all():
            continue
        n = int(is_finite.int().argmin())
        prompt = shortened(prompts[n])
        if encoded[name][n].isfinite().all():
            raise UserError(
                f"--store-dtype {recipe['store_dtype']}: cannot hold the {name} of {prompt!r}. "
                "Use --store-dtype bfloat16 or float32."
            )
        if recipe["dtype"] == "float32":
            raise UserError(f"--model: its text encoder gives no finite numbers for {prompt!r}, even in float32.")
        raise UserError(
            f"--dtype {recipe['dtype']}: the text encoder overflows for {prompt!r}. Use --dtype bfloat16 or float32."
        )


def uncond_id(recipe: dict[str, Any]) -> str:
    """What the file of the empty prompt's cond is called by, of a text recipe; "" without cond."""
    if recipe["text_encoder"] is None:
        return ""
    return digest_of({name: recipe[name] for name in COND_FIELDS if name in recipe})[:16]


def write_empty_prompt(job: Job) -> Stamp | None:
    """The cond of the empty prompt, which training drops captions to; None if there is no conditioning."""
    if job.text is None:
        return None
    uncond = uncond_id(job.recipe["text"])
    try:
        stamp = check_seal(job.storage, uncond_name(uncond))
        open_uncond(job.storage, uncond)
        return stamp
    except UnreadableError:
        raise
    except (UserError, FileNotFoundError):
        pass  # not there, or damaged: make it anew
    metadata = job.text_metadata()
    metadata["recipe"] = {name: metadata["recipe"][name] for name in COND_FIELDS if name in metadata["recipe"]}
    cond, _, _ = make_cond([""], job)
    return write_uncond(job.storage, uncond, cond, metadata)
