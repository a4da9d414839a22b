"""Its own logging."""

from datasets.utils import logging  # noqa: F401
