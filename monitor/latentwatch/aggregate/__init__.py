"""Statistics as arrays that add: histograms, windows, and the running state of open requests. Pure; no clocks."""
