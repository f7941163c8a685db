"""A real ONNX file of a few hundred bytes: the mean colour of a picture as its descriptor.

Written by hand in protobuf's wire format (onnx.proto3, IR version 8), so that the tests need no
exporter.
"""

FLOAT, UINT8 = 1, 2


def mean_colour_onnx(
    elem_type: int = FLOAT, shape: tuple[int | str, ...] = ("n", 3, "h", "w")
) -> bytes:
    """Return a model that averages its input over all axes but the first two."""
    pool = _node("GlobalAveragePool", "image", "pooled")
    flatten = _node("Flatten", "pooled", "embedding")
    graph = (
        _field(1, pool)
        + _field(1, flatten)
        + _field(2, b"mean colour")
        + _field(11, _value("image", elem_type, shape))
        + _field(12, _value("embedding", FLOAT, ("n", 3)))
    )
    return _varint(1, 8) + _field(7, graph) + _field(8, _field(1, b"") + _varint(2, 13))


def _node(op_type: str, source: str, target: str) -> bytes:
    return _field(1, source.encode()) + _field(2, target.encode()) + _field(4, op_type.encode())


def _value(name: str, elem_type: int, shape: tuple[int | str, ...]) -> bytes:
    dimensions = b"".join(
        _field(1, _varint(1, edge) if isinstance(edge, int) else _field(2, edge.encode()))
        for edge in shape
    )
    tensor = _varint(1, elem_type) + _field(2, dimensions)
    return _field(1, name.encode()) + _field(2, _field(1, tensor))


def _field(number: int, content: bytes) -> bytes:
    return bytes([number << 3 | 2]) + _base_128(len(content)) + content


def _varint(number: int, value: int) -> bytes:
    return bytes([number << 3]) + _base_128(value)


def _base_128(value: int) -> bytes:
    parts = [value & 127]
    while value := value >> 7:
        parts.append(value & 127)
    return bytes([*(part | 128 for part in parts[:-1]), parts[-1]])
