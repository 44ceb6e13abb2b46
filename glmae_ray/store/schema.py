"""Columns of the tables beside the cases; a part of the door to pyarrow, `index`."""

from __future__ import annotations

import pyarrow as pa

_TRIPLE = pa.list_(pa.int32(), 3)
_AFFINE = pa.list_(pa.float64(), 16)
_PER_CHANNEL = pa.list_(pa.float64())

SCHEMA = pa.schema(
    [
        ("case_id", pa.string()),
        ("subject", pa.string()),
        ("split", pa.string()),  # train, val, test
        ("modality", pa.string()),
        ("channels", pa.int32()),
        ("shape", _TRIPLE),  # level 0, (Z, Y, X)
        ("spacing", pa.list_(pa.float64(), 3)),  # level 0, (Z, Y, X) in mm
        ("affine", _AFFINE),  # row by row: canonical index (z, y, x, 1) to RAS+ mm
        ("source_affine", _AFFINE),  # row by row: file index (x, y, z, 1) to RAS+ mm
        ("source_shape", _TRIPLE),  # file axes (X, Y, Z)
        ("dtype", pa.string()),
        ("minimum", _PER_CHANNEL),  # this and the next six: intensities inside the
        ("maximum", _PER_CHANNEL),  # foreground box, in stored units
        ("p0_5", _PER_CHANNEL),
        ("p50", _PER_CHANNEL),
        ("p99_5", _PER_CHANNEL),
        ("mean", _PER_CHANNEL),
        ("std", _PER_CHANNEL),
        ("box_start", _TRIPLE),  # foreground box in level-0 voxels (Z, Y, X)
        ("box_stop", _TRIPLE),  # exclusive
        ("factors", pa.list_(_TRIPLE)),  # per level: level-0 voxels per voxel (Z, Y, X)
        ("structures", pa.map_(pa.string(), pa.int64())),  # labels present: voxels
        ("annotated", pa.list_(pa.string())),  # structures looked for; null: nobody says
        ("filled", pa.int64()),  # voxels that were NaN or infinite and were given a value
        ("acquisition", pa.map_(pa.string(), pa.string())),  # technical facts, from DICOM
        ("source", pa.string()),  # location of the first file
        ("source_hash", pa.string()),  # SHA-256 of the files of images and label map, in order
        ("source_stamp", pa.string()),  # paths, sizes, times: equal means not worth opening
        ("voxel_hash", pa.string()),  # SHA-256 of shape and voxels of level 0
        ("reader", pa.string()),
        ("ingest_version", pa.int32()),
        ("options", pa.map_(pa.string(), pa.string())),  # choices that shaped this case
    ]
)
QUARANTINE_SCHEMA = pa.schema(
    [
        ("source", pa.string()),
        ("reason", pa.string()),
        ("message", pa.string()),
        ("stamp", pa.string()),  # of files and choices: equal means not worth another try
        ("voxel_hash", pa.string()),  # of a duplicate
    ]
)
FILES_SCHEMA = pa.schema(
    [
        ("location", pa.string()),
        ("size", pa.int64()),
        ("stamp", pa.string()),
        ("outcome", pa.string()),  # case, quarantined, not_an_image
        ("case_id", pa.string()),
        ("dicom", pa.string()),  # JSON of the header's facts: not worth opening again
    ]
)
