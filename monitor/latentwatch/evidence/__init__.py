"""Evidence: which request, which token positions, which feature, how strong, when. A folder of SQLite files.

The collector hands `records` to a `store`; `archive` reads the same folder, beside a running collector or without one.
Nothing here imports the collector.
"""
