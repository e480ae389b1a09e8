"""`python -m monitor` is `latentwatch`."""

from latentwatch.cli import main

raise SystemExit(main())
