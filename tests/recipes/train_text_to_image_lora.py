"""A small training of our own, with the places that the recipe for diffusers' script of this name looks for."""

import math
import os

import datasets
import diffusers
import torch
import torch.nn.functional as F
from accelerate import Accelerator
from accelerate.logging import get_logger
from accelerate.utils import set_seed
from datasets import load_dataset
from diffusers import AutoencoderKL, DDPMScheduler, UNet2DConditionModel
from torchvision import transforms
from transformers import CLIPTextModel, CLIPTokenizer

from tests.recipes.common import Steps, make_parser, stack

logger = get_logger(__name__)


def parse_args():
    parser = make_parser("train_data_dir")
    parser.add_argument(
        "--image_interpolation_mode", default="lanczos", choices=[mode.value for mode in transforms.InterpolationMode]
    )
    args = parser.parse_args()
    if args.dataset_name is None and args.train_data_dir is None:
        raise ValueError("no images")
    return args


def main():
    args = parse_args()
    accelerator = Accelerator(gradient_accumulation_steps=args.gradient_accumulation_steps)
    if accelerator.is_local_main_process:
        datasets.utils.logging.set_verbosity_warning()
        diffusers.utils.logging.set_verbosity_warning()
    else:
        datasets.utils.logging.set_verbosity_error()
        diffusers.utils.logging.set_verbosity_error()
    set_seed(args.seed)
    model = args.pretrained_model_name_or_path
    noise_scheduler = DDPMScheduler.from_pretrained(model, subfolder="scheduler")
    tokenizer = CLIPTokenizer.from_pretrained(model, subfolder="tokenizer")
    text_encoder = CLIPTextModel.from_pretrained(model, subfolder="text_encoder")
    vae = AutoencoderKL.from_pretrained(model, subfolder="vae")
    unet = UNet2DConditionModel.from_pretrained(model, subfolder="unet")
    vae.requires_grad_(False)
    text_encoder.requires_grad_(False)
    weight_dtype = torch.float32
    unet.to(accelerator.device, dtype=weight_dtype)
    vae.to(accelerator.device, dtype=weight_dtype)
    text_encoder.to(accelerator.device, dtype=weight_dtype)

    if args.dataset_name is not None:
        dataset = load_dataset(args.dataset_name)
    else:
        dataset = load_dataset("imagefolder", data_files={"train": os.path.join(args.train_data_dir, "**")})
    interpolation = transforms.InterpolationMode(args.image_interpolation_mode)
    train_transforms = transforms.Compose(
        [
            transforms.Resize(args.resolution, interpolation=interpolation),
            transforms.CenterCrop(args.resolution),
            transforms.ToTensor(),
            transforms.Normalize([0.5], [0.5]),
        ]
    )

    def unwrap_model(model):
        return accelerator.unwrap_model(model)

    def preprocess_train(examples):
        examples["pixel_values"] = [train_transforms(image.convert("RGB")) for image in examples["image"]]
        tokens = tokenizer(examples["text"], padding="max_length", truncation=True, return_tensors="pt")
        examples["input_ids"] = tokens.input_ids
        return examples

    train_dataset = dataset["train"].with_transform(preprocess_train)

    def collate_fn(examples):
        return {name: stack(examples, name) for name in ("pixel_values", "input_ids")}

    train_dataloader = torch.utils.data.DataLoader(
        train_dataset, shuffle=True, collate_fn=collate_fn, batch_size=args.train_batch_size
    )

    if args.max_train_steps is None:
        len_train_dataloader_after_sharding = math.ceil(len(train_dataloader) / accelerator.num_processes)
        num_update_steps_per_epoch = math.ceil(len_train_dataloader_after_sharding / args.gradient_accumulation_steps)
        num_steps = args.num_train_epochs * num_update_steps_per_epoch * accelerator.num_processes
    else:
        num_steps = args.max_train_steps * accelerator.num_processes
    steps = Steps(args, accelerator, unet, num_steps)
    unet, steps.optimizer, train_dataloader, steps.schedule = accelerator.prepare(
        unet, steps.optimizer, train_dataloader, steps.schedule
    )
    num_update_steps_per_epoch = math.ceil(len(train_dataloader) / args.gradient_accumulation_steps)
    if args.max_train_steps is None:
        args.max_train_steps = args.num_train_epochs * num_update_steps_per_epoch
    args.num_train_epochs = math.ceil(args.max_train_steps / num_update_steps_per_epoch)
    logger.info(f"{len(train_dataset)} images, {type(unwrap_model(unet))}")
    steps.resume()
    for epoch in range(steps.done // num_update_steps_per_epoch, args.num_train_epochs):
        unet.train()
        logger.info(f"epoch {epoch}")
        for batch in train_dataloader:
            with accelerator.accumulate(unet):
                latents = vae.encode(batch["pixel_values"].to(weight_dtype)).latent_dist.sample()
                latents = latents * vae.config.scaling_factor
                noise = torch.randn_like(latents)
                timesteps = torch.randint(0, noise_scheduler.config.num_train_timesteps, (len(latents),))
                noisy = noise_scheduler.add_noise(latents, noise, timesteps)
                encoder_hidden_states = text_encoder(batch["input_ids"])[0]
                predicted = unet(noisy, timesteps, encoder_hidden_states).sample
                steps.step(F.mse_loss(predicted, noise), latents)
            if steps.are_over():
                break
    steps.end()


if __name__ == "__main__":
    main()
