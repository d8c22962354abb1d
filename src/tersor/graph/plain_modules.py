"""Whether a module computes exactly what torch's class computes.

Folding, fusing, equalizing, correcting and exporting replace the call of a module by a formula. `isinstance` does not
prove that the formula holds: a subclass may define its own `forward` (timm's `BatchNormAct2d` contains an activation),
and an instance may have hooks.
"""

from __future__ import annotations

from torch import nn
from torch.nn.utils import parametrize

_METHODS = ("forward", "__call__", "_conv_forward")
_TENSORS = ("weight", "bias", "running_mean", "running_var")
_HOOKS = ("_forward_hooks", "_forward_pre_hooks")


def is_plain(module: nn.Module) -> bool:
    """Whether a call of `module` runs torch's own forward method without hooks."""
    return has_plain_forward(module) and not is_hooked(module)


def is_hooked(module: nn.Module) -> bool:
    """Whether the module has forward hooks, which may change its inputs or outputs."""
    return any(vars(module)[hooks] for hooks in _HOOKS)


def has_plain_forward(module: nn.Module) -> bool:
    """Whether the forward method is that of torch's class, and its tensors are plain attributes.

    Parametrizations (`torch.nn.utils.parametrize`) are allowed: they change a tensor, not what is computed with it.
    """
    kind = type(module).__mro__[1] if parametrize.is_parametrized(module) else type(module)
    known = _torch_class(kind)
    between = kind.__mro__[: kind.__mro__.index(known)]
    return (
        all(getattr(kind, name, None) is getattr(known, name, None) for name in _METHODS)
        and not any(name in vars(each) for name in _TENSORS for each in between)
        and not any(name in vars(module) for name in _METHODS)
    )


def _torch_class(kind: type[nn.Module]) -> type:
    return next(each for each in kind.__mro__ if each.__module__.startswith("torch.nn."))
