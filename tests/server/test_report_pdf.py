"""The report on paper: Chromium's PDF holds the page's own words; without Chromium one line says what to do."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from server import report_pdf
from server.report_pdf import write_pdf
from shared.errors import UserError


@pytest.mark.skipif(shutil.which("chromium") is None, reason="chromium is not installed")
def test_the_page_is_printed_whole(tmp_path: Path) -> None:
    page = tmp_path / "report.html"
    lines = "".join(f"<p style='height:20em'>part {number}</p>" for number in range(12))
    page.write_text(f"<title>tiny</title>{lines}<script>document.title = 'drawn by its script'</script>")
    pdf = write_pdf(page)
    content = pdf.read_bytes()
    assert pdf == tmp_path / "report.pdf"
    assert content.startswith(b"%PDF-")
    assert content.rstrip().endswith(b"%%EOF")
    assert content.count(b"/Type /Page\n") > 1
    assert b"drawn by its script" in content or "drawn by its script".encode("utf-16-be") in content
    assert sorted(path.name for path in tmp_path.iterdir()) == ["report.html", "report.pdf"]


def test_without_chromium_one_line_says_what_to_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(report_pdf.shutil, "which", lambda name: None)
    with pytest.raises(UserError, match="needs Chromium"):
        write_pdf(tmp_path / "report.html")


def test_a_chromium_that_fails_leaves_no_half_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    broken = tmp_path / "chromium"
    broken.write_text("#!/bin/sh\necho out of paper >&2\nexit 3\n")
    broken.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    (tmp_path / "report.html").write_text("x")
    with pytest.raises(UserError, match="out of paper"):
        write_pdf(tmp_path / "report.html")
    assert not list(tmp_path.glob("*.pdf"))
