"""Stands for torchvision in the scripts as they were before they are patched: their few transforms, with Pillow."""
