"""The collector: its logic without I/O or clock (`core`), and the process around it (`service`, `http`)."""
