"""NumPy's BLAS on one thread, if this is imported before NumPy: oracles decompose small matrices.

Of several threads each waits for the others by turning round; on two busy cores that took five times as long
(2026-11-29, 209 cases of the suite of methods: 129 s, on one thread 23 s). Merges are torch's and have threads of
their own.
"""

import os

os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
