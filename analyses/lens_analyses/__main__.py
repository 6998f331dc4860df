"""`python -m lens_analyses` is `lens`."""

from lens_analyses.cli import main

main()
