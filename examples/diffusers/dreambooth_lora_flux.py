"""train_dreambooth_lora_flux.py: a LoRA for FLUX.1."""

from edits import (
    BEFORE,
    CLASS_CACHE,
    DREAMBOOTH,
    LENGTH,
    MOVE,
    PRIOR_LOSS,
    SET_EPOCH,
    TEXT_ENCODER,
    Edit,
    Recipe,
    helpers,
)

LOADER = """
caches = [(args.cache, 1.0)]
if args.class_cache is not None:
    caches.append((args.class_cache, args.prior_loss_weight))
train_dataloader = open_loader(
    args,
    caches,
    {
        "prompt_embeds": transformer.config.joint_attention_dim,
        "pooled_prompt_embeds": transformer.config.pooled_projection_dim,
        "text_ids": 3,
    },
    latent_sampling_method="random",
    repeats=args.repeats,
)
accelerator.register_for_checkpointing(train_dataloader)
train_dataset = train_dataloader.dataset
"""

COND = f"""
{MOVE}
prompt_embeds = batch.cond["prompt_embeds"]
pooled_prompt_embeds = batch.cond["pooled_prompt_embeds"]
text_ids = batch.cond["text_ids"][0]
"""

PIPELINE = """
pipeline = FluxPipeline.from_pretrained(
    args.pretrained_model_name_or_path,
    transformer=unwrap_model(transformer),
    revision=args.revision,
    variant=args.variant,
    torch_dtype=weight_dtype,
)
"""

RECIPE = Recipe(
    "train_dreambooth_lora_flux.py",
    "c56add8081",
    (
        *helpers({**DREAMBOOTH, "train_text_encoder": TEXT_ENCODER}),
        Edit("from torchvision import transforms"),
        Edit("from torchvision.transforms.functional import crop"),
        CLASS_CACHE,
        Edit("if input_args is not None:", "args = parse_with_cache(parser, input_args)"),
        Edit("if args.dataset_name is None and args.instance_data_dir is None:"),
        Edit("class DreamBoothDataset(", to="def collate_fn("),
        Edit("tokenizer_one = CLIPTokenizer", to="text_encoder_cls_two = import_model_class"),
        Edit(
            "noise_scheduler_copy = copy.deepcopy(",
            "noise_scheduler_copy = copy.deepcopy(noise_scheduler)\n"
            "text_encoder_one = None  # --train_text_encoder, which would train it, is refused",
            to="vae = AutoencoderKL.from_pretrained(",
        ),
        Edit("vae.requires_grad_(False)", to="text_encoder_two.requires_grad_(False)"),
        Edit("vae.to(accelerator.device"),
        Edit("text_encoder_one.to(accelerator.device"),
        Edit("text_encoder_two.to(accelerator.device"),
        Edit("train_dataset = DreamBoothDataset(", LOADER, to="if args.cache_latents:\n    latents_cache = []"),
        Edit("len_train_dataloader_after_sharding = ", LENGTH),
        Edit("transformer.train()", SET_EPOCH, where=BEFORE),
        Edit("prompts = batch['prompts']", COND, to="if train_dataset.custom_instance_prompts:"),
        Edit(
            "if args.cache_latents:\n    model_input = ",
            "model_input = batch.latent_sample",
            to="model_input = (model_input - vae_config_shift_factor)",
        ),
        # whatever it is: _unpack_latents divides by what it was multiplied with
        Edit("vae_scale_factor = 2 ** ", "vae_scale_factor = 8"),
        PRIOR_LOSS,
        Edit("if not args.train_text_encoder:\n    text_encoder_one, text_encoder_two = load_text_encoders("),
        Edit("pipeline = FluxPipeline.from_pretrained(args.pretrained_model_name_or_path, vae=vae", PIPELINE),
        Edit("if not args.train_text_encoder:\n    del text_encoder_one"),
    ),
)
