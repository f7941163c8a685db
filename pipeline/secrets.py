"""The token for gated repositories, on workers: from Google's Secret Manager into the environment.

A job knows the secret's name. The token itself is in no recipe, no option, no pickle and no job
description, which anybody who may look at a project's jobs can read.
"""

import base64
import os
import time

from pipeline.errors import EvenmixError
from pipeline.stores import RETRY_WAITS_S

ENDPOINT = "https://secretmanager.googleapis.com"
_SCOPE = "https://www.googleapis.com/auth/cloud-platform"
_TIMEOUT_S = 30
_MAY_PASS = (429, 500, 502, 503, 504)

_REMEDIES = {
    400: "enable that version, or name another in dataflow.hf_token_secret",
    401: "its credentials are not accepted",
    403: "enable secretmanager.googleapis.com, and grant the account the role "
    "roles/secretmanager.secretAccessor on the secret",
    404: "create the secret, or correct dataflow.hf_token_secret",
}


def provide_hf_token(secret_version: str) -> None:
    """Put a secret's value into the environment as HF_TOKEN, unless there is one already.

    ``secret_version`` is its resource name, ``projects/P/secrets/S/versions/V``; it is read with
    the machine's own credentials, on a worker those of its service account.

    Raises:
        EvenmixError: there is no such secret, or the service account may not read it.
    """
    if os.environ.get("HF_TOKEN"):
        return
    # Only workers on Google Cloud have or need it.
    import google.auth  # noqa: PLC0415
    from google.auth.exceptions import GoogleAuthError  # noqa: PLC0415
    from google.auth.transport.requests import AuthorizedSession  # noqa: PLC0415
    from requests import RequestException  # noqa: PLC0415

    try:
        credentials, _ = google.auth.default(scopes=[_SCOPE])
        with AuthorizedSession(credentials) as session:
            # All workers of a job ask at once.
            for wait_s in (*RETRY_WAITS_S, None):
                try:
                    answer = session.get(
                        f"{ENDPOINT}/v1/{secret_version}:access", timeout=_TIMEOUT_S
                    )
                    if wait_s is None or answer.status_code not in _MAY_PASS:
                        break
                except RequestException:
                    if wait_s is None:
                        raise
                time.sleep(wait_s)
    except (GoogleAuthError, RequestException) as error:
        raise EvenmixError(f"the secret {secret_version} cannot be read: {error}") from error
    if not answer.ok:
        remedy = _REMEDIES.get(answer.status_code, "start the same command again")
        raise EvenmixError(
            f"the worker's service account cannot read the secret {secret_version} (status "
            f"{answer.status_code}): {remedy}"
        )
    os.environ["HF_TOKEN"] = base64.b64decode(answer.json()["payload"]["data"]).decode().strip()
