"""What options of other programs are here: kohya's sd-scripts and diffusers' training scripts."""

ENCODED = "leave it out, latentprep encode does nothing else."

# an option of theirs, without its dashes -> what to do
HINTS = {
    # which images, and where the cache goes
    "train_data_dir": "give the folder without an option: latentprep encode FOLDER.",
    "instance_data_dir": "give the folder without an option: latentprep encode FOLDER.",
    "image_dir": "give the folder without an option: latentprep encode FOLDER.",
    "dataset_name": "images are read from a folder or tars: latentprep encode FOLDER.",
    "dataset_config": "give the file without an option: latentprep encode dataset.toml.",
    "reg_data_dir": 'it is a set of a .toml file, with repeats = "auto": latentprep encode sets.toml.',
    "class_data_dir": 'it is a set of a .toml file, with repeats = "auto": latentprep encode sets.toml.',
    "in_json": "it is captions_file of a set in a .toml file: latentprep encode sets.toml.",
    "recursive": "subfolders are always searched.",
    "output_dir": "it is --out here.",
    "dataset_repeats": "it is repeats = N of a set in a .toml file, or LatentDataset(cache, repeats=N) in training.",
    "num_repeats": "it is repeats = N of a set in a .toml file, or LatentDataset(cache, repeats=N) in training.",
    # models
    "pretrained_model_name_or_path": "it is --model here.",
    "pretrained_vae_model_name_or_path": "it is --vae here.",
    "clip_l": "it is --text-encoder here.",
    "clip_g": "it is --text-encoder here.",
    "t5xxl": "it is --text-encoder here.",
    "qwen3": "it is --text-encoder here.",
    "ae": "it is --vae here.",
    "v2": "leave it out, the model tells what it is.",
    "v_parameterization": "it belongs to training, and changes no latents.",
    "sdxl": "leave it out, the model tells what it is.",
    "mixed_precision": "the number type of the models is --dtype here; that of training belongs to training.",
    "no_half_vae": "it is --dtype float32 here; SDXL's VAE is in float32 without it.",
    "lowram": "leave it out; --batch-size 1 and --tiling take less memory.",
    # buckets and crops
    "enable_bucket": "leave it out, buckets are the default; one size for all is --width with --height.",
    "bucket_no_upscale": "it is --no-upscale here.",
    "min_bucket_reso": "it is --min-side here.",
    "max_bucket_reso": "it is --max-side here.",
    "bucket_reso_steps": "it is --bucket-step here.",
    "flip_aug": "it is --flip here.",
    "random_flip": "it is --flip here.",
    "random_crop": "it is --crop random here; --crops K stores K of them.",
    "center_crop": "leave it out, --crop center is the default.",
    "face_crop_aug_range": "there is --crop focus, where there is most to see.",
    "color_aug": "there is none: latents are encoded once, and colours cannot be changed behind that.",
    "alpha_mask": "leave it out, --weights alpha is the default.",
    "masked_loss": "masks are --weights DIR here; LatentDataset(cache, use_weight=True) gives them to training.",
    "conditioning_data_dir": "control images are --control DIR here, masks --weights DIR.",
    # captions
    "caption_extention": "it is --caption-extension here.",
    "instance_prompt": 'words that begin each caption are --trigger "sks dog" here.',
    "shuffle_caption": "it is --shuffle-tags here, with --prompts-per-image K, or LatentDataset(shuffle_tags=True).",
    "keep_tokens": "it is --keep-tags here.",
    "caption_tag_dropout_rate": "it is --tag-drop-out here.",
    "caption_dropout_rate": "it is caption_dropout of a set in a .toml file, or of LatentDataset in training.",
    "caption_dropout_every_n_epochs": "it belongs to training, which may take data.uncond() for an epoch.",
    "enable_wildcard": "it is --wildcards here.",
    "weighted_captions": "it is --emphasis here.",
    "max_token_length": "it is --max-tokens here.",
    # what is cached
    "train_batch_size": "it belongs to training: LatentLoader(data, batch_size=N). The VAE's is --batch-size.",
    "vae_batch_size": "it is --batch-size here.",
    "max_data_loader_n_workers": "threads that decode images are --workers here.",
    "cache_latents": ENCODED,
    "cache_latents_to_disk": ENCODED,
    "cache_text_encoder_outputs": f"{ENCODED[:-1]}, and --no-cond leaves the prompts out.",
    "cache_text_encoder_outputs_to_disk": f"{ENCODED[:-1]}, and --no-cond leaves the prompts out.",
    "skip_cache_check": "leave it out; --check-content compares all.",
}  # fmt: skip

# beginnings of options that only training has
TRAINING = (
    "adam_", "block_", "clip_grad", "deepspeed", "ddp_", "ema", "epoch", "fp8_base", "full_bf16", "full_fp16",
    "fused_", "gradient_", "guidance_", "huber_", "initial_", "ip_noise", "learning_rate", "log_", "logging_dir",
    "loss_", "lr_", "max_grad", "max_timestep", "max_train_", "mem_eff_attn", "min_snr", "min_timestep", "multires_",
    "network_", "noise_offset", "num_train_epochs", "optimizer_", "output_name", "persistent_data", "prior_loss",
    "rank_dropout", "resume", "sample_", "save_", "scale_", "sdpa", "stop_text_encoder", "text_encoder_lr", "train_",
    "torch_compile", "unet_lr", "use_8bit_adam", "validation_", "wandb_", "xformers", "zero_terminal_snr",
)  # fmt: skip


def hint_for(option: str) -> str | None:
    """What to do in place of an option of theirs, such as --train_data_dir; None: it is not known."""
    name = option.lstrip("-").replace("-", "_")
    if name in HINTS:
        return HINTS[name]
    if name.startswith(TRAINING):
        return "it belongs to training, and changes nothing in a cache."
    return None
