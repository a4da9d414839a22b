"""The models of a run: from folders and files here, from objects in memory in personalized."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from latentprep.cache.manifest import MadeWith
from latentprep.errors import UserError
from latentprep.human import expand_user
from latentprep.options import EncodeOptions
from latentprep.prepare.models.checkpoint import TITLES
from latentprep.prepare.models.doors import TextModel, VaeModel
from latentprep.prepare.models.find import commit_of, find_encoder, find_model
from latentprep.prepare.models.single_file import VaeFile, find_configs, open_vae_file
from latentprep.prepare.models.text_file import TextFile, open_text_file
from latentprep.prepare.models.text_folder import TextFolder, check_refused, family_of, open_text
from latentprep.prepare.models.text_places import Weights
from latentprep.prepare.models.vae_folder import VaeFolder, open_vae


@dataclass(frozen=True)
class Models:
    """The models of a run, none of them opened: what a plan must know of them, and what a worker opens."""

    vae: VaeModel
    text: TextModel | None  # None: no conditioning
    patch: int  # latents, each way, that the denoiser takes as one
    is_upcast: bool  # whether the VAE is to be in float32 where float16 is only the default
    commit: str | None = None  # of a hub model


def open_models(options: EncodeOptions, say: Callable[[str], None]) -> Models:
    """The models that the options name; their configs are read and their weights hashed. Raises UserError."""
    model = find_model(options.model, "--model", say, options.revision, options.needs_text_encoder)
    if model.is_dir():
        check_refused(model, options.needs_text_encoder)
    vae_path = find_model(options.vae, "--vae", say, with_text=False) if options.vae else model
    if options.config and model.is_dir() and vae_path.is_dir():
        raise UserError(f"--config {options.config}: is for a model in a single file, and {options.model} is a folder.")
    configs = find_config(options.config)
    layout = model if model.is_dir() else configs or find_configs(model, "--model")
    if layout is not None and layout not in (model, configs):
        say(f"config   {TITLES[layout.name]}, by the tensors of {options.model}")
    family = family_of(layout) if layout is not None else None
    norm_eps = family.norm_eps if family is not None else None
    vae = open_vae_at(vae_path, "--vae" if options.vae else "--model", configs, lambda: model, norm_eps)
    vae.check_modes(options.tiling, options.compile)
    options.check_tiling(vae.factor)
    text: TextFolder | TextFile | None = None
    if options.needs_text_encoder:
        text = open_text_at(model, layout, options.text_encoders)
    if text is not None:
        text.check()
    if isinstance(text, TextFolder) and text.left_out:
        say(f"text     {text.family.name} without its {', '.join(text.left_out)}")
    if isinstance(text, TextFolder):
        for line in text.describe_given():
            say(line)

    # FLUX.2's latents are patched as they are normalized, and its denoiser takes each of those as one
    patch = max(family.patch if family is not None else 1, vae.normalization.patch)
    is_upcast = vae.force_upcast and family is not None and family.heeds_force_upcast
    return Models(vae, text, patch, is_upcast, commit_of(model))


def open_made_vae(
    made_with: MadeWith, name: str, option: str, beside: str, may_download: bool = True
) -> VaeFolder | VaeFile:
    """The VAE that a cache was made with: `name`, with what its manifest says of it. Raises UserError.

    `beside` is the model whose config a VAE alone goes with.
    """

    def find(model: str) -> Path:
        return find_made(made_with, model, option if model == name else "--model", False, may_download)

    return open_vae_at(find(name), option, find_config(made_with.config), lambda: find(beside))


def open_made_text(made_with: MadeWith, name: str, text_encoders: Sequence[str] = ()) -> TextFolder | TextFile:
    """The text encoders that a cache was made with, as open_made_vae. Raises UserError.

    `text_encoders` are those of --text-encoder; none: those that the cache was made with.
    """
    model = find_made(made_with, name, "--model", with_text=True)
    configs = None if model.is_dir() else find_config(made_with.config) or find_configs(model, "--model")
    text = open_text_at(model, configs, text_encoders or made_with.text_encoders)
    text.check()
    return text


def open_text_at(model: Path, configs: Path | None, text_encoders: Sequence[str]) -> TextFolder | TextFile:
    """The text encoders of a folder, or of a checkpoint with the folder of its configs. Raises UserError."""
    given = [Weights(find_encoder(name)) for name in text_encoders]
    return open_text(model, given=given) if model.is_dir() else open_text_file(model, "--model", configs, given)


def find_made(made_with: MadeWith, name: str, option: str, with_text: bool, may_download: bool = True) -> Path:
    """The folder or file of a model; of the hub at the cache's commit, if it is the cache's own model."""
    commit = made_with.commit if name == made_with.model and not Path(name).exists() else None
    return find_model(name, option, revision=commit, with_text=with_text, may_download=may_download)


def open_vae_at(
    path: Path, option: str, configs: Path | None, beside: Callable[[], Path], norm_eps: float | None = None
) -> VaeFolder | VaeFile:
    """The VAE of a folder or file. A file that is a VAE alone has the config of the model `beside` it."""
    if path.is_dir():
        return open_vae(path, option, norm_eps)
    configs = configs or find_configs(path, option)
    if configs is None and (model := beside()) != path:
        configs = model if model.is_dir() else find_configs(model, "--model")
    return open_vae_file(path, option, configs, norm_eps)


def find_config(name: str | None) -> Path | None:
    """The folder of --config. Raises UserError."""
    if name is None:
        return None
    path = expand_user(name)
    if not path.is_dir():
        raise UserError(
            f"--config {name}: no such folder. Give a diffusers folder; its configs and tokenizers are read."
        )
    return path
