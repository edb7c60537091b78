"""report.pdf: the report as Chromium prints it, where Chromium is on the machine."""

from __future__ import annotations

import os
import shutil
import subprocess
import tempfile
from pathlib import Path

from shared.errors import UserError

BROWSERS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
WAIT = 120  # seconds


def write_pdf(page: Path) -> Path:
    """Print an HTML page to a PDF file of the same name beside it; gives its path. Nothing is fetched for it.

    Raises:
        UserError: there is no Chromium, or it cannot print.
    """
    browser = next(filter(None, map(shutil.which, BROWSERS)), None)
    if browser is None:
        raise UserError(
            f"--pdf needs Chromium, and none of {', '.join(BROWSERS)} is installed; print {page} from any browser"
        )
    target = page.with_suffix(".pdf")
    with tempfile.TemporaryDirectory(prefix="consilium-pdf-") as own:
        made = Path(own) / "report.pdf"
        command = [browser, "--headless=new", "--disable-gpu", "--no-first-run", "--disable-extensions"]
        command += ["--no-sandbox"] if os.geteuid() == 0 else []  # root has none; the page is our own
        command += ["--host-resolver-rules=MAP * ~NOTFOUND", f"--user-data-dir={own}/profile", "--no-pdf-header-footer"]
        command += ["--virtual-time-budget=20000", f"--print-to-pdf={made}", page.resolve().as_uri()]
        try:
            done = subprocess.run(command, capture_output=True, text=True, timeout=WAIT, check=False)
        except (OSError, subprocess.TimeoutExpired) as error:
            raise UserError(f"--pdf: {browser} did not print {page}: {type(error).__name__}") from None
        if done.returncode or not made.is_file() or made.read_bytes()[:5] != b"%PDF-":
            last = (done.stderr.strip().splitlines() or ["no reason given"])[-1]
            raise UserError(f"--pdf: {browser} did not print {page}: {last[:200]}")
        beside = target.with_name(f".{target.name}.writing")
        shutil.copyfile(made, beside)
        os.replace(beside, target)
    return target
