"""Names for NumPy arrays by what they hold. Their shape stands in the suffix of a variable: act_TF, count_F."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

Dtype = np.dtype[Any]
"""Of numbers or of records."""
Array = npt.NDArray[Any]
"""Records, or numbers of a dtype that the code beside it names or that does not matter to it."""
Bool = npt.NDArray[np.bool_]
U8 = npt.NDArray[np.uint8]
U16 = npt.NDArray[np.uint16]
U64 = npt.NDArray[np.uint64]
I32 = npt.NDArray[np.int32]
I64 = npt.NDArray[np.int64]
F32 = npt.NDArray[np.float32]
F64 = npt.NDArray[np.float64]
