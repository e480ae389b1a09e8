"""`python -m monitor` is `latentwatch`."""

from monitor.cli import main

raise SystemExit(main())
