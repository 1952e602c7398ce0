"""Dask clusters: started or found, looked at before a merge, watched during one."""
