"""Texts by concern and family, to train detectors on and to measure them with: our own, and installed public sets."""
