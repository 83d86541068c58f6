"""Whether a Ray elsewhere can be joined at all, found out in seconds: Ray itself tries on for longer, and writes about it on stderr."""

from __future__ import annotations

import platform
import re
import socket
from importlib.util import find_spec

import ray

from elastic.errors import UserError

CONNECT_S = 3.0  # for a Ray at a given address to take a connection, and to answer a call
REMEDY = "start one with `ray start --head`, or leave --address out, with no RAY_ADDRESS in the environment."


def answers(address: str) -> None:
    """UserError where nobody takes a connection."""
    if address.startswith(("http://", "https://")):
        raise UserError(f"{address} (--address, or RAY_ADDRESS in the environment) is the address of a job server, where `elastic "
                        "submit` sends runs to; to train from here name the Ray itself, as --address HEAD:6379.")
    host, _, port = address.rpartition(":")
    try:
        socket.create_connection((host.rpartition("/")[2], int(port)), CONNECT_S).close()
    except (OSError, ValueError) as error:
        raise UserError(f"No Ray answers at --address {address} ({error}); {REMEDY}") from None


def check_token(address: str) -> None:
    """UserError where a Ray refuses this process's token. What else is wrong is left to Ray, and so is all of it where its
    client has no gRPC."""
    if find_spec("grpc") is None:
        return
    import grpc
    from ray._private.grpc_utils import init_grpc_channel
    from ray.core.generated import gcs_service_pb2, gcs_service_pb2_grpc

    with init_grpc_channel(address.rpartition("/")[2], [("grpc.enable_http_proxy", 0)]) as channel:
        try:
            gcs_service_pb2_grpc.NodeInfoGcsServiceStub(channel).CheckAlive(gcs_service_pb2.CheckAliveRequest(),
                                                                           timeout=CONNECT_S)
        except grpc.RpcError as error:
            if error.code() == grpc.StatusCode.UNAUTHENTICATED:
                raise UserError(refused(address)) from None


def refused(address: str) -> str:
    """For want of the cluster's token."""
    return (f"The Ray at {address} asks for its token, and this command has another one or none; set RAY_AUTH_MODE=token and "
            "RAY_AUTH_TOKEN to what `ray get-auth-token` prints on its head.")


def not_joined(address: str, text: str) -> str:
    """Why Ray could not be joined, from its own words."""
    found = re.search(r"Ray: (\S+)\s+Python: (\S+)", text) if "mismatch" in text else None
    return versions(address, found[1], found[2]) if found else f"No Ray answers at --address {address} ({text.splitlines()[0]}); {REMEDY}"


def versions(address: str, theirs: str, python: str) -> str:
    """For another version there than here."""
    return (f"The cluster at {address} has Ray {theirs} on Python {python}, and here it is Ray {ray.__version__} on Python "
            f"{platform.python_version()}; install here, on Python {python}: pip install 'ray[default]=={theirs}'.")
