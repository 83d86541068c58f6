"""The NCCL group with one member: every call goes through the library. More ranks than one need more GPUs than one."""

from __future__ import annotations

import threading
from collections.abc import Iterator

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="torch is not installed")

from elastic.collective import nccl  # noqa: E402
from elastic.collective.kv_store import Endpoint  # noqa: E402
from elastic.errors import GroupBroken, UserError  # noqa: E402

needs_gpu = pytest.mark.skipif(not nccl.usable(), reason="no CUDA device, or torch was built without NCCL")


@pytest.fixture
def group() -> Iterator[nccl.NcclGroup]:
    endpoint = Endpoint()
    group = nccl.NcclGroup.form(0, 1, endpoint.address, "gpu-test", threading.Event(), 60)
    yield group
    group.abort()


@pytest.mark.skipif(nccl.usable(), reason="there is a GPU here")
def test_without_a_gpu_the_error_names_the_key() -> None:
    with pytest.raises(UserError, match="backend.device = 'cuda' needs a CUDA device"):
        nccl.NcclGroup.form(0, 1, Endpoint().address, "no-gpu", threading.Event(), 10)


@needs_gpu
def test_every_call_on_the_device(group: nccl.NcclGroup) -> None:
    part = torch.arange(13, dtype=torch.float32, device="cuda")
    buffer = part.clone()
    group.all_reduce(buffer)
    group.broadcast(buffer, 0)
    group.barrier()
    assert torch.equal(buffer, part)
    for call in (lambda out: group.all_gather(out, part), lambda out: group.reduce_scatter(out, part),
                 lambda out: group.all_to_all(out, [13], part, [13])):
        out = torch.zeros_like(part)
        call(out)
        assert torch.equal(out, part)


@needs_gpu
def test_votes_are_numpy_arrays(group: nccl.NcclGroup) -> None:
    out = np.zeros(5)
    group.all_gather(out, np.arange(5.0))
    np.testing.assert_array_equal(out, np.arange(5.0))


@needs_gpu
def test_an_aborted_group_is_finished(group: nccl.NcclGroup) -> None:
    group.barrier()
    group.abort()
    with pytest.raises(GroupBroken, match="was aborted"):
        group.barrier()
