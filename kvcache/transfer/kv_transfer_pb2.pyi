from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class TransferMessage(_message.Message):
    __slots__ = ("open", "chunk", "commit")
    OPEN_FIELD_NUMBER: _ClassVar[int]
    CHUNK_FIELD_NUMBER: _ClassVar[int]
    COMMIT_FIELD_NUMBER: _ClassVar[int]
    open: TransferOpen
    chunk: KVChunk
    commit: TransferCommit
    def __init__(self, open: _Optional[_Union[TransferOpen, _Mapping]] = ..., chunk: _Optional[_Union[KVChunk, _Mapping]] = ..., commit: _Optional[_Union[TransferCommit, _Mapping]] = ...) -> None: ...

class TransferOpen(_message.Message):
    __slots__ = ("transfer_id", "epoch", "spec", "num_blocks", "first_block")
    TRANSFER_ID_FIELD_NUMBER: _ClassVar[int]
    EPOCH_FIELD_NUMBER: _ClassVar[int]
    SPEC_FIELD_NUMBER: _ClassVar[int]
    NUM_BLOCKS_FIELD_NUMBER: _ClassVar[int]
    FIRST_BLOCK_FIELD_NUMBER: _ClassVar[int]
    transfer_id: str
    epoch: int
    spec: KVSpec
    num_blocks: int
    first_block: int
    def __init__(self, transfer_id: _Optional[str] = ..., epoch: _Optional[int] = ..., spec: _Optional[_Union[KVSpec, _Mapping]] = ..., num_blocks: _Optional[int] = ..., first_block: _Optional[int] = ...) -> None: ...

class KVSpec(_message.Message):
    __slots__ = ("num_layers", "num_kv_heads", "head_size", "block_size", "dtype")
    NUM_LAYERS_FIELD_NUMBER: _ClassVar[int]
    NUM_KV_HEADS_FIELD_NUMBER: _ClassVar[int]
    HEAD_SIZE_FIELD_NUMBER: _ClassVar[int]
    BLOCK_SIZE_FIELD_NUMBER: _ClassVar[int]
    DTYPE_FIELD_NUMBER: _ClassVar[int]
    num_layers: int
    num_kv_heads: int
    head_size: int
    block_size: int
    dtype: str
    def __init__(self, num_layers: _Optional[int] = ..., num_kv_heads: _Optional[int] = ..., head_size: _Optional[int] = ..., block_size: _Optional[int] = ..., dtype: _Optional[str] = ...) -> None: ...

class KVChunk(_message.Message):
    __slots__ = ("transfer_id", "epoch", "layer", "first_block", "num_blocks", "checksum", "payload", "num_layers", "index")
    TRANSFER_ID_FIELD_NUMBER: _ClassVar[int]
    EPOCH_FIELD_NUMBER: _ClassVar[int]
    LAYER_FIELD_NUMBER: _ClassVar[int]
    FIRST_BLOCK_FIELD_NUMBER: _ClassVar[int]
    NUM_BLOCKS_FIELD_NUMBER: _ClassVar[int]
    CHECKSUM_FIELD_NUMBER: _ClassVar[int]
    PAYLOAD_FIELD_NUMBER: _ClassVar[int]
    NUM_LAYERS_FIELD_NUMBER: _ClassVar[int]
    INDEX_FIELD_NUMBER: _ClassVar[int]
    transfer_id: str
    epoch: int
    layer: int
    first_block: int
    num_blocks: int
    checksum: int
    payload: bytes
    num_layers: int
    index: int
    def __init__(self, transfer_id: _Optional[str] = ..., epoch: _Optional[int] = ..., layer: _Optional[int] = ..., first_block: _Optional[int] = ..., num_blocks: _Optional[int] = ..., checksum: _Optional[int] = ..., payload: _Optional[bytes] = ..., num_layers: _Optional[int] = ..., index: _Optional[int] = ...) -> None: ...

class TransferCommit(_message.Message):
    __slots__ = ("transfer_id", "epoch", "num_chunks", "first_token_id", "checksum", "num_cached_tokens")
    TRANSFER_ID_FIELD_NUMBER: _ClassVar[int]
    EPOCH_FIELD_NUMBER: _ClassVar[int]
    NUM_CHUNKS_FIELD_NUMBER: _ClassVar[int]
    FIRST_TOKEN_ID_FIELD_NUMBER: _ClassVar[int]
    CHECKSUM_FIELD_NUMBER: _ClassVar[int]
    NUM_CACHED_TOKENS_FIELD_NUMBER: _ClassVar[int]
    transfer_id: str
    epoch: int
    num_chunks: int
    first_token_id: int
    checksum: int
    num_cached_tokens: int
    def __init__(self, transfer_id: _Optional[str] = ..., epoch: _Optional[int] = ..., num_chunks: _Optional[int] = ..., first_token_id: _Optional[int] = ..., checksum: _Optional[int] = ..., num_cached_tokens: _Optional[int] = ...) -> None: ...

class TransferReceipt(_message.Message):
    __slots__ = ("payload_bytes",)
    PAYLOAD_BYTES_FIELD_NUMBER: _ClassVar[int]
    payload_bytes: int
    def __init__(self, payload_bytes: _Optional[int] = ...) -> None: ...

