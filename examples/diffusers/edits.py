"""What a recipe is made of: edits of a script, and the lines that all recipes put into it."""

from collections.abc import Mapping
from dataclasses import dataclass

INSTEAD, BEFORE, AFTER = "instead", "before", "after"


@dataclass(frozen=True)
class Edit:
    """Lines that are put instead of statements of a script, or beside one; without lines the statements are cut.

    at: how the statement begins, as ast.unparse writes it (in one line, with single quotes). Just one may begin so.
    to: how the last statement begins, if several in a row are meant. It stands in the same block.
    """

    at: str
    put: str = ""
    to: str = ""
    where: str = INSTEAD


@dataclass(frozen=True)
class Recipe:
    """What is done to one script of diffusers."""

    script: str
    commit: str  # of diffusers: the last one that had changed the script when the recipe was written
    edits: tuple[Edit, ...]


DECIDED = "the cache has decided this. Leave it out, or encode again."
IMAGES = "images and captions come from --cache. Leave it out."
TEXT_ENCODER = "a cache holds what the text encoders have made, so they cannot be trained. Leave it out."
CLASSES = "class images come from a cache of their own: encode them too, and give --class_cache DIR instead."

# Options of the scripts that do nothing with a cache. A recipe names those of its own script.
DATASET = {"dataset_name": IMAGES, "dataset_config_name": IMAGES, "cache_dir": IMAGES, "image_column": IMAGES,
           "caption_column": IMAGES}  # fmt: skip
GEOMETRY = {"resolution": DECIDED, "center_crop": DECIDED}
TEXT_TO_IMAGE = {
    **DATASET, "train_data_dir": IMAGES, **GEOMETRY, "image_interpolation_mode": DECIDED,
    "max_train_samples": "a cache is trained on as a whole. Leave it out, or encode fewer images.",
}  # fmt: skip
DREAMBOOTH = {
    **DATASET, "instance_data_dir": IMAGES, **GEOMETRY, "max_sequence_length": DECIDED,
    "cache_latents": "--cache holds them already. Leave it out.",
    "with_prior_preservation": CLASSES, "class_data_dir": CLASSES, "class_prompt": CLASSES,
    "num_class_images": CLASSES, "sample_batch_size": CLASSES, "prior_generation_precision": CLASSES,
}  # fmt: skip

HELPERS = '''
# Options that do nothing here, and what to do instead.
REFUSED = {refused}


def parse_with_cache(parser, input_args=None):
    """The arguments, with --cache. Ends the program with one line if an option is given that REFUSED names."""
    parser.add_argument("--cache", required=True, help="A latent cache, made by latentprep encode.")
    parser.set_defaults(**dict.fromkeys(REFUSED))
    args = parser.parse_args(input_args)
    for name, reason in REFUSED.items():
        if getattr(args, name) is not None:
            parser.exit(2, f"Error: --{{name}}: {{reason}}\\n")
    return args


def open_loader(args, caches, widths, drop_last=False, **options):
    """Batches of one cache, or of several in equal parts. Ends the program with one line if one does not fit.

    caches: pairs of a folder and how much its loss counts. widths: name of cond -> its width, as the model takes it.
    """
    seed = args.seed or 0
    try:
        parts = []
        for folder, weight in caches:
            flip_p = 0.5 if args.random_flip else 0.0
            data = LatentDataset(folder, sample_weight=weight, flip_p=flip_p, seed=seed, **options)
            found = {{name: value.shape[-1] for name, value in (data[0].cond or {{}}).items()}}
            if any(found.get(name) != width for name, width in widths.items()):
                raise UserError(
                    f"cache {{printable(folder)}}: got cond of the widths {{found or 'none'}}, expected {{widths}} for "
                    "this model. Encode with the model that you train."
                )
            parts.append(data)
        data = parts[0] if len(parts) == 1 else LatentMix(parts, proportions=[1] * len(parts))
        workers = args.dataloader_num_workers
        return LatentLoader(data, args.train_batch_size, seed=seed, drop_last=drop_last, num_workers=workers)
    except UserError as error:
        raise SystemExit(f"Error: {{error}}") from None
'''

IMPORTS = """
from latentprep import LatentDataset, LatentLoader, LatentMix
from latentprep.errors import UserError
from latentprep.human import printable
"""

# The loader shares out the epoch itself, so its length is that of this process already.
LENGTH = "len_train_dataloader_after_sharding = len(train_dataloader)"
# A checkpoint of an epoch's last step has nothing left of that epoch: then this begins the next one.
SET_EPOCH = "train_dataloader.set_epoch(epoch)"
MOVE = "batch = batch.to(accelerator.device, weight_dtype, non_blocking=True)"


def helpers(refused: Mapping[str, str]) -> tuple[Edit, Edit]:
    """The edits that import latentprep and define parse_with_cache and open_loader."""
    lines = "".join(f"    {name!r}: {reason!r},\n" for name, reason in refused.items()).replace("'", '"')
    return (
        Edit("import diffusers", IMPORTS, where=AFTER),
        Edit("logger = get_logger(", HELPERS.format(refused="{\n" + lines + "}"), where=AFTER),
    )


CLASS_CACHE = Edit(
    "parser.add_argument('--class_data_dir'",
    'parser.add_argument("--class_cache", help="Of class images, for prior preservation: another latent cache.")',
    where=BEFORE,
)
# Each batch is from one cache, and all of its samples count the same.
PRIOR_LOSS = Edit("loss = loss.mean()", "loss = loss * batch.sample_weight.mean()", where=AFTER)
