"""What an error of the Hub's client means, in a sentence that says what to do."""
from huggingface_hub.errors import (
    EntryNotFoundError,
    GatedRepoError,
    HfHubHTTPError,
    HTTPError,  # of the client's transport: that of its own errors, too
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

__all__ = ['explain']

LOGIN = 'log in with `hf auth login` or set HF_TOKEN'
OF_CLASSES = {  # the first that fits
    GatedRepoError: f'the repository is gated: ask for access on its page, then {LOGIN}',
    RepositoryNotFoundError: f'there is no such repository, or it is private: check the name, or {LOGIN}',
    RevisionNotFoundError: 'the repository has no such revision',
    EntryNotFoundError: 'the repository has no such file',
}
OF_STATUS = {
    401: f'the Hub does not accept the token: {LOGIN}',
    403: 'the Hub does not allow it: take a token, or an account, that may',
    404: 'there is nothing of that name',
    409: 'something of that name is there already, or is being changed: look, and try again',
    412: 'somebody else has changed the repository meanwhile: look, and try again',
    429: 'the Hub has had too many requests from here: try again in some minutes',
}


def explain(error: BaseException) -> str:
    """Why the Hub was not reached or said no, with its own words where it has some."""
    chain = [error]  # the client's last word may be only that an upload failed, or that nothing is in the cache
    while chain[-1].__cause__:
        chain.append(chain[-1].__cause__)
    error = next((e for e in chain if isinstance(e, (OfflineModeIsEnabled, HTTPError))), error)
    if isinstance(error, OfflineModeIsEnabled):
        return 'it is not in the cache, and HF_HUB_OFFLINE forbids to ask the Hub'
    if isinstance(error, HfHubHTTPError):
        status = error.response.status_code
        reason = next((reason for kind, reason in OF_CLASSES.items() if isinstance(error, kind)), None)
        reason = reason or OF_STATUS.get(status) or (
            'the Hub has a fault of its own: try again later' if status >= 500 else 'the Hub refuses')
        return f'{reason} (HTTP {status}{error.server_message and f": {error.server_message.strip()}" or ""})'
    if isinstance(error, HTTPError):
        name = type(error).__name__
        reason = 'the Hub did not answer in time' if name.endswith('Timeout') else 'the connection to the Hub failed'
        return f'{reason}: check the network, and try again ({f"{name}: {error}".removesuffix(": ")})'
    return f'{type(error).__name__}: {error}'.removesuffix(': ')
