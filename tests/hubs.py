"""This process as one that has just started with the variables of a Hub, which its client reads but once."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from huggingface_hub import constants
from huggingface_hub.utils.tqdm import disable_progress_bars
from servers.hub import Hub

from mergemill.engine.storage import tries
from mergemill.engine.storage.ranges import close_all

Use = Callable[..., None]


@contextmanager
def use_hub(hub: Hub, home: Path) -> Iterator[Use]:
    """Use `hub`, with caches and tokens below `home`, and no wait between attempts.

    What is lent starts anew: with the Hub at another URL, with a token, or offline.
    """
    with pytest.MonkeyPatch.context() as patch:

        def start(endpoint: str = hub.url, token: str = "", *, offline: bool = False) -> None:
            patch.setenv("HF_ENDPOINT", endpoint)
            patch.setattr(constants, "HF_HUB_OFFLINE", offline)
            patch.delenv("HF_TOKEN", raising=False)
            if token:
                patch.setenv("HF_TOKEN", token)
            close_all()

        patch.setattr(constants, "HF_HUB_CACHE", str(home / "hub"))
        patch.setattr(constants, "HF_TOKEN_PATH", str(home / "token"))
        patch.setattr(constants, "HF_HUB_DISABLE_XET", True)
        patch.setattr(tries, "FIRST_WAIT_S", 0.0)
        patch.setenv("no_proxy", "127.0.0.1")
        disable_progress_bars()
        start()
        yield start
    close_all()
