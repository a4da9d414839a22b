"""The text encoders of a checkpoint in one .safetensors file: Stable Diffusion 1.x, 2.x and XL.

Those of newer checkpoints have the names of transformers, and are taken as from files of their own (split_text).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

from latentprep.errors import UserError
from latentprep.prepare.models.checkpoint import (
    Shapes,
    hash_tensors,
    read_shapes,
    read_tensors,
    recognise,
    text_names,
    text_parts,
)
from latentprep.prepare.models.clip_tokenizer import MERGES, load_tokenizer
from latentprep.prepare.models.families import find_family
from latentprep.prepare.models.files import blame, check_sizes, digest_model, hash_files, read_json
from latentprep.prepare.models.load_text import (
    KINDS,
    check_class,
    check_encoder,
    check_text_config,
    load_encoder,
    make_pipeline,
    text_config,
)
from latentprep.prepare.models.load_tokenizer import check_tokenizer, load_tokenizer_of
from latentprep.prepare.models.single_file import check_loaded, is_built_in, title_of
from latentprep.prepare.models.split_text import list_in_checkpoint
from latentprep.prepare.models.text_folder import TextFiles, TextFolder, open_text, text_numbers
from latentprep.prepare.models.text_places import Weights

if TYPE_CHECKING:
    import torch
    from transformers import CLIPTextModel

PIPELINES_OF_PARTS = {
    ("text_encoder",): "StableDiffusionPipeline",
    ("text_encoder", "text_encoder_2"): "StableDiffusionXLPipeline",
}
TEXT_CLASSES = ("CLIPTextModel", "CLIPTextModelWithProjection")


@dataclass(frozen=True)
class TextFile(TextFiles):
    """The text encoders of a checkpoint, and the folder of their configs and tokenizers."""

    path: Path
    configs: Path

    @property
    def where(self) -> str:
        return str(self.path)

    def load_pipeline(self, dtype: "torch.dtype") -> Any:
        """A pipeline on the CPU of which there is what encode_prompt needs. Raises UserError like VaeFile.load."""
        shapes = read_shapes(self.path, "text encoder")
        parts: dict[str, Any] = {}
        for part, prefix in text_parts(shapes).items():
            parts[part] = load_text_encoder(self.path, shapes, prefix, self.configs / part, dtype)
            parts[self.family.tokenizer_of(part)] = self._load_tokenizer(part)
        return make_pipeline(self.family, parts)

    def load_tokenizers(self) -> dict[str, Any]:
        return {part: self._load_tokenizer(part) for part in text_parts(read_shapes(self.path, "text encoder"))}

    def check(self) -> None:
        """Raise UserError for configs and tokenizers that would fail when they are loaded."""
        for part in text_parts(read_shapes(self.path, "text encoder")):
            config = read_text_config(self.configs / part)
            check_encoder(config["architectures"][0], config, {}, self.configs / part, part)
            self._load_tokenizer(part)

    def _load_tokenizer(self, part: str) -> Any:
        folder = self.configs / self.family.tokenizer_of(part)
        if is_built_in(self.configs):
            return load_tokenizer(folder)
        index = read_json(self.configs / "model_index.json", "--config")
        kind = check_class(index, folder.name, KINDS[TEXT_CLASSES[0]].tokenizers, f"--config {self.configs}")
        check_tokenizer(folder, TEXT_CLASSES[0], kind, "--config")
        config = text_config(TEXT_CLASSES[0], read_text_config(self.configs / part), str(self.configs / part))
        return load_tokenizer_of(folder, kind, config, self.family.padding_side)


def open_text_file(
    path: Path, option: str, configs: Path | None, given: Sequence[Weights] = ()
) -> TextFile | TextFolder:
    """The text encoders of a checkpoint; `configs` is a diffusers folder with tokenizers too. Raises UserError.

    Newer checkpoints have them as transformers has, or in files of their own (`given`): then they are a folder's.
    """
    shapes = read_shapes(path, option)
    kind, parts = recognise(shapes), text_parts(shapes)
    if given and parts:
        raise UserError(
            f"{given[0].option} {given[0]}: is for a model without text encoders, and {option} {path} seems to be "
            f"{kind.what}, which has its own. Leave it out."
        )
    inside = list_in_checkpoint(path, shapes, option)
    if given or inside:
        if configs is None or is_built_in(configs):
            raise UserError(
                f"{option} {path}: seems to be {kind.what}, and the configs and tokenizers of its text encoders are "
                "not built in. Give its diffusers folder, which need not have weights, as --config, or --no-cond."
            )
        return open_text(configs, "--config", [*inside, *given])
    family = find_family(PIPELINES_OF_PARTS.get(tuple(parts)))
    if family is None:
        lacks = f"of its text encoders only {', '.join(parts)}" if parts else "no text encoder"
        where = ", or files of them with --text-encoder" if kind.needs_config else ""
        raise UserError(
            f"{option} {path}: has {lacks}, it seems to be {kind.what}. "
            f"Give a checkpoint or a pipeline folder that has them{where}, or --no-cond."
        )
    if configs is None:
        raise UserError(
            f"{option} {path}: seems to be {kind.what}. Give its diffusers folder as --config, or --no-cond."
        )
    index = read_json(configs / "model_index.json", "--config")
    wanted = tuple(sorted(part for part in index if part.startswith("text_encoder") and index[part] != [None, None]))
    if wanted != tuple(parts):
        raise UserError(
            f"{option} {path}: has {' and '.join(parts)}, but {' and '.join(wanted) or 'none'} in {configs}. "
            "Give the folder that it goes with as --config."
        )
    encoders = {part: read_text_config(configs / part) for part in parts}
    names = {part: text_names(shapes, prefix, encoders[part]) for part, prefix in parts.items()}
    for part, config in encoders.items():
        found, expected = vocabulary_shape(shapes, names[part]), (config["vocab_size"], config["hidden_size"])
        if found != expected:
            raise UserError(
                f"{option} {path}: the token_embedding of its {part} is {list(found)}, but {list(expected)} in the "
                f"config of {title_of(configs)}. Give the folder that it goes with as --config."
            )
    hashes = [[part, hash_tensors(path, names[part])] for part in parts]
    vocabularies = sorted(file for file in configs.glob("tokenizer*/*") if file.is_file())
    if not vocabularies:
        raise UserError(f"--config {configs}: has no tokenizer folder. Complete it, or --no-cond.")
    hashes += hash_files([*vocabularies, MERGES] if is_built_in(configs) else vocabularies)
    classes = {part: config["architectures"][0] for part, config in encoders.items()}
    digest = digest_model([family.pipeline, *encoders.values()], hashes)
    return TextFile(
        digest,
        family,
        **text_numbers(family, classes, encoders, {}, f"--config {configs}"),
        pipeline_settings={},
        path=path,
        configs=configs,
    )


def vocabulary_shape(shapes: Shapes, names: dict[str, str]) -> tuple[int, ...]:
    """(tokens, width) of a text encoder, by its tensors."""
    return next((shapes[name] for short, name in names.items() if short.endswith("token_embedding.weight")), ())


def read_text_config(folder: Path) -> dict[str, Any]:
    """The config of a CLIP text encoder. Raises UserError."""
    config = read_json(folder / "config.json", "--config")
    kind = config.get("architectures")
    if kind not in [[name] for name in TEXT_CLASSES]:
        raise UserError(f"--config {folder}: is {kind}, expected {' or '.join(TEXT_CLASSES)}.")
    check_sizes(config, ("vocab_size", "hidden_size", "num_hidden_layers"), folder, "--config")
    check_text_config(config, folder, "--config")
    return config


def load_text_encoder(path: Path, shapes: Shapes, prefix: str, configs: Path, dtype: "torch.dtype") -> "CLIPTextModel":
    """A text encoder of a checkpoint, on the CPU. Raises UserError like VaeFile.load."""
    from diffusers.loaders.single_file_utils import convert_open_clip_checkpoint

    config = read_text_config(configs)
    tensors = read_tensors(path, text_names(shapes, prefix, config))
    (kind,) = config["architectures"]
    what = f"{path}: the tensors of its {configs.name} are not those of its config"
    with blame(what):
        if prefix.endswith("model."):  # OpenCLIP's names; of the first argument only config.hidden_size is read
            sizes = SimpleNamespace(config=SimpleNamespace(hidden_size=config["hidden_size"]))
            tensors = convert_open_clip_checkpoint(sizes, tensors, prefix="")
    model, info = load_encoder(kind, config, tensors, dtype, str(path), what)
    check_loaded(path, configs.name, info["missing_keys"], info["unexpected_keys"])
    return model
