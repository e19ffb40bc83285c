"""Who a synthetic patient is: names, UIDs and the attributes that all files of a sample share.

UIDs are fresh in every process: name-based UUIDs below the root 2.25, made of a random number of the process and of what
the sample holds and where it goes. So the formats of one run, each called on its own, agree on the series that they refer
to, and no two runs ever share a UID.
"""

from __future__ import annotations

import datetime
import hashlib
import uuid
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from maisi_cli import __version__
from maisi_cli.volumes import Sample
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.uid import UID

RUN = uuid.uuid4()
STARTED = datetime.datetime.now()
MANUFACTURER = "maisi"
IMPLEMENTATION = UID("2.25.268104542332239794936652569025893058795")
DERIVATION = f"Synthetic: made by maisi {__version__}; it shows no patient and comes from no scanner"
LONGEST = 64
"""Characters that a long string (LO) and a component of a name (PN) may have; bytes are counted, as many readers do."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Identity:
    """What the files of one sample have in common."""

    id: str
    key: uuid.UUID

    def uid(self, *role: str | int) -> UID:
        """Return the UID of one thing of this sample: a study, a series, a slice."""
        return UID(f"2.25.{uuid.uuid5(self.key, ' '.join(map(str, role))).int}")

    @property
    def patient(self) -> str:
        """An id that no other synthetic patient has, SYNTHETIC in front."""
        return _text("SYNTHETIC-{}-" + self.key.hex[:8], self.id)


def identify(sample: Sample, folder: Path) -> Identity:
    """Return the identity of a sample that is saved to `folder`: the same for equal content in this process."""
    digest = hashlib.sha256(f"{folder.resolve()}\n{sample.id}\n".encode())
    for item in (sample.image, sample.mask):
        if item is not None:
            digest.update(f"{item.geometry!r} {item.array.dtype}".encode())
            digest.update(np.ascontiguousarray(item.array).data)
        digest.update(b"\n")
    return Identity(id=sample.id, key=uuid.uuid5(RUN, digest.hexdigest()))


def mark(dataset: Dataset, identity: Identity, *, modality: str, series: str, number: int, description: str) -> None:
    """Set the attributes of patient, study, series, equipment and instance that are the same in all kinds of files."""
    now = datetime.datetime.now()
    values: dict[str, Any] = {
        "SpecificCharacterSet": "ISO_IR 192",
        "InstanceCreationDate": _date(now), "InstanceCreationTime": _time(now), "ContentDate": _date(now), "ContentTime": _time(now),
        "SyntheticData": "YES",
        "PatientName": _text("SYNTHETIC^{}", _name(identity.id)), "PatientID": identity.patient,
        "PatientBirthDate": "", "PatientSex": "", "PatientComments": DERIVATION,
        "StudyInstanceUID": identity.uid("study"), "StudyDate": _date(STARTED), "StudyTime": _time(STARTED), "StudyID": "SYNTHETIC",
        "AccessionNumber": "", "ReferringPhysicianName": "", "StudyDescription": f"SYNTHETIC maisi {__version__}",
        "SeriesInstanceUID": identity.uid(series), "SeriesNumber": number, "SeriesDescription": _text("SYNTHETIC {}", description),
        "SeriesDate": _date(STARTED), "SeriesTime": _time(STARTED), "Modality": modality,
        "Manufacturer": MANUFACTURER, "ManufacturerModelName": "maisi", "SoftwareVersions": __version__,
        "FrameOfReferenceUID": identity.uid("frame of reference"), "PositionReferenceIndicator": "",
    }  # fmt: skip
    for keyword, value in values.items():
        setattr(dataset, keyword, value)


def meta(dataset: Dataset, syntax: UID) -> FileMetaDataset:
    """Return the head of a file that holds `dataset` in the transfer syntax `syntax`."""
    made = FileMetaDataset()
    made.MediaStorageSOPClassUID = dataset.SOPClassUID
    made.MediaStorageSOPInstanceUID = dataset.SOPInstanceUID
    made.TransferSyntaxUID = syntax
    made.ImplementationClassUID = IMPLEMENTATION
    made.ImplementationVersionName = f"MAISI {__version__}"[:16]
    return made


def _date(when: datetime.datetime) -> str:
    return when.strftime("%Y%m%d")


def _time(when: datetime.datetime) -> str:
    return when.strftime("%H%M%S.%f")


def _name(text: str) -> str:
    """Return a text without the characters that separate the parts of a person's name."""
    return text.replace("^", "_").replace("=", "_")


def _text(template: str, text: str) -> str:
    """Return a long string: `text`, shortened where it must be, in `template`."""
    room = LONGEST - len(template.format(""))
    return template.format(text.replace("\\", "_").encode()[:room].decode(errors="ignore"))
