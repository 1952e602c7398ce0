"""Forward passes in bounded memory: a model of transformers run layer by layer, from whatever gives its tensors.

The room knows no files and no Dask. `layers.py` runs: it is given a config, a function from names to float32 tensors,
and batches of token ids, and tells what it sees at every layer. `gates.py` makes routers of that, as a perplexity could
be made of it. transformers and tokenizers (`mergemill[gates]`) are imported by `skeleton.py` and `tokens.py` alone,
when they are first needed.
"""
