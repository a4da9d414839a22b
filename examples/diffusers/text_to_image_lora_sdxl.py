"""train_text_to_image_lora_sdxl.py: a LoRA for SDXL."""

from edits import AFTER, BEFORE, MOVE, SET_EPOCH, TEXT_ENCODER, TEXT_TO_IMAGE, Edit, Recipe, helpers

NO_ENCODERS = '''
text_encoder_one = text_encoder_two = None  # --train_text_encoder, which would train them, is refused


def validation_vae():
    """For validation alone: the VAE of --pretrained_vae_model_name_or_path. Without it, the model's is taken."""
    path = args.pretrained_vae_model_name_or_path
    if path is None:
        return {}
    vae = AutoencoderKL.from_pretrained(path, revision=args.revision, variant=args.variant, torch_dtype=weight_dtype)
    return {"vae": vae}
'''

LOADER = """
train_dataloader = open_loader(
    args,
    [(args.cache, 1.0)],
    {
        "prompt_embeds": unet.config.cross_attention_dim,
        "pooled_prompt_embeds": unet.config.projection_class_embeddings_input_dim
        - 6 * unet.config.addition_time_embed_dim,
    },
    latent_sampling_method="random",
)
accelerator.register_for_checkpointing(train_dataloader)
train_dataset = train_dataloader.dataset
"""

# The script counts the batches of all processes until they are shared out, and gives the scheduler that number.
ALL_BATCHES = """
if overrode_max_train_steps:
    args.max_train_steps *= accelerator.num_processes
"""

PIPELINE = """
pipeline = StableDiffusionXLPipeline.from_pretrained(
    args.pretrained_model_name_or_path,
    unet=unwrap_model(unet),
    revision=args.revision,
    variant=args.variant,
    torch_dtype=weight_dtype,
    **validation_vae(),
)
"""

COND = """
prompt_embeds = batch.cond["prompt_embeds"]
pooled_prompt_embeds = batch.cond["pooled_prompt_embeds"]
"""

DEBUG_LOSS = """
if args.debug_loss:
    for index in batch.index.tolist():
        accelerator.log({"loss_for_" + train_dataset.key(index): loss}, step=global_step)
"""

RECIPE = Recipe(
    "train_text_to_image_lora_sdxl.py",
    "c56add8081",
    (
        *helpers({**TEXT_TO_IMAGE, "train_text_encoder": TEXT_ENCODER}),
        Edit("import datasets"),
        Edit("from datasets import load_dataset"),
        Edit("from torchvision import transforms"),
        Edit("from torchvision.transforms.functional import crop"),
        Edit("parser.add_argument('--image_interpolation_mode'", 'parser.add_argument("--image_interpolation_mode")'),
        Edit("if input_args is not None:", "args = parse_with_cache(parser, input_args)"),
        Edit("if args.dataset_name is None and args.train_data_dir is None:"),
        Edit("datasets.utils.logging.set_verbosity_warning()"),
        Edit("datasets.utils.logging.set_verbosity_error()"),
        Edit("tokenizer_one = AutoTokenizer", to="text_encoder_cls_two = import_model_class"),
        Edit("text_encoder_one = text_encoder_cls_one", NO_ENCODERS, to="vae = AutoencoderKL.from_pretrained("),
        Edit("vae.requires_grad_(False)", to="text_encoder_two.requires_grad_(False)"),
        Edit(
            "if args.pretrained_vae_model_name_or_path is None:\n    vae.to(",
            to="text_encoder_two.to(accelerator.device",
        ),
        Edit("if args.dataset_name is not None:", LOADER, to="train_dataloader = torch.utils.data.DataLoader("),
        Edit("if args.max_train_steps is None:", ALL_BATCHES, where=AFTER),
        Edit("unet.train()", SET_EPOCH, where=BEFORE),
        Edit(
            "if args.pretrained_vae_model_name_or_path is not None:\n    pixel_values",
            f"{MOVE}\nmodel_input = batch.latent_sample",
            to="if args.pretrained_vae_model_name_or_path is None:\n    model_input",
        ),
        Edit("def compute_time_ids(", "add_time_ids = batch.time_ids.to(weight_dtype)", to="add_time_ids = torch.cat("),
        Edit("prompt_embeds, pooled_prompt_embeds = encode_prompt(", COND),
        Edit("if args.debug_loss and 'filenames' in batch:", DEBUG_LOSS),
        Edit(
            "pipeline = StableDiffusionXLPipeline.from_pretrained("
            "args.pretrained_model_name_or_path, vae=vae, text_encoder=",
            PIPELINE,
        ),
        Edit("if args.mixed_precision == 'fp16':\n    vae.to("),
        Edit(
            "pipeline = StableDiffusionXLPipeline.from_pretrained("
            "args.pretrained_model_name_or_path, vae=vae, revision=",
            PIPELINE.replace("    unet=unwrap_model(unet),\n", ""),
        ),
    ),
)
