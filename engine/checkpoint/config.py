"""``config.json``: the donor's, with only what the merge changed.

The config is edited as a JSON value, never rewritten through a library's classes: keys that nobody here knows
stay, in their order. Changes are a map from the path of a key, ``("text_config", "num_hidden_layers")``, to its
new value; those of several functions are joined with ``|``.
"""

import json
from collections.abc import Mapping, Sequence
from fnmatch import fnmatchcase
from typing import Any

from mergemill.engine.checkpoint.families import Family
from mergemill.engine.errors import CheckpointError

type Path = tuple[str, ...]
