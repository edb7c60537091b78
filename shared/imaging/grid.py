"""Where voxels lie: one order of axes for every volume, whatever its file's order was.

Everywhere in this program a volume is an array (d, h, w), and an affine is a 4 x 4 matrix that takes an index
(d, h, w, 1), at the centre of a voxel, to millimetres (x, y, z, 1) in the NIfTI world: x grows to the patient's right,
y to the front, z upwards ("RAS+"). DICOM's world turns the first two round ("LPS+"). The canonical order of axes is
that of an axial CT on a screen: d from feet to head, h from front to back, w from the patient's right to the left.
A file's axes are permuted and flipped to the nearest such order, never resampled: an oblique volume stays oblique.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from shared.imaging.errors import UnreadableImage

Array = npt.NDArray[Any]
Affine = npt.NDArray[np.float64]

#: Towards which side of the patient the axes (d, h, w) grow: superior, posterior, left.
ORDER = ("S", "P", "L")
#: From DICOM's world (LPS+) to NIfTI's (RAS+), and back.
LPS_TO_RAS = np.diag([-1.0, -1.0, 1.0, 1.0])
#: Two grids are one where no corner of the one lies further from the other's than this share of a voxel.
TOLERANCE = 0.1


class Stack(NamedTuple):
    """A volume as a file holds it: any order of axes, values in the file's own units.

    ``valid`` is False where the file has no value (padding, NaN), None where it has one everywhere. ``affine`` is None
    where the file does not say where its voxels lie. ``reference`` is DICOM's FrameOfReferenceUID: positions of two
    files compare only where it is the same; "" where there is none.
    """

    values: Array
    affine: Affine | None
    valid: Array | None = None
    reference: str = ""


def canonical(stack: Stack) -> Stack:
    """The stack with its axes in ORDER; as it is where its place is unknown.

    Raises:
        UnreadableImage: "corrupt" for an affine that flattens the volume.
    """
    if stack.affine is None:
        return stack
    from nibabel import orientations

    turn = orientations.ornt_transform(_axes(stack.affine), orientations.axcodes2ornt(ORDER))
    affine = stack.affine @ orientations.inv_ornt_aff(turn, stack.values.shape)
    values = np.ascontiguousarray(orientations.apply_orientation(stack.values, turn))
    valid = stack.valid
    if valid is not None:
        valid = np.ascontiguousarray(orientations.apply_orientation(valid, turn))
    return stack._replace(values=values, valid=valid, affine=affine)


def as_in_file(values: Array, affine: Affine) -> Array:
    """A canonical array in the order of axes of the file whose affine is given: the inverse of ``canonical``."""
    from nibabel import orientations

    turn = orientations.ornt_transform(orientations.axcodes2ornt(ORDER), _axes(affine))
    return np.ascontiguousarray(orientations.apply_orientation(values, turn))


def _axes(affine: Affine) -> Array:
    from nibabel.orientations import io_orientation

    if not np.isfinite(affine).all() or abs(np.linalg.det(affine[:3, :3])) < 1e-12:
        raise UnreadableImage("corrupt", f"the voxels have no volume: affine {affine.tolist()}")
    axes: Array = io_orientation(affine)
    return axes


def spacing(affine: Affine) -> tuple[float, float, float]:
    """Millimetres from one voxel to the next along each axis."""
    d, h, w = (float(np.linalg.norm(affine[:3, axis])) for axis in range(3))
    return d, h, w


def same_place(first: Affine, second: Affine, shape: tuple[int, ...]) -> bool:
    """Whether two grids of one shape lie in the same place, to TOLERANCE of a voxel at every corner."""
    corners = np.array(np.meshgrid(*[(0, side - 1) for side in shape])).reshape(3, -1)
    corners = np.concatenate([corners, np.ones((1, corners.shape[1]))])
    apart = np.linalg.norm(((first - second) @ corners)[:3], axis=0)
    return bool(apart.max() <= TOLERANCE * min(spacing(first)))
