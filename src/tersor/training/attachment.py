"""Attachment: a method attached to a network, with the hooks that the training loop calls; and a chain of several."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from typing import Any

from torch import Tensor, nn
from torch.optim import Optimizer

from tersor.core.errors import CompressionWarning, InputError
from tersor.core.user_code import user_code
from tersor.evaluation.results import StageRecord
from tersor.graph.modes import training_notes
from tersor.training.objective import LossTerm


class Handle:
    """Removes the hooks of `bind`. Parametrizations stay: `graph.parametrization.strip` makes a copy without them."""

    def __init__(self, removers: Sequence[Callable[[], None]]) -> None:
        self._removers = list(removers)

    def remove(self) -> None:
        """Remove all hooks; a second call does nothing."""
        while self._removers:
            self._removers.pop()()


class Attachment:
    """A method attached to a model. The base class does nothing; a method overrides what it needs.

    Attributes:
        model: the network to train from now on: the same object, or its captured graph with the same Parameters.
        terms: losses that the method adds.
        layers: pairs of paths, of the student and of the teacher, whose outputs the terms need.
        label_weight: weight of the task's loss on the labels.
        notes: messages of `attach` and `begin` for the user, one line each.
        holds_shapes: whether it depends on the shapes of the weights at the time of `attach`.
        scheduled_steps: steps after which its schedule is complete; `finish` warns if fewer were done. 0: there is no
            schedule, and `bind` need not be called.
        completed: steps that were done, counted by `bind` and `after_step`.
    """

    holds_shapes = False
    scheduled_steps = 0
    completed = 0

    def __init__(
        self,
        model: nn.Module,
        terms: Sequence[LossTerm] = (),
        label_weight: float = 1.0,
        notes: Sequence[str] = (),
        layers: Sequence[tuple[str, str]] = (),
    ) -> None:
        self.model = model
        self.terms, self.layers = tuple(terms), tuple(layers)
        self.label_weight = label_weight
        self.notes = tuple(notes)
        if layers:
            pairs = ", ".join(f"{student} (student) with {teacher} (teacher)" for student, teacher in layers)
            self.notes += (f"{', '.join(term.name for term in terms)} compares {pairs}.",)

    @property
    def metrics(self) -> dict[str, Any]:
        """Plain values for the stage's entry in `numbers.json`; empty by default."""
        return {}

    @property
    def changes(self) -> Sequence[tuple[int, float]]:
        """Changes to the network that the optimizer did not make, such as new masks; empty by default.

        For each, the number of steps before it and the share of the weights that changed. `fit` recomputes the running
        statistics that such a change made stale.
        """
        return ()

    @property
    def extra_state(self) -> dict[str, Tensor]:
        """Learned tensors that are stored beside the network at the end of the stage; empty by default."""
        return {}

    def state_dict(self) -> dict[str, Tensor]:
        """Training state besides the buffers of model and terms; snapshots contain it, so that a run can be resumed."""
        return {}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Restore what `state_dict` returned."""

    def begin(self) -> None:
        """Do the slow work before the first step, such as calibration. Does nothing by default."""

    def before_step(self, step: int, optimizer: Optimizer) -> None:
        """Called after the gradients are computed and before the weights are updated."""

    def after_step(self, step: int, optimizer: Optimizer) -> None:
        """Called after the weights are updated. Counts the steps."""
        self.completed = step + 1

    def count_steps(self, steps: int) -> None:
        """Set the number of steps that were done."""
        self.completed = steps

    def finish(self) -> None:
        """Called after the last step, for example to freeze masks and ranges.

        Warns:
            CompressionWarning: fewer than `scheduled_steps` were done.
        """
        if self.completed >= self.scheduled_steps:
            return
        remedy = (
            "Pass AttachContext(steps=...) with the number of optimizer steps that follow"
            if self.completed
            else "In your own loop, call bind(optimizer) before the first step"
        )
        schedule = f", but its schedule has {self.scheduled_steps}" if self.scheduled_steps > 1 else ""
        warnings.warn(
            f"{type(self).__name__}: finish was called after {self.completed} optimizer steps{schedule}. {remedy}.",
            CompressionWarning,
            stacklevel=2,
        )

    def bind(self, optimizer: Optimizer, start: int | None = None) -> Handle:
        """Call `before_step` and `after_step` around every step of `optimizer`, in a user's own loop.

        Args:
            optimizer: has the parameters of `self.model`.
            start: number of the first step, for a resumed run. Without it, a `CompressionWarning` is issued if the
                captured network behaves differently in training, for example without stochastic depth.

        Raises:
            InputError: the optimizer has no parameter of the network or of a loss term.
        """
        self._check_parameters(optimizer)
        for note in training_notes(self.model) if start is None else ():
            warnings.warn(note, CompressionWarning, stacklevel=2)
        step = start or 0
        self.count_steps(step)

        def before(optimizer: Optimizer, _args: Any, _kwargs: Any) -> None:
            self.before_step(step, optimizer)

        def after(optimizer: Optimizer, _args: Any, _kwargs: Any) -> None:
            nonlocal step
            self.after_step(step, optimizer)
            step += 1
            self.count_steps(step)  # a class that overrides `after_step` may not do it

        hooks = optimizer.register_step_pre_hook(before), optimizer.register_step_post_hook(after)
        return Handle([hook.remove for hook in hooks])

    def _check_parameters(self, optimizer: Optimizer) -> None:
        """Refuse an optimizer that trains another network."""
        own = {id(parameter) for module in (self.model, *self.terms) for parameter in module.parameters()}
        if own and not any(id(parameter) in own for group in optimizer.param_groups for parameter in group["params"]):
            raise InputError(
                f"bind: the {type(optimizer).__name__} has no parameter of the attached network. Create it with "
                "attached.model.parameters(), after attach."
            )


def without_loss(model: nn.Module, label_weight: float) -> Attachment:
    """An attachment without a loss term, for a method with loss weight 0. The label weight is 1, or 0 if it was 0."""
    return Attachment(model, label_weight=1.0 if label_weight else 0.0)


class Chain(Attachment):
    """Several attachments as one: all terms, the product of the label weights, hooks in the order of the methods.

    An exception in a hook of a user's class becomes an InputError with the file and the line.

    Args:
        model: the network to train.
        parts: the attachments.
        methods: the name of the method of each part, for error messages.
    """

    def __init__(self, model: nn.Module, parts: Sequence[Attachment], methods: Sequence[str]) -> None:
        label_weight = 1.0
        for part in parts:
            label_weight *= part.label_weight
        terms = [term for part in parts for term in part.terms]
        super().__init__(model, terms, label_weight, layers=[pair for part in parts for pair in part.layers])
        self.parts = tuple(parts)
        self._methods = tuple(methods)
        self.notes = self._all_notes()

    def _all_notes(self) -> tuple[str, ...]:
        return tuple(note for part in self.parts for note in part.notes)

    def _in_turn(self, hook: str) -> Iterator[tuple[Attachment, AbstractContextManager[None]]]:
        """Every part, with the context in which its hook is called."""
        for part, method in zip(self.parts, self._methods, strict=True):
            yield part, user_code(f"method '{method}': {hook}", part)

    @contextmanager
    def explained(self, work: str) -> Generator[None]:
        """Context in which an exception in a user's class, as in a forward hook, becomes an InputError.

        Args:
            work: what failed, in the message, such as "training".
        """
        with ExitStack() as contexts:
            for _, explained in self._in_turn(work):
                contexts.enter_context(explained)
            yield

    @property
    def metrics(self) -> dict[str, Any]:
        """The metrics of all parts; lists of the same name are concatenated.

        Raises:
            InputError: a metric has the name of another field of the stage's entry.
        """
        metrics: dict[str, Any] = {}
        for part, explained in self._in_turn("metrics"):
            with explained:
                of_part = part.metrics
                if taken := sorted(StageRecord.model_fields.keys() & of_part):
                    raise InputError(
                        f"{type(part).__name__}.metrics has the name '{taken[0]}', which numbers.json uses for another "
                        "value. Choose another name, and continue with resume=True (`--resume`)."
                    )
            for name, given in of_part.items():
                value = given.tolist() if isinstance(given, Tensor) else given
                metrics[name] = metrics[name] + value if name in metrics and isinstance(value, list) else value
        return metrics

    @property
    def changes(self) -> Sequence[tuple[int, float]]:
        """The changes of all parts."""
        changes: list[tuple[int, float]] = []
        for part, explained in self._in_turn("changes"):
            with explained:
                changes.extend(part.changes)
        return changes

    @property
    def extra_state(self) -> dict[str, Tensor]:
        """The extra state of all parts, under `index.name`."""
        states: list[Mapping[str, Tensor]] = []
        for part, explained in self._in_turn("extra_state"):
            with explained:
                states.append(part.extra_state)
        return _by_place(states)

    def state_dict(self) -> dict[str, Tensor]:
        """The state of all parts, under `index.name`."""
        states: list[Mapping[str, Tensor]] = []
        for part, explained in self._in_turn("state_dict"):
            with explained:
                states.append(part.state_dict())
        return _by_place(states)

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Restore the state of all parts."""
        for place, (part, explained) in enumerate(self._in_turn("load_state_dict")):
            own = [name for name in state if name.startswith(f"{place}.")]
            with explained:
                part.load_state_dict({name.removeprefix(f"{place}."): state[name] for name in own})

    def begin(self) -> None:
        """Call `begin` of every part, in order."""
        for part, explained in self._in_turn("begin"):
            with explained:
                part.begin()
        self.notes = self._all_notes()

    def before_step(self, step: int, optimizer: Optimizer) -> None:
        """Call `before_step` of every part, in order."""
        for part, explained in self._in_turn("before_step"):
            with explained:
                part.before_step(step, optimizer)

    def after_step(self, step: int, optimizer: Optimizer) -> None:
        """Call `after_step` of every part, in order."""
        for part, explained in self._in_turn("after_step"):
            with explained:
                part.after_step(step, optimizer)

    def count_steps(self, steps: int) -> None:
        """Set the number of steps that were done, for every part too."""
        super().count_steps(steps)
        for part in self.parts:
            part.count_steps(steps)

    def finish(self) -> None:
        """Call `finish` of every part, in order."""
        for part, explained in self._in_turn("finish"):
            with explained:
                part.finish()


def _by_place(states: Sequence[Mapping[str, Tensor]]) -> dict[str, Tensor]:
    """All tensors in one dict, under `index.name`, with the index of the part."""
    return {f"{place}.{name}": value for place, state in enumerate(states) for name, value in state.items()}
