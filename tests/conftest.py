"""Properties are searched without a deadline: how long one example takes says nothing on a busy machine."""

from __future__ import annotations

from hypothesis import settings

settings.register_profile("tersor", deadline=None)
settings.load_profile("tersor")
