from dcnr.adapters.grpc.generated import messages_pb2 as _messages_pb2
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class CreateDataset(_message.Message):
    __slots__ = ("manifest",)
    MANIFEST_FIELD_NUMBER: _ClassVar[int]
    manifest: bytes
    def __init__(self, manifest: _Optional[bytes] = ...) -> None: ...

class DatasetCreated(_message.Message):
    __slots__ = ("dataset",)
    DATASET_FIELD_NUMBER: _ClassVar[int]
    dataset: str
    def __init__(self, dataset: _Optional[str] = ...) -> None: ...

class GetDataset(_message.Message):
    __slots__ = ("name",)
    NAME_FIELD_NUMBER: _ClassVar[int]
    name: str
    def __init__(self, name: _Optional[str] = ...) -> None: ...

class DatasetManifest(_message.Message):
    __slots__ = ("dataset", "manifest")
    DATASET_FIELD_NUMBER: _ClassVar[int]
    MANIFEST_FIELD_NUMBER: _ClassVar[int]
    dataset: str
    manifest: bytes
    def __init__(self, dataset: _Optional[str] = ..., manifest: _Optional[bytes] = ...) -> None: ...

class ListDatasets(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class DeleteDataset(_message.Message):
    __slots__ = ("name",)
    NAME_FIELD_NUMBER: _ClassVar[int]
    name: str
    def __init__(self, name: _Optional[str] = ...) -> None: ...

class DatasetDeleted(_message.Message):
    __slots__ = ("dataset",)
    DATASET_FIELD_NUMBER: _ClassVar[int]
    dataset: str
    def __init__(self, dataset: _Optional[str] = ...) -> None: ...

class PutChunk(_message.Message):
    __slots__ = ("key", "token", "size", "data")
    KEY_FIELD_NUMBER: _ClassVar[int]
    TOKEN_FIELD_NUMBER: _ClassVar[int]
    SIZE_FIELD_NUMBER: _ClassVar[int]
    DATA_FIELD_NUMBER: _ClassVar[int]
    key: str
    token: str
    size: int
    data: bytes
    def __init__(self, key: _Optional[str] = ..., token: _Optional[str] = ..., size: _Optional[int] = ..., data: _Optional[bytes] = ...) -> None: ...

class ObjectStored(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class GetObject(_message.Message):
    __slots__ = ("key", "token", "signed")
    KEY_FIELD_NUMBER: _ClassVar[int]
    TOKEN_FIELD_NUMBER: _ClassVar[int]
    SIGNED_FIELD_NUMBER: _ClassVar[int]
    key: str
    token: str
    signed: bool
    def __init__(self, key: _Optional[str] = ..., token: _Optional[str] = ..., signed: bool = ...) -> None: ...

class DataChunk(_message.Message):
    __slots__ = ("size", "url", "data")
    SIZE_FIELD_NUMBER: _ClassVar[int]
    URL_FIELD_NUMBER: _ClassVar[int]
    DATA_FIELD_NUMBER: _ClassVar[int]
    size: int
    url: str
    data: bytes
    def __init__(self, size: _Optional[int] = ..., url: _Optional[str] = ..., data: _Optional[bytes] = ...) -> None: ...

class RowsChunk(_message.Message):
    __slots__ = ("column", "tensor", "size", "data")
    COLUMN_FIELD_NUMBER: _ClassVar[int]
    TENSOR_FIELD_NUMBER: _ClassVar[int]
    SIZE_FIELD_NUMBER: _ClassVar[int]
    DATA_FIELD_NUMBER: _ClassVar[int]
    column: str
    tensor: _messages_pb2.Tensor
    size: int
    data: bytes
    def __init__(self, column: _Optional[str] = ..., tensor: _Optional[_Union[_messages_pb2.Tensor, _Mapping]] = ..., size: _Optional[int] = ..., data: _Optional[bytes] = ...) -> None: ...
