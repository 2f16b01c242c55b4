"""How GGUF stores the values of a tensor: plain, or in blocks of small integers with common scales.

The layouts of the blocks, as ggml defines them (``d`` and the minima are float16; a value is stored in the low or the
high half of a byte, all low halves first)::

    type   values  bytes  layout                                                   value
    Q4_0       32     18  d, 16 bytes of halves                                    d * (half - 8)
    Q4_1       32     20  d, m, 16 bytes of halves                                 d * half + m
    Q8_0       32     34  d, 32 signed bytes                                       d * byte
    Q4_K      256    144  d, dmin, 12 bytes of scales, 128 bytes of halves         d * scale * half - dmin * minimum
    Q6_K      256    210  128 bytes of low halves, 64 bytes of upper bits,         d * scale * (six bits - 32)
                          16 signed scales, d

Q4_K has eight scales and eight minima of six bits, for 32 values each; Q6_K sixteen scales, for 16 values each.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class TensorType:
    """``is_plain``: the values stand for themselves, one per block."""

    name: str
    block_values: int
    block_bytes: int

    @property
    def is_plain(self) -> bool:
        return self.block_values == 1


F32 = TensorType("F32", 1, 4)
F16 = TensorType("F16", 1, 2)
BF16 = TensorType("BF16", 1, 2)
Q4_0 = TensorType("Q4_0", 32, 18)
Q4_1 = TensorType("Q4_1", 32, 20)
Q8_0 = TensorType("Q8_0", 32, 34)
Q4_K = TensorType("Q4_K", 256, 144)
Q6_K = TensorType("Q6_K", 256, 210)
READABLE_TYPES = (F32, F16, BF16, Q4_0, Q4_1, Q8_0, Q4_K, Q6_K)

_BY_ID = {0: F32, 1: F16, 2: Q4_0, 3: Q4_1, 8: Q8_0, 12: Q4_K, 14: Q6_K, 30: BF16}
_OTHER_NAMES = {
    6: "Q5_0",
    7: "Q5_1",
    9: "Q8_1",
    10: "Q2_K",
    11: "Q3_K",
    13: "Q5_K",
    15: "Q8_K",
    16: "IQ2_XXS",
    17: "IQ2_XS",
    18: "IQ3_XXS",
    19: "IQ1_S",
    20: "IQ4_NL",
    21: "IQ3_S",
    22: "IQ2_S",
    23: "IQ4_XS",
    24: "I8",
    25: "I16",
    26: "I32",
    27: "I64",
    28: "F64",
    29: "IQ1_M",
    34: "TQ1_0",
    35: "TQ2_0",
    39: "MXFP4",
}


def tensor_type(type_id: int) -> TensorType | None:
    """The type with ggml's number ``type_id``, or None for one that is not read here."""
    return _BY_ID.get(type_id)


def type_name(type_id: int) -> str:
    """What users call the type."""
    kind = _BY_ID.get(type_id)
    return kind.name if kind is not None else _OTHER_NAMES.get(type_id, f"type {type_id}")
