"""A model on the Hugging Face hub, fetched into the hub client's own cache."""

from pathlib import Path

from huggingface_hub import snapshot_download
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

from logitwise.errors import SourceError

PATTERNS = ["*.safetensors", "*.json", "*.jinja", "*.model", "*.txt", "LICENSE*", "LICENCE*", "NOTICE*"]


def fetch(repo_id: str, revision: str | None = None, endpoint: str | None = None) -> Path:
    """The folder of a hub model: config, safetensors, tokenizer and licence; never pickles.

    Args:
        repo_id: `org/name`, or `name`.
        revision: a branch, tag or commit; the main branch by default.
        endpoint: the address of the hub; the public one by default. The token is the hub client's own.

    Errors: SourceError where it is not found, needs permission or cannot be reached.
    """
    try:
        # Subfolders hold other exports of the same model (onnx/, original/), so only the top level is fetched.
        folder = snapshot_download(
            repo_id, revision=revision, endpoint=endpoint, allow_patterns=PATTERNS, ignore_patterns=["*/*"]
        )
    except HFValidationError as error:
        raise SourceError(f"{repo_id!r} is no hub id", str(error), "write it as org/name") from error
    except GatedRepoError as error:
        raise SourceError(
            f"{repo_id} is gated",
            "its owner gives access to those who ask for it",
            "accept its terms on its hub page, then log in: hf auth login",
        ) from error
    except RevisionNotFoundError as error:
        raise SourceError(
            f"{repo_id} has no revision {revision!r}",
            "the hub knows the model, but no branch, tag or commit of that name",
            "leave --revision out for the main branch",
        ) from error
    except RepositoryNotFoundError as error:
        raise SourceError(
            f"{repo_id} is not on the hub",
            "no model of that name, or it is private and you are not logged in",
            "check the spelling; for a private model: hf auth login",
        ) from error
    except (LocalEntryNotFoundError, OfflineModeIsEnabled, HfHubHTTPError, OSError) as error:
        raise SourceError(
            f"{repo_id} cannot be fetched from the hub",
            f"it is not in the cache of earlier downloads, and {str(error).splitlines()[0]}",
            "check the network, or give a folder that holds the model",
        ) from error
    return Path(folder)
