"""Labelled images: where they come from, how they are split, and how they become batches."""

from tersor.data.batches import Batches
from tersor.data.image_sets import Images
from tersor.data.loading import load
from tersor.data.splits import Splits

__all__ = ["Batches", "Images", "Splits", "load"]
