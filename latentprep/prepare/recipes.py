"""Options and models -> the recipe of a run, what readers must know, what skips depend on, and what rows cost."""

from importlib.metadata import version

from latentprep import __version__
from latentprep.cache.int8 import nbytes_of
from latentprep.cache.manifest import LatentFacts
from latentprep.cache.schema import TORCH_DTYPES
from latentprep.options import EncodeOptions
from latentprep.prepare.images.load import is_by_torch
from latentprep.prepare.images.pillow import decoder_versions
from latentprep.prepare.models.model_set import Models
from latentprep.prepare.plan.plan import RowBytes
from latentprep.recipe import LatentsRecipe, Recipe, TextRecipe


def make_recipe(options: EncodeOptions, models: Models, dtype: str, text_dtype: str) -> Recipe:
    """Everything that decides the numbers in the cache."""
    vae, text = models.vae, models.text
    is_upcast = models.is_upcast and (options.dtype, dtype) == ("auto", "float16")
    latents = LatentsRecipe.of(
        vae=vae.digest, geometry=options.geometry, images=options.images, flip=options.flip,
        dtype="float32" if is_upcast else dtype, store=options.store if vae.has_std else "mean",
        store_dtype=options.store_dtype, tiling=options.tiling, num_controls=options.num_controls,
        control_size=options.control_size,
    )  # fmt: skip
    return Recipe(
        latents,
        TextRecipe.of(
            text_encoder=text.digest if text else None, settings=text.settings(options.text) if text else {},
            options=options.text, seed=options.seed, dtype=text_dtype, store_dtype=options.store_dtype,
        ),
        {**versions(), **({"resize": "torch"} if is_by_torch(latents) else {})},  # or Pillow
    )  # fmt: skip


def make_facts(models: Models, recipe: Recipe) -> LatentFacts:
    """What a reader must know of the latents."""
    return LatentFacts(models.vae.normalization, models.vae.factor, models.vae.latent_channels, recipe.latents.views)


def skip_conditions(options: EncodeOptions) -> dict[str, str]:
    """What skips depend on, for each of records.CONDITIONS. A skip with "" is never kept: each run tries it again."""
    libraries = versions()
    return {
        "machine": "",
        "decoder": decoder_versions(),
        "limits": f"--max-megapixels {options.max_pixels / 1e6:g}" + " --strict-images" * options.strict_images,
        "encoder": f"torch {libraries['torch']}, diffusers {libraries['diffusers']}",
    }


def estimate_row_bytes(recipe: Recipe, models: Models, options: EncodeOptions) -> RowBytes:
    """What rows will cost on disk, from the configs alone."""
    posterior = 2 if recipe.latents.store == "mean+std" else 1
    itemsize = TORCH_DTYPES[options.store_dtype].itemsize
    num_prompts = options.text.prompts_per_image + bool(recipe.text.image_uncond)
    num_values = num_prompts * models.text.num_values(options.text) if models.text else 0
    control = len(recipe.latents.views) * models.vae.latent_channels * itemsize  # the mean of a control image
    latent = (posterior + options.num_controls) * control + 2 * len(recipe.latents.views)  # + 2: weight
    cond = nbytes_of(num_values, recipe.text.store_dtype) if recipe.text.store_dtype else 0
    return RowBytes(latent, cond + 512, models.vae.factor, control)  # 512: key, captions and prompts


def versions() -> dict[str, str]:
    """Versions of the libraries that the numbers come from."""
    libraries = ("torch", "diffusers", "transformers", "pillow")
    return {"latentprep": __version__, **{name: version(name) for name in libraries}}
