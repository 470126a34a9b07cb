"""`flax-vlm train` starts with large pages of memory, once."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from flax_vlm.cli import large_pages

SETTING = "glibc.malloc.hugetlb=1"


@pytest.fixture
def of_use(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """The kernel's setting, on a machine whose programs must ask for large pages."""
    kernel = tmp_path / "enabled"
    kernel.write_text("always [madvise] never\n")
    monkeypatch.setattr(large_pages, "_KERNEL", kernel)
    monkeypatch.setattr(large_pages.platform, "libc_ver", lambda: ("glibc", "2.35"))
    monkeypatch.delenv("GLIBC_TUNABLES", raising=False)
    return kernel


@pytest.mark.parametrize("given, made", [("", SETTING), ("glibc.malloc.check=1", f"glibc.malloc.check=1:{SETTING}")])
def test_it_adds_to_what_was_set(of_use: Path, monkeypatch: pytest.MonkeyPatch, given: str, made: str) -> None:
    monkeypatch.setenv("GLIBC_TUNABLES", given)
    assert large_pages.environment() == {"GLIBC_TUNABLES": made}
    monkeypatch.setenv("GLIBC_TUNABLES", made)
    assert large_pages.environment() == {}


def test_nothing_where_it_is_no_use(of_use: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    of_use.write_text("[always] madvise never\n")
    assert large_pages.environment() == {}
    of_use.unlink()
    assert large_pages.environment() == {}
    of_use.write_text("always [madvise] never\n")
    for library in (("glibc", "2.31"), ("", "")):
        monkeypatch.setattr(large_pages.platform, "libc_ver", lambda library=library: library)
        assert large_pages.environment() == {}


def test_a_process_starts_again_once(tmp_path: Path) -> None:
    said = tmp_path / "said"
    program = f"""if True:
        import os, pathlib, sys
        from flax_vlm.cli import large_pages
        large_pages._KERNEL = pathlib.Path({str(tmp_path / "enabled")!r})
        large_pages.platform.libc_ver = lambda: ("glibc", "2.35")
        with open({str(said)!r}, "a") as file:
            print(os.getpid(), sys.argv[1:], os.environ.get("GLIBC_TUNABLES"), file=file)
        large_pages.start_again()
        """
    (tmp_path / "enabled").write_text("always [madvise] never\n")
    environment = {name: value for name, value in os.environ.items() if name != "GLIBC_TUNABLES"}
    subprocess.run([sys.executable, "-c", program, "train", "--steps", "3"], check=True, env=environment, timeout=60)
    first, second = said.read_text().splitlines()
    assert first.endswith("['train', '--steps', '3'] None")
    assert second == first.replace("None", SETTING)