class ShmMessage(_message.Message):
    __slots__ = ("ring", "open", "chunk", "commit")
    RING_FIELD_NUMBER: _ClassVar[int]
    OPEN_FIELD_NUMBER: _ClassVar[int]
    CHUNK_FIELD_NUMBER: _ClassVar[int]
    COMMIT_FIELD_NUMBER: _ClassVar[int]
    ring: ShmRing
    open: TransferOpen
    chunk: ShmChunk
    commit: TransferCommit
    def __init__(self, ring: _Optional[_Union[ShmRing, _Mapping]] = ..., open: _Optional[_Union[TransferOpen, _Mapping]] = ..., chunk: _Optional[_Union[ShmChunk, _Mapping]] = ..., commit: _Optional[_Union[TransferCommit, _Mapping]] = ...) -> None: ...

class ShmRing(_message.Message):
    __slots__ = ("num_slots", "slot_bytes")
    NUM_SLOTS_FIELD_NUMBER: _ClassVar[int]
    SLOT_BYTES_FIELD_NUMBER: _ClassVar[int]
    num_slots: int
    slot_bytes: int
    def __init__(self, num_slots: _Optional[int] = ..., slot_bytes: _Optional[int] = ...) -> None: ...

class ShmChunk(_message.Message):
    __slots__ = ("chunk", "slot", "payload_bytes")
    CHUNK_FIELD_NUMBER: _ClassVar[int]
    SLOT_FIELD_NUMBER: _ClassVar[int]
    PAYLOAD_BYTES_FIELD_NUMBER: _ClassVar[int]
    chunk: KVChunk
    slot: int
    payload_bytes: int
    def __init__(self, chunk: _Optional[_Union[KVChunk, _Mapping]] = ..., slot: _Optional[int] = ..., payload_bytes: _Optional[int] = ...) -> None: ...

class ShmReply(_message.Message):
    __slots__ = ("taken", "receipt", "refusal")
    TAKEN_FIELD_NUMBER: _ClassVar[int]
    RECEIPT_FIELD_NUMBER: _ClassVar[int]
    REFUSAL_FIELD_NUMBER: _ClassVar[int]
    taken: ShmTaken
    receipt: TransferReceipt
    refusal: TransferRefusal
    def __init__(self, taken: _Optional[_Union[ShmTaken, _Mapping]] = ..., receipt: _Optional[_Union[TransferReceipt, _Mapping]] = ..., refusal: _Optional[_Union[TransferRefusal, _Mapping]] = ...) -> None: ...

class ShmTaken(_message.Message):
    __slots__ = ("slot",)
    SLOT_FIELD_NUMBER: _ClassVar[int]
    slot: int
    def __init__(self, slot: _Optional[int] = ...) -> None: ...

class TransferRefusal(_message.Message):
    __slots__ = ("fault", "message")
    FAULT_FIELD_NUMBER: _ClassVar[int]
    MESSAGE_FIELD_NUMBER: _ClassVar[int]
    fault: str
    message: str
    def __init__(self, fault: _Optional[str] = ..., message: _Optional[str] = ...) -> None: ...

class RdmaMessage(_message.Message):
    __slots__ = ("ring", "open", "chunk", "commit")
    RING_FIELD_NUMBER: _ClassVar[int]
    OPEN_FIELD_NUMBER: _ClassVar[int]
    CHUNK_FIELD_NUMBER: _ClassVar[int]
    COMMIT_FIELD_NUMBER: _ClassVar[int]
    ring: RdmaRing
    open: TransferOpen
    chunk: ShmChunk
    commit: TransferCommit
    def __init__(self, ring: _Optional[_Union[RdmaRing, _Mapping]] = ..., open: _Optional[_Union[TransferOpen, _Mapping]] = ..., chunk: _Optional[_Union[ShmChunk, _Mapping]] = ..., commit: _Optional[_Union[TransferCommit, _Mapping]] = ...) -> None: ...

class RdmaRing(_message.Message):
    __slots__ = ("session", "address", "num_slots", "slot_bytes")
    SESSION_FIELD_NUMBER: _ClassVar[int]
    ADDRESS_FIELD_NUMBER: _ClassVar[int]
    NUM_SLOTS_FIELD_NUMBER: _ClassVar[int]
    SLOT_BYTES_FIELD_NUMBER: _ClassVar[int]
    session: str
    address: int
    num_slots: int
    slot_bytes: int
    def __init__(self, session: _Optional[str] = ..., address: _Optional[int] = ..., num_slots: _Optional[int] = ..., slot_bytes: _Optional[int] = ...) -> None: ...

class RdmaReply(_message.Message):
    __slots__ = ("taken", "receipt")
    TAKEN_FIELD_NUMBER: _ClassVar[int]
    RECEIPT_FIELD_NUMBER: _ClassVar[int]
    taken: ShmTaken
    receipt: TransferReceipt
    def __init__(self, taken: _Optional[_Union[ShmTaken, _Mapping]] = ..., receipt: _Optional[_Union[TransferReceipt, _Mapping]] = ...) -> None: ...
