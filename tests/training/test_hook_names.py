from torch import nn

from tersor.training.attachment import Attachment
from tersor.training.hook_names import misspelled_hooks


class Slipped(Attachment):
    def before_steps(self, step):
        """Would never be called."""

    def clip(self):
        """A user's own method."""


class Right(Attachment):
    def before_step(self, step):
        """A hook."""


def test_a_method_with_nearly_the_name_of_a_hook_is_reported():
    model = nn.Linear(1, 1)
    assert misspelled_hooks(Slipped(model)) == [
        "Slipped.before_steps is not a hook and is not called during training. Did you mean before_step?"
    ]
    assert misspelled_hooks(Right(model)) == misspelled_hooks(Attachment(model)) == []
