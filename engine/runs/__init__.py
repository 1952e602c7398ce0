"""Running a plan on Dask: tasks, the memory gate, receipts, resume, commit, verification."""
