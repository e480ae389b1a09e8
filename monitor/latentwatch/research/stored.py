"""A collector's evidence as tables, for pandas, polars, DuckDB or whatever else reads Arrow."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from latentwatch.errors import ConfigRefused, RefusalReason
from latentwatch.evidence.archive import Archive

if TYPE_CHECKING:
    import pyarrow as pa


def read_evidence(folder: str | Path) -> dict[str, pa.Table]:
    """The tables "requests", "exceedances" and "activations", joined by their column "key"; each has `.to_pandas()`.

    Read whole into memory. Raises: ConfigRefused: no such folder, or pyarrow is missing.
    """
    archive = Archive(Path(folder))
    try:
        from latentwatch.evidence import parquet
    except ImportError as error:
        raise ConfigRefused(
            "evidence as tables",
            found=f"{error.name} is not installed",
            instead="Run in a clone of the repository: pip install '.[parquet]'",
            reason=RefusalReason.PACKAGE_MISSING,
        ) from error
    return parquet.tables(archive.requests())
