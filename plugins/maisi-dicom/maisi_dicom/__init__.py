"""DICOM output for `maisi`: `--format nifti,dicom`, `dicom-ct`, `dicom-seg` and `rtstruct`."""

from maisi_cli import hookimpl
from maisi_cli.hookspecs import Register


@hookimpl
def register_formats(register: Register) -> None:
    """Register the formats by name; highdicom and pydicom are imported when one is used."""
    room = "maisi_dicom.formats"
    register("dicom", f"{room}:save_dicom", summary="image series (CT or MR) and segmentation: {id}_dicom/ and {id}_seg.dcm")
    register("dicom-ct", f"{room}:save_ct", summary="CT series alone: {id}_dicom/")
    register("dicom-seg", f"{room}:save_seg", summary="segmentation {id}_seg.dcm, with the series it refers to")
    register("rtstruct", f"{room}:save_rtstruct", summary="structure set {id}_rtstruct.dcm, with the series it refers to")
