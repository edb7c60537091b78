"""The picture of docs/tasks/sequence.md: the two classes of the perfusion cohort, frame by frame and as curves.

python -m benchmarks.perfusion_picture docs/pictures/perfusion.png
"""

from __future__ import annotations

import sys
from collections.abc import Iterator

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np

from simulations.cohorts import perfusion

SITE, SEED, PATIENTS = 0, 0, 120
COLOURS = {"persistent": "#1f77b4", "washout": "#d62728"}
SHOWN = range(0, 12, 2)


def exams(label: str) -> Iterator[perfusion.Exam]:
    """Test cases of the first site with that label and all frames."""
    for index in range(PATIENTS):
        exam = perfusion.draw(SITE, "test", index, SEED)
        if exam.label == label and len(exam.frames) == perfusion.FRAMES:
            yield exam


def curve(exam: perfusion.Exam) -> np.ndarray:
    """Brightness of the lesion over time, without the agent 0, in the last frames 1 on average."""
    course = (exam.frames * exam.mask).sum((1, 2)) / exam.mask.sum()
    course = course - course[exam.times < exam.arrival].mean()
    found: np.ndarray = course / course[-7:].mean()
    return found


def main(out: str) -> None:
    """Draw it."""
    figure = plt.figure(figsize=(9, 2.4), dpi=100)
    grid = figure.add_gridspec(2, 7, width_ratios=[1] * 6 + [5.5], wspace=0.06, hspace=0.1)
    axes = figure.add_subplot(grid[:, 6])
    for row, (label, colour) in enumerate(COLOURS.items()):
        found = list(exams(label))
        bright = max(found, key=lambda exam: float((exam.frames[6] * exam.mask).sum() / exam.mask.sum()))
        for place, step in enumerate(SHOWN):
            cell = figure.add_subplot(grid[row, place])
            cell.imshow(bright.frames[step], cmap="gray", vmin=0, vmax=float(bright.frames.max()))
            cell.set_xticks([])
            cell.set_yticks([])
            if not place:
                cell.set_ylabel(label, color=colour)
            if not row:
                cell.set_title(f"{bright.times[step]:.1f} min", fontsize=8)
        curves = np.stack([curve(exam) for exam in found])
        for one in curves:
            axes.plot(found[0].times, one, color=colour, alpha=0.15, linewidth=0.8)
        axes.plot(found[0].times, curves.mean(0), color=colour, linewidth=2.5, label=f"{label}, mean")
    axes.set_ylim(-0.15, 1.35)
    axes.set_xlabel("minutes")
    axes.set_title("brightness of the lesion against its own mean", fontsize=9)
    axes.yaxis.tick_right()
    axes.legend(loc="lower right", fontsize=8, frameon=False)
    figure.savefig(out, bbox_inches="tight")


if __name__ == "__main__":
    main(*sys.argv[1:])
