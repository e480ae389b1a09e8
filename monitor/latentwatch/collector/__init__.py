"""The collector: one pipeline without I/O or clock (`pipeline`), and the process around it (`service`, `web`)."""
