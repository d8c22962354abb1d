"""The registry of methods is this folder: `soft_targets` is `soft_targets.py`. Only the requested file is imported."""

from __future__ import annotations

import importlib
import pkgutil
from typing import TYPE_CHECKING, cast

from pydantic.dataclasses import is_pydantic_dataclass

from tersor.core.errors import InputError, nearest, unknown
from tersor.core.import_path import import_module, module_and_name

if TYPE_CHECKING:  # it imports torch, which is not needed to list the names
    from tersor.training.method import Method

_ALSO_CALLED = {
    "soft_targets": ("kd", "kl", "hinton", "distillation", "knowledge_distillation", "distil", "distill"),
    "attention_transfer": ("at", "attention"),
    "factor_transfer": ("ft",),
    "fitnet": ("fitnets", "hint", "hints"),
    "similarity_preserving": ("sp",),
    "dkd": ("decoupled_kd", "decoupled"),
    "crd": ("contrastive", "contrastive_distillation"),
    "ptq": ("quantize", "quantization", "quantise", "post_training", "post_training_quantization", "static", "int8"),
    "qat": ("fakequant", "fake_quant", "fake_quantize", "quantization_aware_training"),
    "lsq": ("learned_step_size", "lsq+", "lsqplus"),
    "adaround": ("adaptive_rounding", "learned_rounding"),
    "brecq": ("qdrop", "block_reconstruction"),
    "mixed_precision": ("hawq", "mixed", "mixed_bits", "bit_allocation"),
    "weight_pruning": ("prune", "pruning", "magnitude", "unstructured", "sparsify", "gmp", "agp", "taylor", "fpgm"),
    "dpf": ("dynamic_pruning", "dynamic_pruning_with_feedback", "feedback"),
    "dcil": ("refined_gradient", "collective_intelligence"),
    "rigl": ("rigged_lottery", "set", "dynamic_sparse_training", "sparse_to_sparse"),
    "group_lasso": ("sparse_training", "group_sparsity", "group_norm", "growing_regularization"),
    "channel_pruning": ("filter_pruning", "structured", "structured_pruning", "slimming"),
}
"""File -> other common names of the method. They lead to a hint, because a method has one name in a recipe."""

MADE_BY = (
    "A compression method is a class that defines `attach` and is decorated with "
    "@tersor.core.plain_values.plain_dataclass(frozen=True, config=tersor.training.method.PLAIN_VALUES)."
)


def names() -> tuple[str, ...]:
    """The names of all methods: the files of this folder, sorted."""
    return tuple(sorted(file.name for file in pkgutil.iter_modules(__path__) if not file.name.startswith("_")))


def get(name: str) -> type[Method]:
    """The class of a method.

    Args:
        name: a file of this folder, such as `soft_targets`, or a class of your own as `package.module:Class` or
            `folder/file.py:Class`.

    Raises:
        InputError: the method does not exist, or the class is not a method.
        ImportError: an import in the file fails.
    """
    if ":" in name:
        return _of_the_user(name)
    if name not in names():
        raise _unknown(name)
    module = importlib.import_module(f"{__name__}.{name}")
    found = [value for value in vars(module).values() if is_method(value) and value.__module__ == module.__name__]
    assert len(found) == 1, f"{name}.py holds {len(found)} methods, not one: {found}"
    return found[0]


def name_of(method: Method) -> str:
    """The name of a method in a recipe: the inverse of `get`."""
    cls = type(method)
    folder, _, file = cls.__module__.rpartition(".")
    return file if folder == __name__ else f"{cls.__module__}:{cls.__qualname__}"


def is_method(value: object) -> bool:
    """Whether it is a class that a recipe can contain."""
    return isinstance(value, type) and is_pydantic_dataclass(value) and hasattr(value, "attach")


def _of_the_user(name: str) -> type[Method]:
    path, attribute = module_and_name(name)
    if not all(part.isidentifier() for part in (*path.split("."), attribute)):
        raise InputError(
            f"'{name}' is not the name of a method. Write package.module:Class, folder/file.py:Class, or one of "
            f"{', '.join(names())}."
        )
    module = import_module(path, name)
    found = getattr(module, attribute, None)
    if not is_method(found):
        possible = [key for key, value in vars(module).items() if is_method(value)]
        similar = nearest(attribute, possible)
        hint = f" Did you mean '{similar}'?" if similar else ""
        known = ", ".join(possible) or "none"
        raise InputError(f"method '{name}': '{attribute}' is not a method.{hint} Possible: {known}. {MADE_BY}")
    return cast("type[Method]", found)


def _unknown(given: str) -> InputError:
    options = names()
    said = given.lower().replace("-", "_").replace(" ", "_")
    for name in options:
        if said == name or said in _ALSO_CALLED.get(name, ()):
            return InputError(f"unknown method '{given}'. Did you mean '{name}'? Possible: {', '.join(options)}.")
    if "." in given:
        given_class = ":".join(given.rsplit(".", 1))
        return InputError(f"unknown method '{given}'. Name a method of your own as '{given_class}', with a colon.")
    error = unknown("method", given, options, "the class of a method")
    return error if given.endswith(".py") else InputError(f"{error} Name a method of your own as package.module:Class.")
