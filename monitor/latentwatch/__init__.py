"""latentwatch: see what a served model is thinking, while it serves."""

__version__ = "0.1.0"
