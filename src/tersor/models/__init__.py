"""Networks by name, and the files that hold their weights."""

from tersor.models.registry import build, ignores_num_classes, names
from tersor.models.weights import load_weights, normalization, save_weights
from tersor.models.weights_matching import OtherClasses

__all__ = ["OtherClasses", "build", "ignores_num_classes", "load_weights", "names", "normalization", "save_weights"]
