"""A small training of our own, with the places that the recipe for diffusers' script of this name looks for."""

import math

import diffusers
import torch
from accelerate import Accelerator
from accelerate.logging import get_logger
from accelerate.utils import set_seed
from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, ZImagePipeline, ZImageTransformer2DModel
from diffusers.training_utils import offload_models
from torch.utils.data.sampler import BatchSampler, SequentialSampler
from torchvision import transforms
from torchvision.transforms import functional as TF
from transformers import Qwen2Tokenizer, Qwen3Model

from tests.recipes.common import Steps, make_parser, stack

logger = get_logger(__name__)


def parse_args(input_args=None):
    parser = make_parser("instance_data_dir", "instance_prompt", "aspect_ratio_buckets", "use_aspect_ratio_buckets")
    parser.add_argument("--class_data_dir")
    if input_args is not None:  # noqa: SIM108
        args = parser.parse_args(input_args)
    else:
        args = parser.parse_args()
    if args.dataset_name is None and args.instance_data_dir is None:
        raise ValueError("no images")
    return args


class DreamBoothDataset(torch.utils.data.Dataset):
    def __init__(self, name, size):
        from datasets import load_dataset

        rows = load_dataset(name)["train"]
        self.custom_instance_prompts = rows["text"]
        self.pixel_values = []
        for image in rows["image"]:
            scale = size / min(image.size)
            sides = [round(image.height * scale), round(image.width * scale)]
            resized = TF.resize(image.convert("RGB"), sides, interpolation=transforms.InterpolationMode.BILINEAR)
            cut = TF.crop(resized, (sides[0] - size) // 2, (sides[1] - size) // 2, size, size)
            self.pixel_values.append(TF.normalize(TF.to_tensor(cut), [0.5], [0.5]))

    def __len__(self):
        return len(self.pixel_values)

    def __getitem__(self, index):
        return {"pixel_values": self.pixel_values[index], "prompt": self.custom_instance_prompts[index]}


def collate_fn(examples):
    return {"pixel_values": stack(examples, "pixel_values"), "prompts": [example["prompt"] for example in examples]}


class BucketBatchSampler(BatchSampler):
    def __init__(self, dataset: DreamBoothDataset, batch_size: int):
        super().__init__(SequentialSampler(dataset), batch_size, drop_last=True)


def main(args):
    accelerator = Accelerator(gradient_accumulation_steps=args.gradient_accumulation_steps)
    set_seed(args.seed)
    diffusers.utils.logging.set_verbosity_warning()
    args.offload, model = False, args.pretrained_model_name_or_path
    tokenizer = Qwen2Tokenizer.from_pretrained(model, subfolder="tokenizer")
    weight_dtype = torch.float32
    scheduler = FlowMatchEulerDiscreteScheduler.from_pretrained(model, subfolder="scheduler")
    vae = AutoencoderKL.from_pretrained(model, subfolder="vae")
    vae_config_shift_factor = vae.config.shift_factor
    vae_config_scaling_factor = vae.config.scaling_factor
    transformer = ZImageTransformer2DModel.from_pretrained(model, subfolder="transformer", torch_dtype=weight_dtype)
    text_encoder = Qwen3Model.from_pretrained(model, subfolder="text_encoder")
    text_encoder.requires_grad_(False)
    transformer.requires_grad_(True)
    vae.requires_grad_(False)
    to_kwargs = {"device": accelerator.device, "dtype": weight_dtype}
    vae.to(**to_kwargs)
    transformer.to(accelerator.device)
    text_encoder.to(**to_kwargs)
    text_encoding_pipeline = ZImagePipeline.from_pretrained(
        model, vae=None, transformer=None, tokenizer=tokenizer, text_encoder=text_encoder, scheduler=None
    )

    def unwrap_model(model):
        return accelerator.unwrap_model(model)

    if args.aspect_ratio_buckets is not None and not args.use_aspect_ratio_buckets:
        raise ValueError("buckets are not used")
    train_dataset = DreamBoothDataset(args.dataset_name, args.resolution)
    batch_sampler = BucketBatchSampler(train_dataset, batch_size=args.train_batch_size)
    train_dataloader = torch.utils.data.DataLoader(train_dataset, batch_sampler=batch_sampler, collate_fn=collate_fn)

    def compute_text_embeddings(prompt, text_encoding_pipeline):
        with torch.no_grad():
            return text_encoding_pipeline.encode_prompt(prompt, do_classifier_free_guidance=False)[0]

    if not train_dataset.custom_instance_prompts:
        with offload_models(text_encoding_pipeline, device=accelerator.device, offload=args.offload):
            instance_prompt_hidden_states = compute_text_embeddings(args.instance_prompt, text_encoding_pipeline)
    if args.with_prior_preservation:
        with offload_models(text_encoding_pipeline, device=accelerator.device, offload=args.offload):
            logger.info("class images")
    validation_embeddings = {}
    if args.validation_prompt is not None:
        with offload_models(text_encoding_pipeline, device=accelerator.device, offload=args.offload):
            validation_embeddings["prompt_embeds"] = compute_text_embeddings(
                args.validation_prompt, text_encoding_pipeline
            )
    prompt_embeds_cache, latents_cache = [], []
    for batch in train_dataloader:
        prompt_embeds_cache.append(compute_text_embeddings(batch["prompts"], text_encoding_pipeline))
        if args.cache_latents:
            latents_cache.append(vae.encode(batch["pixel_values"]).latent_dist)
    del text_encoder, tokenizer

    if args.max_train_steps is None:
        len_train_dataloader_after_sharding = math.ceil(len(train_dataloader) / accelerator.num_processes)
        num_update_steps_per_epoch = math.ceil(len_train_dataloader_after_sharding / args.gradient_accumulation_steps)
        num_steps = args.num_train_epochs * num_update_steps_per_epoch * accelerator.num_processes
    else:
        num_steps = args.max_train_steps * accelerator.num_processes
    steps = Steps(args, accelerator, transformer, num_steps)
    transformer, steps.optimizer, train_dataloader, steps.schedule = accelerator.prepare(
        transformer, steps.optimizer, train_dataloader, steps.schedule
    )
    num_update_steps_per_epoch = math.ceil(len(train_dataloader) / args.gradient_accumulation_steps)
    if args.max_train_steps is None:
        args.max_train_steps = args.num_train_epochs * num_update_steps_per_epoch
    args.num_train_epochs = math.ceil(args.max_train_steps / num_update_steps_per_epoch)
    steps.resume()
    for epoch in range(steps.done // num_update_steps_per_epoch, args.num_train_epochs):
        transformer.train()
        logger.info(f"epoch {epoch} of {len(train_dataset)} images, {type(unwrap_model(transformer))}")
        for step, batch in enumerate(train_dataloader):
            prompts = batch["prompts"]
            with accelerator.accumulate(transformer):
                if train_dataset.custom_instance_prompts:
                    prompt_embeds = prompt_embeds_cache[step]
                else:
                    prompt_embeds = instance_prompt_hidden_states * len(prompts)
                if args.cache_latents:
                    model_input = latents_cache[step].mode()
                else:
                    model_input = vae.encode(batch["pixel_values"]).latent_dist.mode()
                model_input = (model_input - vae_config_shift_factor) * vae_config_scaling_factor
                noise = torch.randn_like(model_input)
                indices = (torch.rand(len(model_input)) * scheduler.config.num_train_timesteps).long()
                sigmas = scheduler.sigmas[indices].view(-1, 1, 1, 1)
                noisy = ((1 - sigmas) * model_input + sigmas * noise).unsqueeze(2)
                predicted = transformer(
                    list(noisy.unbind(0)), 1 - scheduler.timesteps[indices] / 1000, prompt_embeds, return_dict=False
                )[0]
                loss = (-torch.stack(predicted).squeeze(2) - (noise - model_input)) ** 2
                loss = loss.mean()
                steps.step(loss, model_input)
            if steps.are_over():
                break
    print("VALIDATION", [len(embeds) for embeds in validation_embeddings.get("prompt_embeds", [])])
    steps.end()


if __name__ == "__main__":
    args = parse_args()
    main(args)
