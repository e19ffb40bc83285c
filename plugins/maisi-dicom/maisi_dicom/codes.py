"""What a label is, in codes: SNOMED CT where the meaning is certain, else the label's own number in the scheme 99MAISI.

The codes are those that DICOM PS3.16 lists, as pydicom ships them; a test compares the two. A label whose meaning is only
near to that of a code (`autochthon`, `portal vein and splenic vein`, `body`: what is left of it) has none.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from maisi_cli.anatomy import Label, maisi
from maisi_cli.errors import UsageError
from maisi_cli.volumes import Mask
from pydicom.dataset import Dataset
from pydicom.sr.coding import Code

LONGEST = 64
"""Characters of a long string (LO)."""
SCHEME = "99MAISI"
SCHEME_NAME = "Labels of maisi (MAISI vocabulary, ids 1-255)"
STRUCTURE = Code("91723000", "SCT", "Anatomical Structure")
ABNORMAL = Code("49755003", "SCT", "Morphologically Abnormal Structure")
SIDES = {"left": Code("7771000", "SCT", "Left"), "right": Code("24028007", "SCT", "Right")}

_RIB, _LUNG_UPPER, _LUNG_LOWER = ("113197003", "Rib"), ("45653009", "Upper lobe of lung"), ("90572001", "Lower lobe of lung")
_TUMOR, _CYST = ("108369006", "Neoplasm"), ("367643001", "Cyst")

TYPES: Mapping[int, tuple[str, str]] = {
    1: ("10200004", "Liver"), 3: ("78961009", "Spleen"), 4: ("15776009", "Pancreas"), 5: ("64033007", "Kidney"),
    6: ("15825003", "Aorta"), 7: ("64131007", "Inferior vena cava"), 8: ("23451007", "Adrenal gland"),
    9: ("23451007", "Adrenal gland"), 10: ("28231008", "Gallbladder"), 11: ("32849002", "Esophagus"),
    12: ("69695003", "Stomach"), 13: ("38848004", "Duodenum"), 14: ("64033007", "Kidney"), 15: ("89837001", "Bladder"),
    19: ("30315005", "Small intestine"), 22: ("12738006", "Brain"), 23: _TUMOR, 24: _TUMOR, 26: _TUMOR, 27: _TUMOR,
    28: _LUNG_UPPER, 29: _LUNG_LOWER, 30: _LUNG_UPPER, 31: ("72481006", "Middle lobe of right lung"), 32: _LUNG_LOWER,
    33: ("49668003", "L5 vertebra"), 34: ("11994002", "L4 vertebra"), 35: ("36470004", "L3 vertebra"),
    36: ("14293000", "L2 vertebra"), 37: ("66794005", "L1 vertebra"), 38: ("23215003", "T12 vertebra"),
    39: ("12989004", "T11 vertebra"), 40: ("7610001", "T10 vertebra"), 41: ("82687006", "T9 vertebra"),
    42: ("11068009", "T8 vertebra"), 43: ("62487009", "T7 vertebra"), 44: ("45296009", "T6 vertebra"),
    45: ("56401006", "T5 vertebra"), 46: ("73071006", "T4 vertebra"), 47: ("1626008", "T3 vertebra"),
    48: ("53733008", "T2 vertebra"), 49: ("64864005", "T1 vertebra"), 50: ("87391001", "C7 vertebra"),
    51: ("36054005", "C6 vertebra"), 52: ("36978003", "C5 vertebra"), 53: ("5329002", "C4 vertebra"),
    54: ("113205007", "C3 vertebra"), 55: ("39976000", "C2 vertebra"), 56: ("14806007", "C1 vertebra"),
    57: ("44567001", "Trachea"), 58: ("10293006", "Iliac artery"), 59: ("10293006", "Iliac artery"),
    60: ("244411005", "Iliac vein"), 61: ("244411005", "Iliac vein"), 62: ("71854001", "Colon"),
    **dict.fromkeys(range(63, 87), _RIB), 87: ("85050009", "Humerus"), 88: ("85050009", "Humerus"), 89: ("79601000", "Scapula"),
    90: ("79601000", "Scapula"), 91: ("51299004", "Clavicle"), 92: ("51299004", "Clavicle"), 93: ("71341001", "Femur"),
    94: ("71341001", "Femur"), 97: ("54735007", "Sacrum"), 108: ("33626005", "Left auricular appendage"),
    109: ("12691009", "Innominate artery"), 110: ("8887007", "Innominate vein"), 111: ("8887007", "Innominate vein"),
    112: ("32062004", "Common carotid artery"), 113: ("32062004", "Common carotid artery"), 114: ("50016007", "Costal Cartilage"),
    115: ("80891009", "Heart"), 116: _CYST, 117: _CYST, 118: ("41216001", "Prostate"), 119: ("122972007", "Pulmonary vein"),
    120: ("89546000", "Skull"), 121: ("2748008", "Spinal cord"), 122: ("56873002", "Sternum"),
    123: ("36765005", "Subclavian artery"), 124: ("36765005", "Subclavian artery"), 125: ("48345005", "Superior vena cava"),
    126: ("69748006", "Thyroid"), 128: ("52988006", "Lesion"), 132: ("89187006", "Airway structure"),
}  # fmt: skip
SIDE_IN_CODE = frozenset({31, 108})
"""Labels whose code says the side itself."""
SITES: Mapping[int, tuple[str, str]] = {
    23: ("39607008", "Lung"), 24: TYPES[4], 26: TYPES[1], 27: TYPES[62], 116: TYPES[14], 117: TYPES[5], 128: ("272673000", "Bone"),
}  # fmt: skip
"""Where the lesions lie."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Concept:
    """A label as it is written: name, colour (RGB), and codes for category, type, side and site."""

    id: int
    name: str
    color: tuple[int, int, int]
    category: Code
    type: Code
    side: Code | None
    site: Code | None


def concept(label: Label) -> Concept:
    """Return the codes of a label."""
    name, known = label.name[:LONGEST], TYPES.get(label.id)
    site = SITES.get(label.id)
    return Concept(
        id=label.id, name=name, color=label.color,
        category=ABNORMAL if label.group in ("tumor", "cyst") else STRUCTURE,
        type=Code(known[0], "SCT", known[1]) if known else Code(str(label.id), SCHEME, name),
        side=SIDES[label.side] if label.side and label.id not in SIDE_IN_CODE else None,
        site=Code(site[0], "SCT", site[1]) if site else None,
    )  # fmt: skip


def concepts_of(mask: Mask) -> list[Concept]:
    """Return what the labels of a mask are, by id. Raises `UsageError` for an empty mask and for another vocabulary."""
    if mask.vocabulary != "maisi":
        raise UsageError(
            f"a mask with labels of {mask.vocabulary} cannot be written as DICOM",
            hint=f"map it first:  maisi labels map --from {mask.vocabulary}",
        )
    ids = mask.ids()
    if not ids:
        raise UsageError("the mask is empty: a segmentation or structure set needs a label", hint="leave the format out")
    vocabulary = maisi()
    return [concept(vocabulary.get(id) or Label(id=id, name=vocabulary.name_of(id), group="unknown")) for id in ids]


def name_scheme(dataset: Dataset, concepts: list[Concept]) -> None:
    """Say in a file whose scheme 99MAISI is, when it is used there."""
    if any(each.type.scheme_designator == SCHEME for each in concepts):
        item = Dataset()
        item.CodingSchemeDesignator, item.CodingSchemeName, item.CodingSchemeResponsibleOrganization = SCHEME, SCHEME_NAME, "maisi"
        dataset.CodingSchemeIdentificationSequence = [item]
