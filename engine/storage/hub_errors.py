"""What huggingface_hub raises, as the errors of this room: what went wrong, and what to do about it."""

from collections.abc import Iterator
from contextlib import contextmanager
from urllib.parse import urlsplit

from huggingface_hub.errors import (
    DisabledRepoError,
    EntryNotFoundError,
    GatedRepoError,
    HfHubHTTPError,
    HTTPError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from huggingface_hub.utils import build_hf_headers

from mergemill.engine.errors import Absent, CheckpointError
from mergemill.engine.storage.connections import is_transient, shorten, wait_as_told
from mergemill.engine.storage.hub_place import HubPlace
from mergemill.engine.storage.store import Unavailable

LOST: tuple[type[Exception], ...] = (HTTPError, OSError)  # of its HTTP library, whichever that is, and of the system


class Offline(Exception):
    """HF_HUB_OFFLINE forbids to ask the Hub."""


@contextmanager
def explained(place: HubPlace, endpoint: str) -> Iterator[None]:
    """Raise `CheckpointError` for what the Hub refuses, `Unavailable` for what may pass, and `Offline`.

    endpoint: the URL of the Hub.
    """
    try:
        yield
    except OfflineModeIsEnabled as error:
        raise Offline("the Hub may not be asked (HF_HUB_OFFLINE)") from error
    except HfHubHTTPError as error:
        status = error.response.status_code
        if is_transient(status):
            wait_as_told(error.response.headers)
            raise Unavailable(f"{name_hub(endpoint)} answers {status}") from error
        raise _explain(error, place, endpoint) from error
    except LOST as error:
        raise Unavailable(f"{name_hub(endpoint)} cannot be reached ({shorten(error)})") from error
    except (ValueError, KeyError, TypeError, AttributeError) as error:  # its answer is no description of a model
        raise CheckpointError(
            f"{place}: {name_hub(endpoint)} does not answer as the Hub does; check HF_ENDPOINT"
        ) from error


def has_token() -> bool:
    """Whether requests to the Hub carry a token."""
    return "authorization" in build_hf_headers()


def _explain(error: HfHubHTTPError, place: HubPlace, endpoint: str) -> CheckpointError:
    page = f"{clean_endpoint(endpoint)}/{place.repo}"
    if isinstance(error, GatedRepoError):
        rest = "with the account whose token is used here" if has_token() else "and log in: hf auth login"
        return CheckpointError(f"{place}: is gated; accept its terms at {page} {rest}")
    if isinstance(error, RepositoryNotFoundError):
        may = "that the token used here may not read" if has_token() else "that needs a token; log in: hf auth login"
        # Who shows no token, or a wrong one, is told 401 of whatever there is.
        kind = Absent if error.response.status_code == 404 else CheckpointError
        return kind(f"{place}: no such model on {name_hub(endpoint)}, or a private one {may}")
    if isinstance(error, RevisionNotFoundError):
        return Absent(f"{place}: has no revision {place.revision!r}; its branches and tags are at {page}/tree/main")
    if isinstance(error, EntryNotFoundError):
        return Absent(f"{place}: no such file or folder")
    if isinstance(error, DisabledRepoError):
        return CheckpointError(f"{place}: {name_hub(endpoint)} has disabled access to it")
    if error.response.status_code == 401:
        return CheckpointError(
            f"{place}: {name_hub(endpoint)} does not know the token used here; log in: hf auth login"
        )
    return CheckpointError(f"{place}: {name_hub(endpoint)} answers {error.response.status_code}")


def name_hub(endpoint: str) -> str:
    """Return what messages call the Hub at a URL."""
    return f"the Hub at {clean_endpoint(endpoint)}"


def clean_endpoint(endpoint: str) -> str:
    """Return a URL without user and query.

    >>> clean_endpoint("https://user:secret@hub.example/hf?x")
    'https://hub.example/hf'
    """
    parts = urlsplit(endpoint)
    return f"{parts.scheme}://{parts.netloc.rpartition('@')[2]}{parts.path}"
