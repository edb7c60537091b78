"""One program at a time: a second is refused in words, and a killed one holds nothing."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from shared.alone import alone
from shared.errors import UserError

HOLDS = """
import sys, time
from pathlib import Path
from shared.alone import alone
with alone(Path(sys.argv[1]), "taken", "cannot"):
    print("held", flush=True)
    time.sleep(60)
"""


def test_a_second_program_is_refused_until_the_first_is_gone(tmp_path: Path, root: Path) -> None:
    file = tmp_path / "deep" / "lock"
    other = subprocess.Popen([sys.executable, "-c", HOLDS, str(file)], cwd=root, stdout=subprocess.PIPE, text=True)
    assert other.stdout is not None
    assert other.stdout.readline() == "held\n"
    with pytest.raises(UserError, match=r"^it runs already$"), alone(file, "it runs already", "cannot"):
        pass
    other.kill()
    other.wait()
    with alone(file, "it runs already", "cannot"):
        pass


def test_what_cannot_be_written_is_said_and_what_fails_within_is_not_taken_for_it(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"^no room here: "), alone(tmp_path / "file" / "lock", "taken", "no room here"):
        pass
    with pytest.raises(OSError, match="the disk is full"), alone(tmp_path / "lock", "taken", "no room here"):
        raise OSError("the disk is full")
