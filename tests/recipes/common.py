"""What the small training scripts beside this share: options, and steps with checkpoints."""

import argparse
import os

import torch
from diffusers.optimization import get_scheduler

TEXTS = ("pretrained_model_name_or_path", "revision", "variant", "dataset_name", "caption_column", "output_dir",
         "resume_from_checkpoint", "validation_prompt", "dataset_config_name", "cache_dir", "image_column",
         "max_train_samples", "max_sequence_length", "class_prompt", "num_class_images", "sample_batch_size",
         "prior_generation_precision", "fsdp_text_encoder")  # fmt: skip
FLAGS = ("center_crop", "random_flip", "with_prior_preservation", "train_text_encoder", "cache_latents", "debug_loss")
NUMBERS = {"seed": 0, "resolution": 512, "train_batch_size": 1, "num_train_epochs": 1, "checkpointing_steps": 500,
           "gradient_accumulation_steps": 1, "dataloader_num_workers": 0, "repeats": 1,
           "lr_warmup_steps": 0}  # fmt: skip


def make_parser(*texts):
    parser = argparse.ArgumentParser()
    for name in (*TEXTS, *texts):
        parser.add_argument(f"--{name}")
    for name in FLAGS:
        parser.add_argument(f"--{name}", action="store_true")
    for name, default in NUMBERS.items():
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--max_train_steps", type=int)
    parser.add_argument("--learning_rate", type=float, default=1e-4)
    parser.add_argument("--prior_loss_weight", type=float, default=1.0)
    return parser


def stack(examples, name):
    return torch.stack([example[name] for example in examples])


def tell(name, value):
    """A line for the test, written at once: several processes may write."""
    os.write(1, f"{name} {value}\n".encode())


class Steps:
    """Steps of the optimizer, logged, with a checkpoint every few of them."""

    def __init__(self, args, accelerator, model, num_scheduler_steps):
        self.args, self.accelerator, self.model, self.done = args, accelerator, model, 0
        self.optimizer = torch.optim.AdamW(model.parameters(), lr=args.learning_rate)
        self.schedule = get_scheduler(
            "linear", self.optimizer, num_warmup_steps=0, num_training_steps=num_scheduler_steps
        )

    def resume(self):
        """Takes up the newest checkpoint, if it is asked for."""
        if self.args.resume_from_checkpoint == "latest":
            found = [name for name in os.listdir(self.args.output_dir) if name.startswith("checkpoint")]
            self.done = max(int(name.split("-")[1]) for name in found)
            self.accelerator.load_state(os.path.join(self.args.output_dir, f"checkpoint-{self.done}"))

    def step(self, loss, latents):
        self.accelerator.backward(loss)
        self.optimizer.step()
        self.schedule.step()
        self.optimizer.zero_grad()
        tell("SEEN", latents.double().sum((1, 2, 3)).tolist())
        if not self.accelerator.sync_gradients:
            return
        self.done += 1
        self.accelerator.log({"loss": loss.item()}, step=self.done)
        if self.accelerator.is_main_process and self.done % self.args.checkpointing_steps == 0:
            self.accelerator.save_state(os.path.join(self.args.output_dir, f"checkpoint-{self.done}"))

    def are_over(self):
        return self.done >= self.args.max_train_steps

    def end(self):
        tell("RATE", self.schedule.get_last_lr()[0])
        self.accelerator.end_training()
