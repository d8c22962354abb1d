"""Progress bars on a terminal."""

import io

from rich.console import Console

from tersor.progress_bars import Bars


def test_no_bar_remains_below_the_lines():
    console = Console(file=io.StringIO(), force_terminal=False)
    with Bars(console) as bars:
        bars.start("reading images", 3)
        bars.advance(3)
        bars.say("the result")
    assert console.file.getvalue().split() == ["the", "result"]
