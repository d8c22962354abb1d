"""`python -m tersor`, and `accelerate launch -m tersor`."""

from tersor.cli import main

main()
