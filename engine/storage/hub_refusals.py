"""What huggingface_hub raises when something is written, as the errors of this room: what to do about it."""

from collections.abc import Iterator
from contextlib import contextmanager

from huggingface_hub.errors import HfHubHTTPError, LocalTokenNotFoundError, OfflineModeIsEnabled

from mergemill.engine.errors import MergemillError, OutputError
from mergemill.engine.storage.connections import is_transient, shorten, wait_as_told
from mergemill.engine.storage.hub_errors import LOST, clean_endpoint, name_hub
from mergemill.engine.storage.store import Unavailable

_LOG_IN = "log in with a token that may write: hf auth login, or set HF_TOKEN"


@contextmanager
def explained(url: str, endpoint: str, error: type[MergemillError]) -> Iterator[None]:
    """Raise `error` for what the Hub refuses, `OutputError` for what this machine lacks, `Unavailable` for the rest."""
    try:
        yield
    except OfflineModeIsEnabled as found:
        raise OutputError(f"{url}: the Hub may not be asked (HF_HUB_OFFLINE); merge into a folder") from found
    except LocalTokenNotFoundError as found:
        raise OutputError(f"{url}: writing to the Hub needs a token; {_LOG_IN}") from found
    except HfHubHTTPError as found:
        status = found.response.status_code
        if is_transient(status):
            wait_as_told(found.response.headers)
            raise Unavailable(f"{name_hub(endpoint)} answers {status}") from found
        raise error(f"{url}: {_explain(found, endpoint)}") from found
    except LOST as found:
        raise Unavailable(f"{name_hub(endpoint)} cannot be reached ({shorten(found)})") from found
    except (ValueError, KeyError, TypeError, AttributeError) as found:
        raise error(f"{url}: {name_hub(endpoint)} takes no such files, or is no Hub: {shorten(found)}") from found


def _explain(error: HfHubHTTPError, endpoint: str) -> str:
    status = error.response.status_code
    said = (error.server_message or "").splitlines()
    says = f"{name_hub(endpoint)} answers {status}" + (f", {said[0].strip(' .')!r}" if said else "")
    if status == 401:
        return f"{says}; {_LOG_IN}"
    if status == 403:
        page = f"{clean_endpoint(endpoint)}/settings/tokens"
        return f"{says}; the token used here may not do that: make one that may at {page}"
    if status == 412:
        return f"{says}; somebody else has written to it meanwhile: run the same merge again"
    return says
