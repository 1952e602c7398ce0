"""The command line: one command a file, over the engine's public face.

`console` alone prints, draws progress and turns errors into one line; `signals` turns Ctrl-C and SIGTERM
into an exception; `main` ties them together. Nothing heavy (torch, Dask, the engine) is imported before a
command runs: `mergemill --help` takes a tenth of a second.
"""
