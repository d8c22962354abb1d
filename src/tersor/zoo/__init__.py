"""Networks by name, and the files that hold their weights."""

from tersor.zoo.mismatch import OtherClasses
from tersor.zoo.models import build, names
from tersor.zoo.weights import load_weights, normalization, save_weights

__all__ = ["OtherClasses", "build", "load_weights", "names", "normalization", "save_weights"]
