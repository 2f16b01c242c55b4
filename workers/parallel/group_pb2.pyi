from google.protobuf.internal import containers as _containers
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class Hello(_message.Message):
    __slots__ = ("rank",)
    RANK_FIELD_NUMBER: _ClassVar[int]
    rank: int
    def __init__(self, rank: _Optional[int] = ...) -> None: ...

class Welcome(_message.Message):
    __slots__ = ("store_port",)
    STORE_PORT_FIELD_NUMBER: _ClassVar[int]
    store_port: int
    def __init__(self, store_port: _Optional[int] = ...) -> None: ...

class Ready(_message.Message):
    __slots__ = ("error",)
    ERROR_FIELD_NUMBER: _ClassVar[int]
    error: str
    def __init__(self, error: _Optional[str] = ...) -> None: ...

class Chunk(_message.Message):
    __slots__ = ("token_ids", "start", "block_table", "num_logits")
    TOKEN_IDS_FIELD_NUMBER: _ClassVar[int]
    START_FIELD_NUMBER: _ClassVar[int]
    BLOCK_TABLE_FIELD_NUMBER: _ClassVar[int]
    NUM_LOGITS_FIELD_NUMBER: _ClassVar[int]
    token_ids: _containers.RepeatedScalarFieldContainer[int]
    start: int
    block_table: _containers.RepeatedScalarFieldContainer[int]
    num_logits: int
    def __init__(self, token_ids: _Optional[_Iterable[int]] = ..., start: _Optional[int] = ..., block_table: _Optional[_Iterable[int]] = ..., num_logits: _Optional[int] = ...) -> None: ...

class Step(_message.Message):
    __slots__ = ("chunks",)
    CHUNKS_FIELD_NUMBER: _ClassVar[int]
    chunks: _containers.RepeatedCompositeFieldContainer[Chunk]
    def __init__(self, chunks: _Optional[_Iterable[_Union[Chunk, _Mapping]]] = ...) -> None: ...

class Measure(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class Rates(_message.Message):
    __slots__ = ("gemm_gflop_s", "read_gb_s", "gemm_rates", "attention_gb_s")
    GEMM_GFLOP_S_FIELD_NUMBER: _ClassVar[int]
    READ_GB_S_FIELD_NUMBER: _ClassVar[int]
    GEMM_RATES_FIELD_NUMBER: _ClassVar[int]
    ATTENTION_GB_S_FIELD_NUMBER: _ClassVar[int]
    gemm_gflop_s: float
    read_gb_s: float
    gemm_rates: _containers.RepeatedCompositeFieldContainer[GemmRate]
    attention_gb_s: float
    def __init__(self, gemm_gflop_s: _Optional[float] = ..., read_gb_s: _Optional[float] = ..., gemm_rates: _Optional[_Iterable[_Union[GemmRate, _Mapping]]] = ..., attention_gb_s: _Optional[float] = ...) -> None: ...

class GemmRate(_message.Message):
    __slots__ = ("rows", "gflop_s")
    ROWS_FIELD_NUMBER: _ClassVar[int]
    GFLOP_S_FIELD_NUMBER: _ClassVar[int]
    rows: int
    gflop_s: float
    def __init__(self, rows: _Optional[int] = ..., gflop_s: _Optional[float] = ...) -> None: ...

class Command(_message.Message):
    __slots__ = ("step", "measure")
    STEP_FIELD_NUMBER: _ClassVar[int]
    MEASURE_FIELD_NUMBER: _ClassVar[int]
    step: Step
    measure: Measure
    def __init__(self, step: _Optional[_Union[Step, _Mapping]] = ..., measure: _Optional[_Union[Measure, _Mapping]] = ...) -> None: ...

class Blocks(_message.Message):
    __slots__ = ("layer", "block_ids", "are_written")
    LAYER_FIELD_NUMBER: _ClassVar[int]
    BLOCK_IDS_FIELD_NUMBER: _ClassVar[int]
    ARE_WRITTEN_FIELD_NUMBER: _ClassVar[int]
    layer: int
    block_ids: _containers.RepeatedScalarFieldContainer[int]
    are_written: bool
    def __init__(self, layer: _Optional[int] = ..., block_ids: _Optional[_Iterable[int]] = ..., are_written: _Optional[bool] = ...) -> None: ...
