"""Whether a place for checkpoints can be used, found out before a run starts."""

from __future__ import annotations

import contextlib
import os
import threading
import uuid
from pathlib import Path

from elastic.checkpoint.claim import Claim
from elastic.checkpoint.claim import read as claim_of
from elastic.checkpoint.manager import committed, read_manifest
from elastic.errors import BadCheckpoint, UserError
from elastic.storage.remote import shown
from elastic.storage.store import Store

ACCESS_S = 30.0  # for a storage to take and give back a few bytes
AWS_KEYS = ("AWS_ACCESS_KEY_ID", "AWS_PROFILE", "AWS_ROLE_ARN", "AWS_WEB_IDENTITY_TOKEN_FILE",
            "AWS_CONTAINER_CREDENTIALS_RELATIVE_URI",
            "AWS_CONTAINER_CREDENTIALS_FULL_URI")


def check_access(location: str, is_new: bool, owner: str = "") -> None:
    """UserError where nothing can be written there, another live run writes there, or a new one would find another's
    checkpoints."""
    found: list[str | Exception] = []

    def work() -> None:
        try:
            store = Store.open(location)
            claim = claim_of(store)
            if claim is not None and claim.others("", owner):
                raise UserError(claim.sentence(location))
            found.append(look(store, is_new))
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
        raise UserError(f"{where} holds the checkpoints of another run already ({found[0]}); name another path, or "
                        "`elastic resume` that run.")


def claimed(location: str, run: str, owner: str) -> None:
    """Takes the place for a run; its controller renews that. UserError where another live run has it, or nothing can be
    written there."""
    try:
        Claim(location, run, owner).take()
    except OSError as error:
        raise UserError(f'checkpoint.path = "{shown(location)}" cannot be used ({" ".join(str(error).split())[:300]}); '
                        f"{remedy(location)}.") from error


def look(store: Store, is_new: bool) -> str:
    """What another run has left there although the run is new, else "". OSError of the storage."""
    names = [name for _, name in committed(store)] if is_new else []
    probe = f"probe-{uuid.uuid4().hex}"
    store.write(f"{probe}/file", [b"probe"])
    store.remove(probe)
    return named(store, names[-1]) if names else ""


def named(store: Store, name: str) -> str:
    """A checkpoint, and the run that its manifest names."""
    with contextlib.suppress(BadCheckpoint, UserError):
        if run := read_manifest(store, name).extra.get("run"):  # an older version did not say
            return f"{name} of the run {run}"
    return name


def remedy(location: str) -> str:
    if location.startswith("s3://"):
        given = "@" in location or "anonymous" in location or any(os.environ.get(key) for key in AWS_KEYS)
        given = given or any((Path.home() / ".aws" / name).exists() for name in ("credentials", "config"))
        missing = "" if given else "no credentials were found in the environment, so "
        return f"{missing}set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY (or a role), and region or endpoint_override in the URI"
    if location.startswith(("gs://", "gcs://")):
        return "set GOOGLE_APPLICATION_CREDENTIALS, and see that the bucket exists"
    return "write a path or URI that may be written to"
