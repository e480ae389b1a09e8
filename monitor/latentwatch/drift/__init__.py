"""Drift of live traffic against a baseline, with a stated false-alarm rate. Pure: arrays, `now` and `rng` come in."""
