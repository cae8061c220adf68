"""asrkit: training recipes that turn real speech into small, fast, streaming speech recognizers."""

from asrkit.mkl import use_avx2_path

__version__ = "0.1.0"

use_avx2_path()  # here, as it must come before torch's first matrix product
