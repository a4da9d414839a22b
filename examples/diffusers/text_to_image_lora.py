"""train_text_to_image_lora.py: a LoRA for Stable Diffusion 1 and 2."""

from edits import BEFORE, LENGTH, MOVE, SET_EPOCH, TEXT_TO_IMAGE, Edit, Recipe, helpers

LOADER = """
train_dataloader = open_loader(
    args,
    [(args.cache, 1.0)],
    {"prompt_embeds": unet.config.cross_attention_dim},
    latent_sampling_method="random",
)
accelerator.register_for_checkpointing(train_dataloader)
train_dataset = train_dataloader.dataset
"""

RECIPE = Recipe(
    "train_text_to_image_lora.py",
    "c56add8081",
    (
        *helpers(TEXT_TO_IMAGE),
        Edit("import datasets"),
        Edit("from datasets import load_dataset"),
        Edit("from torchvision import transforms"),
        Edit("parser.add_argument('--image_interpolation_mode'", 'parser.add_argument("--image_interpolation_mode")'),
        Edit("args = parser.parse_args()", "args = parse_with_cache(parser)"),
        Edit("if args.dataset_name is None and args.train_data_dir is None:"),
        Edit("datasets.utils.logging.set_verbosity_warning()"),
        Edit("datasets.utils.logging.set_verbosity_error()"),
        Edit("tokenizer = CLIPTokenizer.from_pretrained(", to="vae = AutoencoderKL.from_pretrained("),
        Edit("vae.requires_grad_(False)"),
        Edit("text_encoder.requires_grad_(False)"),
        Edit("vae.to(accelerator.device"),
        Edit("text_encoder.to(accelerator.device"),
        Edit("if args.dataset_name is not None:", to="train_transforms = transforms.Compose("),
        Edit("def preprocess_train(", LOADER, to="train_dataloader = torch.utils.data.DataLoader("),
        Edit("len_train_dataloader_after_sharding = ", LENGTH),
        Edit("unet.train()", SET_EPOCH, where=BEFORE),
        Edit(
            "latents = vae.encode(",
            f"{MOVE}\nlatents = batch.latent_sample",
            to="latents = latents * vae.config.scaling_factor",
        ),
        Edit("encoder_hidden_states = text_encoder(", 'encoder_hidden_states = batch.cond["prompt_embeds"]'),
    ),
)
