"""Whether a place for checkpoints can be used, found out before a run starts."""

from __future__ import annotations

import os
import threading
import uuid
from pathlib import Path

from elastic.checkpoint.manager import committed
from elastic.checkpoint.remote import shown
from elastic.checkpoint.store import Store
from elastic.errors import UserError

ACCESS_S = 30.0  # for a storage to take and give back a few bytes
AWS_KEYS = ("AWS_ACCESS_KEY_ID", "AWS_PROFILE", "AWS_ROLE_ARN", "AWS_WEB_IDENTITY_TOKEN_FILE", "AWS_CONTAINER_CREDENTIALS_RELATIVE_URI",
            "AWS_CONTAINER_CREDENTIALS_FULL_URI")


def check_access(location: str, is_new: bool) -> None:
    """UserError where nothing can be written there, or a new run would find another's checkpoints."""
    found: list[str | Exception] = []

    def work() -> None:
        try:
            found.append(look(Store.open(location), is_new))
        except Exception as error:
            found.append(error)

    thread = threading.Thread(target=work, name="access", daemon=True)
    thread.start()
    thread.join(ACCESS_S)
    where = f'checkpoint.path = "{shown(location)}"'
    if not found:
        raise UserError(f"{where} does not answer within {ACCESS_S:g} s; mend the endpoint, the network or the path.")
    if isinstance(found[0], UserError):
        raise found[0]
    if isinstance(found[0], Exception):
        raise UserError(f"{where} cannot be used ({' '.join(str(found[0]).split())[:300]}); {remedy(location)}.") from found[0]
    if found[0]:
        raise UserError(f"{where} holds the checkpoints of another run already ({found[0]}); name another path, or `elastic resume` that run.")


def look(store: Store, is_new: bool) -> str:
    """The name of a checkpoint that is there although the run is new, else "". OSError of the storage."""
    names = [name for _, name in committed(store)] if is_new else []
    probe = f"probe-{uuid.uuid4().hex}"
    store.write(f"{probe}/file", [b"probe"])
    store.remove(probe)
    return names[-1] if names else ""


def remedy(location: str) -> str:
    if location.startswith("s3://"):
        given = "@" in location or "anonymous" in location or any(os.environ.get(key) for key in AWS_KEYS)
        given = given or any((Path.home() / ".aws" / name).exists() for name in ("credentials", "config"))
        missing = "" if given else "no credentials were found in the environment, so "
        return f"{missing}set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY (or a role), and region or endpoint_override in the URI"
    if location.startswith(("gs://", "gcs://")):
        return "set GOOGLE_APPLICATION_CREDENTIALS, and see that the bucket exists"
    return "write a path or URI that may be written to"
