"""For notebooks and scripts: `latentwatch.load`, `.score`, `.plot` and `.read_evidence`. No server is needed."""
