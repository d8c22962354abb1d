"""Labeled images: loading, splitting, augmentation and batches."""

from tersor.data.batches import Batches
from tersor.data.image_sets import Images, Splits
from tersor.data.loading import load

__all__ = ["Batches", "Images", "Splits", "load"]
