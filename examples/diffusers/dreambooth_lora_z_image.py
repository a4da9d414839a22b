"""train_dreambooth_lora_z_image.py: a LoRA for Z-Image."""

from edits import BEFORE, CLASS_CACHE, DECIDED, DREAMBOOTH, LENGTH, MOVE, PRIOR_LOSS, SET_EPOCH, Edit, Recipe, helpers

LOADER = """
caches = [(args.cache, 1.0)]
if args.class_cache is not None:
    caches.append((args.class_cache, args.prior_loss_weight))
train_dataloader = open_loader(
    args,
    caches,
    {"prompt_embeds": transformer.config.cap_feat_dim},
    drop_last=True,
    latent_sampling_method="deterministic",
    repeats=args.repeats,
)
accelerator.register_for_checkpointing(train_dataloader)
train_dataset = train_dataloader.dataset
"""

VALIDATION = """
if args.validation_prompt is not None:  # its prompt is the only one that no cache holds
    text_encoding_pipeline = ZImagePipeline.from_pretrained(
        args.pretrained_model_name_or_path,
        vae=None,
        transformer=None,
        scheduler=None,
        revision=args.revision,
        variant=args.variant,
        torch_dtype=weight_dtype,
    ).to(accelerator.device)
    validation_embeddings["prompt_embeds"] = compute_text_embeddings(args.validation_prompt, text_encoding_pipeline)
    del text_encoding_pipeline
"""

COND = """
prompt_embeds = [
    embeds[mask] for embeds, mask in zip(batch.cond["prompt_embeds"], batch.cond["prompt_embeds_mask"])
]
"""

RECIPE = Recipe(
    "train_dreambooth_lora_z_image.py",
    "2919c50962",
    (
        *helpers(
            {
                **DREAMBOOTH,
                "use_aspect_ratio_buckets": DECIDED,
                "aspect_ratio_buckets": DECIDED,
                "fsdp_text_encoder": "training needs no text encoder. Leave it out.",
            }
        ),
        Edit("from torchvision import transforms"),
        Edit("from torchvision.transforms import functional as TF"),
        CLASS_CACHE,
        Edit("if input_args is not None:", "args = parse_with_cache(parser, input_args)"),
        Edit("if args.dataset_name is None and args.instance_data_dir is None:"),
        Edit("class DreamBoothDataset(", to="class BucketBatchSampler("),
        Edit("tokenizer = Qwen2Tokenizer.from_pretrained("),
        Edit("vae = AutoencoderKL.from_pretrained(", to="vae_config_scaling_factor = "),
        Edit("text_encoder = Qwen3Model.from_pretrained(", to="text_encoder.requires_grad_(False)"),
        Edit("vae.requires_grad_(False)"),
        Edit("to_kwargs = {", to="vae.to(**to_kwargs)"),
        Edit("text_encoder.to(**to_kwargs)", to="text_encoding_pipeline = ZImagePipeline.from_pretrained("),
        Edit(
            "if args.aspect_ratio_buckets is not None and (not args.use_aspect_ratio_buckets):",
            LOADER,
            to="train_dataloader = torch.utils.data.DataLoader(",
        ),
        Edit(
            "if not train_dataset.custom_instance_prompts:\n    with offload_models(",
            to="if args.with_prior_preservation:\n    with offload_models(",
        ),
        Edit(
            "if args.validation_prompt is not None:\n    with offload_models(",
            VALIDATION,
            to="del text_encoder, tokenizer",
        ),
        Edit("len_train_dataloader_after_sharding = ", LENGTH),
        Edit("transformer.train()", SET_EPOCH, where=BEFORE),
        Edit("prompts = batch['prompts']", MOVE),
        Edit("if train_dataset.custom_instance_prompts:\n    prompt_embeds = ", COND),
        Edit(
            "if args.cache_latents:\n    model_input = ",
            "model_input = batch.latent_sample",
            to="model_input = (model_input - vae_config_shift_factor)",
        ),
        PRIOR_LOSS,
    ),
)
