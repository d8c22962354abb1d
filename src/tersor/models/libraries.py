"""Networks of other libraries by name: `torchvision:NAME`, `timm:NAME`, `hf:CLASS:CONFIG`. Nothing is downloaded."""

from __future__ import annotations

import importlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from torch import nn

from tersor.core.errors import InputError, nearest, unknown

_WITH_AUXILIARY_HEADS = {"googlenet", "inception_v3"}


def is_of_library(name: str) -> bool:
    """Whether `name` begins with the name of a supported library: `timm:resnet18`."""
    return name.partition(":")[0] in _LIBRARIES


def from_library(name: str, num_classes: int | None = None) -> nn.Module:
    """Build a network of another library with random weights.

    Args:
        name: `torchvision:NAME` (`list_models()`), `timm:NAME` (`timm.list_models()`), or `hf:CLASS:CONFIG`, a class of
            transformers and the `config.json` of a model, or the folder of that file.
        num_classes: number of logits; None for the network's own.

    Raises:
        InputError: the library is not installed, it has no such network, or the configuration cannot be used.
    """
    library, _, rest = name.partition(":")
    return _LIBRARIES[library](rest, num_classes)


def from_torchvision(name: str, num_classes: int | None) -> nn.Module:
    """A network of `torchvision.models.list_models()`.

    Raises:
        InputError: there is none of this name.
    """
    from torchvision import models  # imported here because it takes seconds

    known = models.list_models()
    if name not in known:
        raise unknown("torchvision model", name, known)
    options: dict[str, Any] = {} if num_classes is None else {"num_classes": num_classes}
    if name in _WITH_AUXILIARY_HEADS:
        # auxiliary heads return further outputs in training and are unused in eval
        options |= {"aux_logits": False, "init_weights": True}
    if "_backbone" in str(models.get_model_builder(name).__annotations__):
        options["weights_backbone"] = None
    return models.get_model(name, weights=None, **options)


def _from_timm(name: str, num_classes: int | None) -> nn.Module:
    timm = _imported("timm", "timm")
    if not timm.is_model(name):
        raise unknown("timm model", name, timm.list_models())
    options = {} if num_classes is None else {"num_classes": num_classes}
    return timm.create_model(name, pretrained=False, **options)


def _from_transformers(name: str, num_classes: int | None) -> nn.Module:
    transformers = _imported("transformers", "hf")
    kind_name, _, config_path = name.partition(":")
    kind: Any = getattr(transformers, kind_name, None)
    if not isinstance(kind, type) or not issubclass(kind, nn.Module):
        close = nearest(kind_name, dir(transformers))
        hint = f" Did you mean '{close}'?" if close else ""
        raise InputError(f"'hf:{name}': transformers has no network class '{kind_name}'.{hint}")
    path = Path(config_path)
    path = path / "config.json" if path.is_dir() else path
    if not config_path or not path.is_file():
        raise InputError(
            f"'hf:{name}' needs the configuration of the network. Write hf:{kind_name}:FOLDER, where FOLDER holds its "
            "config.json."
        )
    options = {} if num_classes is None else {"num_labels": num_classes}
    configurable: Any = kind
    try:
        return configurable(_configuration(configurable.config_class, path, options))
    except (OSError, ValueError, TypeError, AttributeError) as error:
        reason = (str(error).splitlines() or [repr(error)])[0].rstrip(".")
        raise InputError(f"'hf:{name}': {kind_name} cannot be built from {path}: {reason}.") from error


def _configuration(kind: Any, path: Path, options: dict[str, int]) -> Any:
    return kind.from_dict({**json.loads(path.read_text()), **options})


def _imported(module: str, prefix: str) -> Any:
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise InputError(
            f"'{prefix}:' is for networks of {module}, which is not installed. Run: pip install {module}"
        ) from error


_LIBRARIES: dict[str, Callable[[str, int | None], nn.Module]] = {
    "torchvision": from_torchvision,
    "timm": _from_timm,
    "hf": _from_transformers,
}
