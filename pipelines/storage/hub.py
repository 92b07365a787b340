"""The first look at the Hugging Face hub.

Its client asks again and again, and takes half a minute to tell that nobody is there.
"""

from typing import Literal

from pipelines.config.text import reason_of

LOOK_S = 10


def require_hub(name: str, kind: Literal["model", "dataset"], revision: str | None = None) -> None:
    """Require that the hub answers a question about a model or data set; what it answers is left to the loading.

    Nothing is asked where HF_HUB_OFFLINE is set: the hub's cache is then read alone.

    Raises:
        OSError: the hub cannot be reached, or does not answer within the time limit.
    """
    from huggingface_hub import HfApi  # takes a second, which local paths need not pay
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, OfflineModeIsEnabled

    try:
        HfApi().repo_info(name, repo_type=kind, revision=revision, timeout=LOOK_S)
    except (HfHubHTTPError, HFValidationError, OfflineModeIsEnabled):
        return
    except Exception as error:  # the client's own, which changed with its versions
        raise OSError(
            f"no answer within {LOOK_S} s ({reason_of(error)}); HF_HUB_OFFLINE=1 reads its cache"
        ) from None
