"""From a path or a URI to the files behind it."""

from __future__ import annotations

import os
from typing import Any
from urllib.parse import parse_qsl, unquote, urlsplit

from pyarrow import fs

from elastic.errors import UserError
from elastic.storage.files import AT_HEAD, Files, LocalFiles, RemoteFiles

CONNECT_S, REQUEST_S, ATTEMPTS = 5.0, 30.0, 3  # S3's own defaults try for minutes before they say that nobody is there
RETRY_S = 10.0  # of Google's storage
S3_TEXTS = ("region", "scheme", "endpoint_override", "access_key", "secret_key", "session_token", "role_arn")
S3_FLAGS = ("anonymous", "background_writes", "allow_bucket_creation", "allow_bucket_deletion",
            "force_virtual_addressing")
KINDS = "a path, or a URI that begins with file://, s3://, gs:// or hdfs://"


def open_files(location: str | os.PathLike[str]) -> tuple[Files, str]:
    """The files of a storage and the path in it. Nothing is created yet. UserError where the location cannot be one."""
    location = os.fspath(location)
    scheme = location.partition("://")[0] if "://" in location else "file"
    if scheme == "file":
        return LocalFiles(), os.path.abspath(unquote(urlsplit(location).path) if "://" in location else location)
    if scheme == AT_HEAD:
        from elastic.storage.head import head_files, parted_head  # which loads Ray

        run_id, path = parted_head(location)
        return head_files(run_id), path.rstrip("/")
    try:
        filesystem, path = open_s3(location) if scheme == "s3" else fs.FileSystem.from_uri(hurried(location, RETRY_S))
    except (ValueError, TypeError, NotImplementedError, OSError) as error:
        raise UserError(f"{shown(location)!r} cannot be opened ({' '.join(str(error).split())[:200]}); give {KINDS}.") from error
    return RemoteFiles(filesystem), path.rstrip("/")


def hurried(location: str, retry_s: float) -> str:
    """Google's storage is not to try for a quarter of an hour either before it says that nobody is there."""
    if not location.startswith(("gs://", "gcs://")) or "retry_limit_seconds" in location:
        return location
    return f"{location}{'&' if '?' in location else '?'}retry_limit_seconds={retry_s:g}"


def open_s3(location: str) -> tuple[fs.FileSystem, str]:
    """s3://[KEY:SECRET@]BUCKET/PATH?region=...&endpoint_override=...; what is not given comes from the environment.

    Region and endpoint are never asked for over the network.
    """
    parts = urlsplit(location)
    options: dict[str, Any] = {}
    for key, value in parse_qsl(parts.query, keep_blank_values=True):
        if key not in (*S3_TEXTS, *S3_FLAGS):
            raise ValueError(f"{key} is no option of an s3:// URI; known are {', '.join((*S3_TEXTS, *S3_FLAGS))}")
        options[key] = value.lower() == "true" if key in S3_FLAGS else value
    if parts.username is not None:
        options |= {"access_key": unquote(parts.username), "secret_key": unquote(parts.password or "")}
    bucket = (parts.hostname or "") if parts.port is None else ""
    if not bucket:
        raise ValueError("the bucket is missing")
    endpoint = options.get("endpoint_override", "")
    if "://" in endpoint:
        options["scheme"], options["endpoint_override"] = endpoint.split("://", 1)
    filesystem = fs.S3FileSystem(connect_timeout=CONNECT_S, request_timeout=REQUEST_S,
                                 retry_strategy=fs.AwsStandardS3RetryStrategy(max_attempts=ATTEMPTS), **options)
    return filesystem, f"{bucket}/{unquote(parts.path).strip('/')}"


def join(location: str, name: str) -> str:
    """The path or URI of something in a location; a URI's query stays behind it."""
    path, mark, query = location.partition("?") if "://" in location else (location, "", "")
    return f"{path.rstrip('/')}/{name}{mark}{query}"


def parted(location: str) -> tuple[str, str]:
    """The location of what something lies in, and its name there."""
    path, mark, query = location.partition("?") if "://" in location else (os.path.abspath(location), "", "")
    parent, _, name = path.rstrip("/").rpartition("/")
    return f"{parent or '/'}{mark}{query}", name


def shown(location: str) -> str:
    """Without a URI's keys and query, which may be secret: for logs and messages."""
    if "://" not in location:
        return location
    scheme, _, rest = location.partition("?")[0].partition("://")
    if scheme == AT_HEAD:
        return f"/{unquote(rest.partition('/')[2])} on the head node"
    host, slash, path = rest.partition("/")
    return f"{scheme}://{host.rpartition('@')[2]}{slash}{path}"
