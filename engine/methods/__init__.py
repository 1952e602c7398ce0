"""Merge methods, one file each: pure functions of tensors that know no file, no model and no Dask."""
