"""What the doctor says about sound and unsound parts; no framework is loaded in this process."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from elastic.driver import doctor


@pytest.fixture
def probe(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    monkeypatch.setattr(doctor, "package_folders", lambda name: ["somewhere"])
    return monkeypatch


def test_a_framework_that_imports(probe: pytest.MonkeyPatch) -> None:
    probe.setitem(doctor.PROBES, "torch", "import json; print('noise'); print(json.dumps({'version': '9.9', 'devices': "
                                          "['cpu', 'X1']}))")
    assert doctor.framework("torch") == doctor.Finding("torch", "9.9 on cpu, X1")


def test_a_framework_that_does_not(probe: pytest.MonkeyPatch) -> None:
    probe.setitem(doctor.PROBES, "torch", "raise ImportError('libmissing.so: cannot open')")
    finding = doctor.framework("torch")
    assert finding.good is False and "libmissing.so" in finding.found and finding.remedy.startswith("reinstall it")


def test_a_framework_that_hangs(probe: pytest.MonkeyPatch) -> None:
    probe.setitem(doctor.PROBES, "torch", "import threading; threading.Event().wait()")
    probe.setattr(doctor, "IMPORT_TIMEOUT_S", 0.5)
    assert doctor.framework("torch").good is False


def test_what_is_not_installed_has_a_remedy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "package_folders", lambda name: [])
    assert doctor.framework("mxnet").remedy == "pip install 'elastic-training[mxnet]'"
    assert all(finding.remedy for finding in doctor.data())


def test_a_driver_that_hangs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "nvidia-smi").write_text(f"#!{sys.executable}\nimport threading; threading.Event().wait()\n")
    (tmp_path / "nvidia-smi").chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(doctor, "GPU_TIMEOUT_S", 0.5)
    assert doctor.gpu().good is False and "driver" in doctor.gpu().remedy


def test_this_machine_is_described() -> None:
    whats = [finding.what for finding in [*doctor.machine(), *doctor.libraries()]]
    assert whats == ["python", "machine", "disk", "libraries"]
