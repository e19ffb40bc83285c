"""A mask as RT Structure Set: one region of interest a label, closed planar contours on the slices of the series."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
from highdicom.sr import CodedConcept
from maisi_cli.volumes import Mask
from numpy.typing import NDArray
from pydicom.dataelem import DataElement
from pydicom.dataset import Dataset
from pydicom.tag import Tag
from pydicom.uid import ImplicitVRLittleEndian, RTStructureSetStorage
from scipy.ndimage import find_objects

from .codes import Concept, concepts_of, name_scheme
from .contours import outlines
from .identity import Identity, mark, meta
from .planes import Planes, Points, planes_of, stack

STRUCTURES = "structure set"
STUDY_CLASS = "1.2.840.10008.3.1.2.3.1"
"""Detached Study Management: retired, and what Referenced SOP Class UID of a study is still set to."""
CONTOUR_DATA = Tag("ContourData")
PLACES = 4
"""Decimals of a coordinate in mm."""


def structures_of(mask: Mask, slices: list[Dataset], identity: Identity, *, refers: bool) -> Dataset:
    """Return the structure set of a mask on the slices of its series.

    A contour goes around each part of a label in each slice; see `contours.outlines`. Without `refers` only the frame of
    reference is named, because there are no images.
    """
    concepts = concepts_of(mask)
    made = Dataset()
    made.SOPClassUID = RTStructureSetStorage
    made.SOPInstanceUID = identity.uid(STRUCTURES, "instance")
    mark(made, identity, modality="RTSTRUCT", series=STRUCTURES, number=3, description="structure set")
    made.InstanceNumber = 1
    made.OperatorsName = ""
    made.StructureSetLabel = "SYNTHETIC"
    made.StructureSetName = "Labels of a synthetic volume"
    made.StructureSetDate, made.StructureSetTime = made.ContentDate, made.ContentTime
    del made.ContentDate, made.ContentTime  # not of this kind of file
    made.ApprovalStatus = "UNAPPROVED"
    made.ReferencedFrameOfReferenceSequence = [_frame_of_reference(made, slices, refers=refers)]
    made.StructureSetROISequence = [_region(number, each, made) for number, each in enumerate(concepts, start=1)]
    made.ROIContourSequence = list(_contours(mask, concepts, slices, refers=refers))
    made.RTROIObservationsSequence = [_observation(number, each) for number, each in enumerate(concepts, start=1)]
    name_scheme(made, concepts)
    # In explicit VR a contour of more than 64 KiB would have to be of the type UN, which many programs do not read.
    made.file_meta = meta(made, ImplicitVRLittleEndian)
    return made


def write_structures(made: Dataset, path: Path) -> None:
    """Write a structure set."""
    made.save_as(path, enforce_file_format=True)


def _frame_of_reference(made: Dataset, slices: list[Dataset], *, refers: bool) -> Dataset:
    frame = _item(FrameOfReferenceUID=made.FrameOfReferenceUID)
    if refers:
        series = _item(SeriesInstanceUID=slices[0].SeriesInstanceUID, ContourImageSequence=[_reference(each) for each in slices])
        study = _item(ReferencedSOPClassUID=STUDY_CLASS, ReferencedSOPInstanceUID=made.StudyInstanceUID,
                      RTReferencedSeriesSequence=[series])  # fmt: skip
        frame.RTReferencedStudySequence = [study]
    return frame


def _region(number: int, each: Concept, made: Dataset) -> Dataset:
    return _item(ROINumber=number, ReferencedFrameOfReferenceUID=made.FrameOfReferenceUID, ROIName=each.name,
                 ROIDescription=f"MAISI label {each.id}", ROIGenerationAlgorithm="AUTOMATIC")  # fmt: skip


def _observation(number: int, each: Concept) -> Dataset:
    return _item(
        ObservationNumber=number, ReferencedROINumber=number, RTROIIdentificationCodeSequence=[CodedConcept.from_code(each.type)],
        RTROIInterpretedType="", ROIInterpreter="",
    )  # fmt: skip


def _contours(mask: Mask, concepts: list[Concept], slices: list[Dataset], *, refers: bool) -> Iterator[Dataset]:
    planes, labels = planes_of(mask.geometry), stack(mask.array)
    boxes = find_objects(labels)
    for number, each in enumerate(concepts, start=1):
        box = boxes[each.id - 1]
        assert box is not None  # its id occurs
        yield _item(
            ReferencedROINumber=number, ROIDisplayColor=list(each.color),
            ContourSequence=list(_contours_of(labels[box] == each.id, box, planes, slices, refers=refers)),
        )  # fmt: skip


def _contours_of(
    part: NDArray[np.bool_], box: tuple[slice, ...], planes: Planes, slices: list[Dataset], *, refers: bool
) -> Iterator[Dataset]:
    first, row, column = (each.start for each in box)
    for plane, flat in enumerate(part, start=first):
        for ring in outlines(flat):
            points = planes.points(plane, ring + np.array([column, row]))
            contour = _item(ContourGeometricType="CLOSED_PLANAR", NumberOfContourPoints=len(points))
            contour.add(DataElement(CONTOUR_DATA, "DS", _decimals(points), already_converted=True))
            if refers:
                contour.ContourImageSequence = [_reference(slices[plane])]
            yield contour


def _decimals(points: Points) -> list[str]:
    """Return coordinates as decimal strings; as text, because a body has millions of them."""
    flat = points.round(PLACES).ravel() + 0.0
    return [f"{value:.{PLACES}f}" for value in flat.tolist()]


def _reference(slice_: Dataset) -> Dataset:
    return _item(ReferencedSOPClassUID=slice_.SOPClassUID, ReferencedSOPInstanceUID=slice_.SOPInstanceUID)


def _item(**values: object) -> Dataset:
    made = Dataset()
    for keyword, value in values.items():
        setattr(made, keyword, value)
    return made
