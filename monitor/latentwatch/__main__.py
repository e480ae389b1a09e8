"""`python -m latentwatch` is `latentwatch`."""

from latentwatch.cli import main

raise SystemExit(main())
