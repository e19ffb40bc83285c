"""A mask as DICOM SEG: binary, one segment a label, with name, colour and codes."""

from __future__ import annotations

from pathlib import Path

import highdicom
import numpy as np
from highdicom.color import CIELabColor
from highdicom.seg import SegmentAlgorithmTypeValues, Segmentation, SegmentationTypeValues, SegmentDescription
from highdicom.sr import CodedConcept
from maisi_cli import __version__
from maisi_cli.volumes import Mask
from pydicom.dataset import Dataset
from pydicom.sr.codedict import codes
from pydicom.uid import ExplicitVRLittleEndian

from .codes import Concept, concepts_of, name_scheme
from .identity import DERIVATION, MANUFACTURER, Identity, mark
from .planes import stack

SEGMENTATION = "segmentation"


def segmentation_of(mask: Mask, slices: list[Dataset], identity: Identity, *, refers: bool) -> Segmentation:
    """Return the SEG of a mask on the slices of its series; segment k is the k-th label that occurs.

    The label's id is in the Segment Description. Without `refers` the slices lend their geometry alone: the file names
    no images, because there are none.
    """
    concepts = concepts_of(mask)
    numbers = np.zeros(256, dtype=np.uint8)
    numbers[[each.id for each in concepts]] = range(1, len(concepts) + 1)
    made = Segmentation(
        source_images=slices,
        pixel_array=np.ascontiguousarray(numbers[stack(mask.array)]),
        segmentation_type=SegmentationTypeValues.BINARY,
        segment_descriptions=[_segment(number, each) for number, each in enumerate(concepts, start=1)],
        series_instance_uid=identity.uid(SEGMENTATION),
        series_number=2,
        sop_instance_uid=identity.uid(SEGMENTATION, "instance"),
        instance_number=1,
        manufacturer=MANUFACTURER,
        manufacturer_model_name="maisi",
        software_versions=__version__,
        device_serial_number="none",
        content_label="SYNTHETIC",
        content_description="Labels of a synthetic volume",
        content_creator_name="maisi^",
        transfer_syntax_uid=ExplicitVRLittleEndian,
    )
    mark(made, identity, modality="SEG", series=SEGMENTATION, number=2, description="segmentation")
    made.DerivationDescription = DERIVATION
    name_scheme(made, concepts)
    if not refers:
        _drop_references(made)
    return made


def write_segmentation(made: Segmentation, path: Path) -> None:
    """Write a SEG file."""
    made.save_as(path, enforce_file_format=True)


def _segment(number: int, each: Concept) -> SegmentDescription:
    made = SegmentDescription(
        segment_number=number,
        segment_label=each.name,
        segmented_property_category=each.category,
        segmented_property_type=each.type,
        algorithm_type=SegmentAlgorithmTypeValues.AUTOMATIC,
        algorithm_identification=highdicom.AlgorithmIdentificationSequence(
            name="maisi", family=codes.cid7162.ArtificialIntelligence, version=__version__
        ),
        anatomic_regions=[each.site] if each.site else None,
        display_color=CIELabColor.from_rgb(*each.color),
    )
    made.SegmentDescription = f"MAISI label {each.id}"
    if each.side:
        made.SegmentedPropertyTypeCodeSequence[0].SegmentedPropertyTypeModifierCodeSequence = [CodedConcept.from_code(each.side)]
    return made


def _drop_references(made: Segmentation) -> None:
    for keyword in ("ReferencedSeriesSequence", "SourceImageSequence"):
        if keyword in made:
            delattr(made, keyword)
    for frame in made.PerFrameFunctionalGroupsSequence:
        frame.DerivationImageSequence = []
