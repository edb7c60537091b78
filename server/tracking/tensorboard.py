"""A run as TensorBoard's event files; needs the extra ``tensorboard``."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from server.database.query import Row
from server.tracking.points import Point
from shared.errors import UserError, how_to_install


class TensorBoard:
    """Event files in ``folder``/NAME-KEY; those of an earlier tracking of the same run are written anew."""

    def __init__(self, folder: Path, row: Row) -> None:
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError:
            raise UserError(f"TensorBoard is not installed; {how_to_install('tensorboard')}") from None
        self.folder = folder / f"{_plain(row['name'])}-{row['key'][:8]}"
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            for old in self.folder.glob("events.out.tfevents.*"):
                old.unlink()
        except OSError as error:
            raise UserError(f"--tensorboard {folder}: cannot be written: {error.strerror}") from None
        self.writer = SummaryWriter(str(self.folder))
        settings = "\n".join(f"    {name} = {value!r}" for name, value in row["settings"].items())
        self.writer.add_text("job", settings, 0)

    def write(self, news: Sequence[Point]) -> None:
        """Add figures and put them on the disk."""
        for point in news:
            self.writer.add_scalar(
                point.name, point.value, point.step, walltime=point.time, new_style=True, double_precision=True
            )
        self.writer.flush()

    def end(self, row: Row) -> None:
        """Close the files."""
        self.writer.close()


def _plain(name: str) -> str:
    return "".join(letter if letter.isalnum() or letter in "._-" else "-" for letter in name).strip(".-") or "run"
