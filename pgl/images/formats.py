"""The formats that are read, each by the one reader that its name calls for.

A format is taken only if it can say in millimetres where its voxels lie and where its axes point; else a
volume could come out mirrored or stretched, and nobody could tell. What a file of such a format leaves unsaid
is taken by the format's own rule (NRRD and MetaImage: 1 mm, axes as in DICOM). Readers that open other files
on a file's word (HDF5: external links, external storage, virtual data sets) are not asked at all.
"""

from __future__ import annotations

from pgl.images.checks import RejectedImage
from pgl.images.native import split_suffixes

READERS = {
    **dict.fromkeys((".nii", ".nii.gz", ".hdr", ".hdr.gz"), "NiftiImageIO"),
    **dict.fromkeys((".nrrd", ".nhdr"), "NrrdImageIO"),
    **dict.fromkeys((".mha", ".mhd"), "MetaImageIO"),
}
NO_PLACE = "does not say where its axes point{}, so left could be right; convert it from its source to NIfTI"
LINKS = "can have other files of this machine read in its stead, and is not opened; convert it to NIfTI"
NOT_READ = {
    **dict.fromkeys((".gipl", ".gipl.gz"), "GIPL " + NO_PLACE.format("")),
    **dict.fromkeys((".img", ".img.gz"), "the voxels of a pair of files; name its .hdr instead"),
    **dict.fromkeys((".vtk",), "legacy VTK " + NO_PLACE.format("")),
    **dict.fromkeys((".tif", ".tiff", ".lsm"), "TIFF " + NO_PLACE.format(", nor how far slices are apart")),
    **dict.fromkeys((".h5", ".hdf5"), f"HDF5 {LINKS}"),
    **dict.fromkeys((".mnc",), f"MINC {LINKS}"),
}


def reader_of(path: str) -> str:
    """The name of SimpleITK's reader for an image file.

    Raises:
        RejectedImage: no format that is read, or one that is not read for a reason.
    """
    suffix = split_suffixes(path)[1].lower()
    if suffix in NOT_READ:
        raise RejectedImage(NOT_READ[suffix])
    if suffix not in READERS:
        raise RejectedImage(
            "unreadable: no DICOM, and in no format that is read by its name "
            f"({' '.join(READERS)}); leave it out with --exclude if it is no image"
        )
    return READERS[suffix]
