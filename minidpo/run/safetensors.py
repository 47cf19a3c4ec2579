"""The safetensors format: 8 bytes of header length, a JSON header, the data. No pickle; everything is checked."""

import hashlib
import json
import math
import os
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeGuard

import numpy

from .files import CheckpointError, json_object, open_regular

BFLOAT16 = numpy.dtype([("bfloat16", "<u2")])  # the upper two bytes of a float32, which NumPy has no type for
DTYPES: dict[str, Any] = {"BF16": BFLOAT16, "F16": "<f2", "F32": "<f4", "F64": "<f8", "I8": "|i1", "I16": "<i2"}
DTYPES |= {"I32": "<i4", "I64": "<i8", "U8": "|u1", "U16": "<u2", "U32": "<u4", "U64": "<u8", "BOOL": "|b1"}
NAMES = {numpy.dtype(code): name for name, code in DTYPES.items()}
SUMS = ("sha256", "header_sha256")  # the names of the checksums in the metadata
MOST_HEADER = 100 * 2**20  # bytes; the limit of the format


def to_bytes(arrays: Mapping[str, numpy.ndarray], metadata: Mapping[str, str]) -> bytes:
    """Arrays in the safetensors format; the metadata gains a SHA-256 of the data and one of the rest of the header."""
    for key, value in metadata.items():
        if not (isinstance(key, str) and isinstance(value, str)) or key in SUMS:
            raise CheckpointError(f"metadata {key!a}: {value!a} cannot be written")
    entries: dict[str, Any] = {}
    chunks, end = [], 0
    for name, array in arrays.items():
        if name == "__metadata__" or array.dtype.newbyteorder("<") not in NAMES:
            raise CheckpointError(f"an array {name!a} of {array.dtype} cannot be written")
        chunks.append(numpy.ascontiguousarray(array, dtype=array.dtype.newbyteorder("<")).tobytes())
        start, end = end, end + len(chunks[-1])
        entries[name] = {
            "dtype": NAMES[array.dtype.newbyteorder("<")],
            "shape": list(array.shape),
            "data_offsets": [start, end],
        }
    data = b"".join(chunks)
    sums = {"sha256": hashlib.sha256(data).hexdigest(), "header_sha256": header_sum(metadata, entries)}
    document = json.dumps({"__metadata__": {**metadata, **sums}, **entries}).encode()
    document += b" " * (-len(document) % 8)
    return struct.pack("<Q", len(document)) + document + data


def read(path: Path) -> tuple[dict[str, numpy.ndarray], dict[str, str], bool]:
    """Arrays and metadata of a safetensors file, and whether it carried both checksums of `to_bytes`.

    Lengths, offsets, shapes and dtypes are checked against the size of the file before anything is allocated.
    """

    def fault(sentence: str) -> CheckpointError:
        return CheckpointError(f"{path}: {sentence}")

    try:
        with open_regular(path) as file:
            size = os.fstat(file.fileno()).st_size
            if size < 8:
                raise fault(f"{size} bytes are too few for a safetensors file")
            (length,) = struct.unpack("<Q", file.read(8))
            if length > min(size - 8, MOST_HEADER):
                raise fault(f"a header of {length} bytes cannot be in a file of {size}: truncated, or not safetensors")
            header = json_object(file.read(length), f"{path}: the header")
            data = file.read()
    except OSError as error:
        raise fault(f"cannot be read ({error.strerror})") from error
    metadata = header.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise fault("the metadata is not an object of strings")
    sums = {key: metadata.pop(key) for key in SUMS if key in metadata}
    if "sha256" in sums and sums["sha256"] != hashlib.sha256(data).hexdigest():
        raise fault("the data does not match its SHA-256: truncated or corrupted")
    if "header_sha256" in sums and sums["header_sha256"] != header_sum(metadata, header):
        raise fault("the header does not match its SHA-256: corrupted")
    arrays: dict[str, numpy.ndarray] = {}
    spans: list[list[int]] = []
    for name, entry in header.items():
        fields = entry if isinstance(entry, dict) else {}
        dtype, shape, span = fields.get("dtype"), fields.get("shape"), fields.get("data_offsets")
        if not isinstance(dtype, str) or dtype not in DTYPES:
            raise fault(f"{name!a} has dtype {dtype!a}, known are {', '.join(DTYPES)}")
        if not (are_sizes(shape) and are_sizes(span)) or len(span) != 2:
            raise fault(f"{name!a} lacks a shape or a place in the data")
        count = math.prod(shape)
        if not span[0] <= span[1] <= len(data) or span[1] - span[0] != count * numpy.dtype(DTYPES[dtype]).itemsize:
            raise fault(
                f"{name!a} of shape {shape} does not fit bytes {span[0]} to {span[1]} of {len(data)}: truncated?"
            )
        flat = numpy.frombuffer(data, DTYPES[dtype], count, offset=span[0]) if count else numpy.empty(0, DTYPES[dtype])
        try:
            arrays[name] = flat.reshape(shape).copy()
        except ValueError as error:  # without entries, and yet too large for NumPy
            raise fault(f"{name!a} cannot have shape {shape}") from error
        spans.append(span)
    spans.sort()
    if [0, *(end for _, end in spans)] != [*(start for start, _ in spans), len(data)]:
        raise fault("the arrays overlap, or do not fill the data")
    return arrays, metadata, len(sums) == 2


def header_sum(metadata: Mapping[str, str], entries: Mapping[str, Any]) -> str:
    """SHA-256 of a header without the sums themselves."""
    return hashlib.sha256(json.dumps([dict(metadata), dict(entries)], sort_keys=True).encode()).hexdigest()


def are_sizes(x: Any) -> TypeGuard[list[int]]:
    """Whether x is a list of at most 64 integers, none negative."""
    return isinstance(x, list) and len(x) <= 64 and all(type(n) is int and n >= 0 for n in x)
