"""For notebooks and scripts, reached as `latentwatch.load`, `.score` and `.read_evidence`. No server is needed."""
