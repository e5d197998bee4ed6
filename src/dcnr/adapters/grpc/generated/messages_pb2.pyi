from google.protobuf.internal import containers as _containers
from google.protobuf.internal import enum_type_wrapper as _enum_type_wrapper
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class Direction(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    DIRECTION_FORWARD: _ClassVar[Direction]
    DIRECTION_BACKWARD: _ClassVar[Direction]

class FrameStatus(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    FRAME_STATUS_ACCEPTED: _ClassVar[FrameStatus]
    FRAME_STATUS_DUPLICATE: _ClassVar[FrameStatus]
    FRAME_STATUS_STALE: _ClassVar[FrameStatus]
    FRAME_STATUS_NO_TICKET: _ClassVar[FrameStatus]
    FRAME_STATUS_REFUSED: _ClassVar[FrameStatus]
DIRECTION_FORWARD: Direction
DIRECTION_BACKWARD: Direction
FRAME_STATUS_ACCEPTED: FrameStatus
FRAME_STATUS_DUPLICATE: FrameStatus
FRAME_STATUS_STALE: FrameStatus
FRAME_STATUS_NO_TICKET: FrameStatus
FRAME_STATUS_REFUSED: FrameStatus

class Incarnation(_message.Message):
    __slots__ = ("boot", "nonce")
    BOOT_FIELD_NUMBER: _ClassVar[int]
    NONCE_FIELD_NUMBER: _ClassVar[int]
    boot: int
    nonce: str
    def __init__(self, boot: _Optional[int] = ..., nonce: _Optional[str] = ...) -> None: ...

class Tensor(_message.Message):
    __slots__ = ("shape", "dtype", "digest")
    SHAPE_FIELD_NUMBER: _ClassVar[int]
    DTYPE_FIELD_NUMBER: _ClassVar[int]
    DIGEST_FIELD_NUMBER: _ClassVar[int]
    shape: _containers.RepeatedScalarFieldContainer[int]
    dtype: str
    digest: str
    def __init__(self, shape: _Optional[_Iterable[int]] = ..., dtype: _Optional[str] = ..., digest: _Optional[str] = ...) -> None: ...

class VNodeVersion(_message.Message):
    __slots__ = ("vnode", "version")
    VNODE_FIELD_NUMBER: _ClassVar[int]
    VERSION_FIELD_NUMBER: _ClassVar[int]
    vnode: str
    version: int
    def __init__(self, vnode: _Optional[str] = ..., version: _Optional[int] = ...) -> None: ...

class StepScale(_message.Message):
    __slots__ = ("step", "scale")
    STEP_FIELD_NUMBER: _ClassVar[int]
    SCALE_FIELD_NUMBER: _ClassVar[int]
    step: int
    scale: float
    def __init__(self, step: _Optional[int] = ..., scale: _Optional[float] = ...) -> None: ...

class StepMicrobatch(_message.Message):
    __slots__ = ("step", "microbatch")
    STEP_FIELD_NUMBER: _ClassVar[int]
    MICROBATCH_FIELD_NUMBER: _ClassVar[int]
    step: int
    microbatch: int
    def __init__(self, step: _Optional[int] = ..., microbatch: _Optional[int] = ...) -> None: ...

class Capabilities(_message.Message):
    __slots__ = ("cores", "memory_bytes", "architecture", "numeric_class", "class_facts", "gflops", "threads", "workers", "accelerator", "catalogue", "hostname")
    CORES_FIELD_NUMBER: _ClassVar[int]
    MEMORY_BYTES_FIELD_NUMBER: _ClassVar[int]
    ARCHITECTURE_FIELD_NUMBER: _ClassVar[int]
    NUMERIC_CLASS_FIELD_NUMBER: _ClassVar[int]
    CLASS_FACTS_FIELD_NUMBER: _ClassVar[int]
    GFLOPS_FIELD_NUMBER: _ClassVar[int]
    THREADS_FIELD_NUMBER: _ClassVar[int]
    WORKERS_FIELD_NUMBER: _ClassVar[int]
    ACCELERATOR_FIELD_NUMBER: _ClassVar[int]
    CATALOGUE_FIELD_NUMBER: _ClassVar[int]
    HOSTNAME_FIELD_NUMBER: _ClassVar[int]
    cores: int
    memory_bytes: int
    architecture: str
    numeric_class: str
    class_facts: _containers.RepeatedScalarFieldContainer[str]
    gflops: float
    threads: int
    workers: int
    accelerator: str
    catalogue: str
    hostname: str
    def __init__(self, cores: _Optional[int] = ..., memory_bytes: _Optional[int] = ..., architecture: _Optional[str] = ..., numeric_class: _Optional[str] = ..., class_facts: _Optional[_Iterable[str]] = ..., gflops: _Optional[float] = ..., threads: _Optional[int] = ..., workers: _Optional[int] = ..., accelerator: _Optional[str] = ..., catalogue: _Optional[str] = ..., hostname: _Optional[str] = ...) -> None: ...

class Descriptor(_message.Message):
    __slots__ = ("peer", "incarnation", "role", "addresses", "version_min", "version_max")
    PEER_FIELD_NUMBER: _ClassVar[int]
    INCARNATION_FIELD_NUMBER: _ClassVar[int]
    ROLE_FIELD_NUMBER: _ClassVar[int]
    ADDRESSES_FIELD_NUMBER: _ClassVar[int]
    VERSION_MIN_FIELD_NUMBER: _ClassVar[int]
    VERSION_MAX_FIELD_NUMBER: _ClassVar[int]
    peer: str
    incarnation: Incarnation
    role: str
    addresses: _containers.RepeatedScalarFieldContainer[str]
    version_min: int
    version_max: int
    def __init__(self, peer: _Optional[str] = ..., incarnation: _Optional[_Union[Incarnation, _Mapping]] = ..., role: _Optional[str] = ..., addresses: _Optional[_Iterable[str]] = ..., version_min: _Optional[int] = ..., version_max: _Optional[int] = ...) -> None: ...

class Register(_message.Message):
    __slots__ = ("descriptor", "capabilities")
    DESCRIPTOR_FIELD_NUMBER: _ClassVar[int]
    CAPABILITIES_FIELD_NUMBER: _ClassVar[int]
    descriptor: Descriptor
    capabilities: Capabilities
    def __init__(self, descriptor: _Optional[_Union[Descriptor, _Mapping]] = ..., capabilities: _Optional[_Union[Capabilities, _Mapping]] = ...) -> None: ...

class Registered(_message.Message):
    __slots__ = ("descriptor", "heartbeat_interval_s")
    DESCRIPTOR_FIELD_NUMBER: _ClassVar[int]
    HEARTBEAT_INTERVAL_S_FIELD_NUMBER: _ClassVar[int]
    descriptor: Descriptor
    heartbeat_interval_s: float
    def __init__(self, descriptor: _Optional[_Union[Descriptor, _Mapping]] = ..., heartbeat_interval_s: _Optional[float] = ...) -> None: ...

class Orchestrators(_message.Message):
    __slots__ = ("addresses",)
    ADDRESSES_FIELD_NUMBER: _ClassVar[int]
    addresses: _containers.RepeatedScalarFieldContainer[str]
    def __init__(self, addresses: _Optional[_Iterable[str]] = ...) -> None: ...

class Leave(_message.Message):
    __slots__ = ("reason",)
    REASON_FIELD_NUMBER: _ClassVar[int]
    reason: str
    def __init__(self, reason: _Optional[str] = ...) -> None: ...

class Progress(_message.Message):
    __slots__ = ("session", "epoch", "tasks_done", "task_age_s", "task_usual_s", "owner", "reserved_bytes")
    SESSION_FIELD_NUMBER: _ClassVar[int]
    EPOCH_FIELD_NUMBER: _ClassVar[int]
    TASKS_DONE_FIELD_NUMBER: _ClassVar[int]
    TASK_AGE_S_FIELD_NUMBER: _ClassVar[int]
    TASK_USUAL_S_FIELD_NUMBER: _ClassVar[int]
    OWNER_FIELD_NUMBER: _ClassVar[int]
    RESERVED_BYTES_FIELD_NUMBER: _ClassVar[int]
    session: str
    epoch: int
    tasks_done: int
    task_age_s: float
    task_usual_s: float
    owner: str
    reserved_bytes: int
    def __init__(self, session: _Optional[str] = ..., epoch: _Optional[int] = ..., tasks_done: _Optional[int] = ..., task_age_s: _Optional[float] = ..., task_usual_s: _Optional[float] = ..., owner: _Optional[str] = ..., reserved_bytes: _Optional[int] = ...) -> None: ...

class Heartbeat(_message.Message):
    __slots__ = ("sequence", "memory_free_bytes", "progress", "leaving", "unreachable")
    SEQUENCE_FIELD_NUMBER: _ClassVar[int]
    MEMORY_FREE_BYTES_FIELD_NUMBER: _ClassVar[int]
    PROGRESS_FIELD_NUMBER: _ClassVar[int]
    LEAVING_FIELD_NUMBER: _ClassVar[int]
    UNREACHABLE_FIELD_NUMBER: _ClassVar[int]
    sequence: int
    memory_free_bytes: int
    progress: _containers.RepeatedCompositeFieldContainer[Progress]
    leaving: bool
    unreachable: _containers.RepeatedScalarFieldContainer[str]
    def __init__(self, sequence: _Optional[int] = ..., memory_free_bytes: _Optional[int] = ..., progress: _Optional[_Iterable[_Union[Progress, _Mapping]]] = ..., leaving: bool = ..., unreachable: _Optional[_Iterable[str]] = ...) -> None: ...

class RowsRef(_message.Message):
    __slots__ = ("dataset", "split", "context", "rows", "columns", "token")
    DATASET_FIELD_NUMBER: _ClassVar[int]
    SPLIT_FIELD_NUMBER: _ClassVar[int]
    CONTEXT_FIELD_NUMBER: _ClassVar[int]
    ROWS_FIELD_NUMBER: _ClassVar[int]
    COLUMNS_FIELD_NUMBER: _ClassVar[int]
    TOKEN_FIELD_NUMBER: _ClassVar[int]
    dataset: str
    split: str
    context: int
    rows: _containers.RepeatedScalarFieldContainer[int]
    columns: _containers.RepeatedScalarFieldContainer[str]
    token: str
    def __init__(self, dataset: _Optional[str] = ..., split: _Optional[str] = ..., context: _Optional[int] = ..., rows: _Optional[_Iterable[int]] = ..., columns: _Optional[_Iterable[str]] = ..., token: _Optional[str] = ...) -> None: ...

class StateRef(_message.Message):
    __slots__ = ("vnode", "sha256", "size_bytes", "token", "holder")
    VNODE_FIELD_NUMBER: _ClassVar[int]
    SHA256_FIELD_NUMBER: _ClassVar[int]
    SIZE_BYTES_FIELD_NUMBER: _ClassVar[int]
    TOKEN_FIELD_NUMBER: _ClassVar[int]
    HOLDER_FIELD_NUMBER: _ClassVar[int]
    vnode: str
    sha256: str
    size_bytes: int
    token: str
    holder: _containers.RepeatedCompositeFieldContainer[Neighbour]
    def __init__(self, vnode: _Optional[str] = ..., sha256: _Optional[str] = ..., size_bytes: _Optional[int] = ..., token: _Optional[str] = ..., holder: _Optional[_Iterable[_Union[Neighbour, _Mapping]]] = ...) -> None: ...

class Location(_message.Message):
    __slots__ = ("vnode", "peer", "worker")
    VNODE_FIELD_NUMBER: _ClassVar[int]
    PEER_FIELD_NUMBER: _ClassVar[int]
    WORKER_FIELD_NUMBER: _ClassVar[int]
    vnode: str
    peer: str
    worker: int
    def __init__(self, vnode: _Optional[str] = ..., peer: _Optional[str] = ..., worker: _Optional[int] = ...) -> None: ...

class Neighbour(_message.Message):
    __slots__ = ("peer", "incarnation", "addresses")
    PEER_FIELD_NUMBER: _ClassVar[int]
    INCARNATION_FIELD_NUMBER: _ClassVar[int]
    ADDRESSES_FIELD_NUMBER: _ClassVar[int]
    peer: str
    incarnation: Incarnation
    addresses: _containers.RepeatedScalarFieldContainer[str]
    def __init__(self, peer: _Optional[str] = ..., incarnation: _Optional[_Union[Incarnation, _Mapping]] = ..., addresses: _Optional[_Iterable[str]] = ...) -> None: ...

class Tickets(_message.Message):
    __slots__ = ("session", "epoch", "owner", "instance", "network", "definition", "record", "placement", "neighbours", "window", "base_step", "states", "serving", "trained", "results", "rows", "time_to_live_s", "retry")
    SESSION_FIELD_NUMBER: _ClassVar[int]
    EPOCH_FIELD_NUMBER: _ClassVar[int]
    OWNER_FIELD_NUMBER: _ClassVar[int]
    INSTANCE_FIELD_NUMBER: _ClassVar[int]
    NETWORK_FIELD_NUMBER: _ClassVar[int]
    DEFINITION_FIELD_NUMBER: _ClassVar[int]
    RECORD_FIELD_NUMBER: _ClassVar[int]
    PLACEMENT_FIELD_NUMBER: _ClassVar[int]
    NEIGHBOURS_FIELD_NUMBER: _ClassVar[int]
    WINDOW_FIELD_NUMBER: _ClassVar[int]
    BASE_STEP_FIELD_NUMBER: _ClassVar[int]
    STATES_FIELD_NUMBER: _ClassVar[int]
    SERVING_FIELD_NUMBER: _ClassVar[int]
    TRAINED_FIELD_NUMBER: _ClassVar[int]
    RESULTS_FIELD_NUMBER: _ClassVar[int]
    ROWS_FIELD_NUMBER: _ClassVar[int]
    TIME_TO_LIVE_S_FIELD_NUMBER: _ClassVar[int]
    RETRY_FIELD_NUMBER: _ClassVar[int]
    session: str
    epoch: int
    owner: str
    instance: int
    network: str
    definition: bytes
    record: bytes
    placement: _containers.RepeatedCompositeFieldContainer[Location]
    neighbours: _containers.RepeatedCompositeFieldContainer[Neighbour]
    window: int
    base_step: int
    states: _containers.RepeatedCompositeFieldContainer[StateRef]
    serving: bool
    trained: str
    results: _containers.RepeatedCompositeFieldContainer[OutputRef]
    rows: int
    time_to_live_s: float
    retry: int
    def __init__(self, session: _Optional[str] = ..., epoch: _Optional[int] = ..., owner: _Optional[str] = ..., instance: _Optional[int] = ..., network: _Optional[str] = ..., definition: _Optional[bytes] = ..., record: _Optional[bytes] = ..., placement: _Optional[_Iterable[_Union[Location, _Mapping]]] = ..., neighbours: _Optional[_Iterable[_Union[Neighbour, _Mapping]]] = ..., window: _Optional[int] = ..., base_step: _Optional[int] = ..., states: _Optional[_Iterable[_Union[StateRef, _Mapping]]] = ..., serving: bool = ..., trained: _Optional[str] = ..., results: _Optional[_Iterable[_Union[OutputRef, _Mapping]]] = ..., rows: _Optional[int] = ..., time_to_live_s: _Optional[float] = ..., retry: _Optional[int] = ...) -> None: ...

class OutputRef(_message.Message):
    __slots__ = ("vnode", "slot", "last_position")
    VNODE_FIELD_NUMBER: _ClassVar[int]
    SLOT_FIELD_NUMBER: _ClassVar[int]
    LAST_POSITION_FIELD_NUMBER: _ClassVar[int]
    vnode: str
    slot: int
    last_position: bool
    def __init__(self, vnode: _Optional[str] = ..., slot: _Optional[int] = ..., last_position: bool = ...) -> None: ...

class Withdraw(_message.Message):
    __slots__ = ("session", "epoch", "before", "forget_snapshots")
    SESSION_FIELD_NUMBER: _ClassVar[int]
    EPOCH_FIELD_NUMBER: _ClassVar[int]
    BEFORE_FIELD_NUMBER: _ClassVar[int]
    FORGET_SNAPSHOTS_FIELD_NUMBER: _ClassVar[int]
    session: str
    epoch: int
    before: int
    forget_snapshots: bool
    def __init__(self, session: _Optional[str] = ..., epoch: _Optional[int] = ..., before: _Optional[int] = ..., forget_snapshots: bool = ...) -> None: ...

class OpenMicrobatch(_message.Message):
    __slots__ = ("session", "epoch", "instance", "step", "microbatch", "rows", "valid_targets", "inline", "done_step")
    SESSION_FIELD_NUMBER: _ClassVar[int]
    EPOCH_FIELD_NUMBER: _ClassVar[int]
    INSTANCE_FIELD_NUMBER: _ClassVar[int]
    STEP_FIELD_NUMBER: _ClassVar[int]
    MICROBATCH_FIELD_NUMBER: _ClassVar[int]
    ROWS_FIELD_NUMBER: _ClassVar[int]
    VALID_TARGETS_FIELD_NUMBER: _ClassVar[int]
    INLINE_FIELD_NUMBER: _ClassVar[int]
    DONE_STEP_FIELD_NUMBER: _ClassVar[int]
    session: str
    epoch: int
    instance: int
    step: int
    microbatch: int
    rows: _containers.RepeatedCompositeFieldContainer[RowsRef]
    valid_targets: _containers.RepeatedCompositeFieldContainer[CostTargets]
    inline: _containers.RepeatedCompositeFieldContainer[InlineTensor]
    done_step: int
    def __init__(self, session: _Optional[str] = ..., epoch: _Optional[int] = ..., instance: _Optional[int] = ..., step: _Optional[int] = ..., microbatch: _Optional[int] = ..., rows: _Optional[_Iterable[_Union[RowsRef, _Mapping]]] = ..., valid_targets: _Optional[_Iterable[_Union[CostTargets, _Mapping]]] = ..., inline: _Optional[_Iterable[_Union[InlineTensor, _Mapping]]] = ..., done_step: _Optional[int] = ...) -> None: ...

class CostTargets(_message.Message):
    __slots__ = ("vnode", "count")
    VNODE_FIELD_NUMBER: _ClassVar[int]
    COUNT_FIELD_NUMBER: _ClassVar[int]
    vnode: str
    count: int
    def __init__(self, vnode: _Optional[str] = ..., count: _Optional[int] = ...) -> None: ...

class InlineTensor(_message.Message):
    __slots__ = ("column", "shape", "dtype", "data")
    COLUMN_FIELD_NUMBER: _ClassVar[int]
    SHAPE_FIELD_NUMBER: _ClassVar[int]
    DTYPE_FIELD_NUMBER: _ClassVar[int]
    DATA_FIELD_NUMBER: _ClassVar[int]
    column: str
    shape: _containers.RepeatedScalarFieldContainer[int]
    dtype: str
    data: bytes
    def __init__(self, column: _Optional[str] = ..., shape: _Optional[_Iterable[int]] = ..., dtype: _Optional[str] = ..., data: _Optional[bytes] = ...) -> None: ...

class StepClose(_message.Message):
    __slots__ = ("session", "epoch", "instance", "step", "grad_scale")
    SESSION_FIELD_NUMBER: _ClassVar[int]
    EPOCH_FIELD_NUMBER: _ClassVar[int]
    INSTANCE_FIELD_NUMBER: _ClassVar[int]
    STEP_FIELD_NUMBER: _ClassVar[int]
    GRAD_SCALE_FIELD_NUMBER: _ClassVar[int]
    session: str
    epoch: int
    instance: int
    step: int
    grad_scale: float
    def __init__(self, session: _Optional[str] = ..., epoch: _Optional[int] = ..., instance: _Optional[int] = ..., step: _Optional[int] = ..., grad_scale: _Optional[float] = ...) -> None: ...

class SnapshotAt(_message.Message):
    __slots__ = ("session", "epoch", "step", "token", "guard")
    SESSION_FIELD_NUMBER: _ClassVar[int]
    EPOCH_FIELD_NUMBER: _ClassVar[int]
    STEP_FIELD_NUMBER: _ClassVar[int]
    TOKEN_FIELD_NUMBER: _ClassVar[int]
    GUARD_FIELD_NUMBER: _ClassVar[int]
    session: str
    epoch: int
    step: int
    token: str
    guard: _containers.RepeatedCompositeFieldContainer[Neighbour]
    def __init__(self, session: _Optional[str] = ..., epoch: _Optional[int] = ..., step: _Optional[int] = ..., token: _Optional[str] = ..., guard: _Optional[_Iterable[_Union[Neighbour, _Mapping]]] = ...) -> None: ...

class Guard(_message.Message):
    __slots__ = ("session", "epoch", "token")
    SESSION_FIELD_NUMBER: _ClassVar[int]
    EPOCH_FIELD_NUMBER: _ClassVar[int]
    TOKEN_FIELD_NUMBER: _ClassVar[int]
    session: str
    epoch: int
    token: str
    def __init__(self, session: _Optional[str] = ..., epoch: _Optional[int] = ..., token: _Optional[str] = ...) -> None: ...

class Drain(_message.Message):
    __slots__ = ("on",)
    ON_FIELD_NUMBER: _ClassVar[int]
    on: bool
    def __init__(self, on: bool = ...) -> None: ...

class MoveRefused(_message.Message):
    __slots__ = ("session", "reason")
    SESSION_FIELD_NUMBER: _ClassVar[int]
    REASON_FIELD_NUMBER: _ClassVar[int]
    session: str
    reason: str
    def __init__(self, session: _Optional[str] = ..., reason: _Optional[str] = ...) -> None: ...

class HomeCopied(_message.Message):
    __slots__ = ("hostname", "addresses")
    HOSTNAME_FIELD_NUMBER: _ClassVar[int]
    ADDRESSES_FIELD_NUMBER: _ClassVar[int]
    hostname: str
    addresses: _containers.RepeatedScalarFieldContainer[str]
    def __init__(self, hostname: _Optional[str] = ..., addresses: _Optional[_Iterable[str]] = ...) -> None: ...

class Marked(_message.Message):
    __slots__ = ("session", "epoch", "step", "keep")
    SESSION_FIELD_NUMBER: _ClassVar[int]
    EPOCH_FIELD_NUMBER: _ClassVar[int]
    STEP_FIELD_NUMBER: _ClassVar[int]
    KEEP_FIELD_NUMBER: _ClassVar[int]
    session: str
    epoch: int
    step: int
    keep: _containers.RepeatedScalarFieldContainer[str]
    def __init__(self, session: _Optional[str] = ..., epoch: _Optional[int] = ..., step: _Optional[int] = ..., keep: _Optional[_Iterable[str]] = ...) -> None: ...

class Committed(_message.Message):
    __slots__ = ("session", "epoch", "step", "manifest")
    SESSION_FIELD_NUMBER: _ClassVar[int]
    EPOCH_FIELD_NUMBER: _ClassVar[int]
    STEP_FIELD_NUMBER: _ClassVar[int]
    MANIFEST_FIELD_NUMBER: _ClassVar[int]
    session: str
    epoch: int
    step: int
    manifest: str
    def __init__(self, session: _Optional[str] = ..., epoch: _Optional[int] = ..., step: _Optional[int] = ..., manifest: _Optional[str] = ...) -> None: ...

class Abandoned(_message.Message):
    __slots__ = ("session", "epoch", "step")
    SESSION_FIELD_NUMBER: _ClassVar[int]
    EPOCH_FIELD_NUMBER: _ClassVar[int]
    STEP_FIELD_NUMBER: _ClassVar[int]
    session: str
    epoch: int
    step: int
    def __init__(self, session: _Optional[str] = ..., epoch: _Optional[int] = ..., step: _Optional[int] = ...) -> None: ...

class Adopt(_message.Message):
    __slots__ = ("session", "epoch", "owner", "acquire", "token")
    SESSION_FIELD_NUMBER: _ClassVar[int]
    EPOCH_FIELD_NUMBER: _ClassVar[int]
    OWNER_FIELD_NUMBER: _ClassVar[int]
    ACQUIRE_FIELD_NUMBER: _ClassVar[int]
    TOKEN_FIELD_NUMBER: _ClassVar[int]
    session: str
    epoch: int
    owner: str
    acquire: bytes
    token: str
    def __init__(self, session: _Optional[str] = ..., epoch: _Optional[int] = ..., owner: _Optional[str] = ..., acquire: _Optional[bytes] = ..., token: _Optional[str] = ...) -> None: ...

class TicketAnswer(_message.Message):
    __slots__ = ("session", "epoch", "instance", "accepted", "reason", "missing_bytes")
    SESSION_FIELD_NUMBER: _ClassVar[int]
    EPOCH_FIELD_NUMBER: _ClassVar[int]
    INSTANCE_FIELD_NUMBER: _ClassVar[int]
    ACCEPTED_FIELD_NUMBER: _ClassVar[int]
    REASON_FIELD_NUMBER: _ClassVar[int]
    MISSING_BYTES_FIELD_NUMBER: _ClassVar[int]
    session: str
    epoch: int
    instance: int
    accepted: bool
    reason: str
    missing_bytes: int
    def __init__(self, session: _Optional[str] = ..., epoch: _Optional[int] = ..., instance: _Optional[int] = ..., accepted: bool = ..., reason: _Optional[str] = ..., missing_bytes: _Optional[int] = ...) -> None: ...

class Withdrawn(_message.Message):
    __slots__ = ("session", "epoch", "before")
    SESSION_FIELD_NUMBER: _ClassVar[int]
    EPOCH_FIELD_NUMBER: _ClassVar[int]
    BEFORE_FIELD_NUMBER: _ClassVar[int]
    session: str
    epoch: int
    before: int
    def __init__(self, session: _Optional[str] = ..., epoch: _Optional[int] = ..., before: _Optional[int] = ...) -> None: ...

class TaskAnswer(_message.Message):
    __slots__ = ("session", "instance", "step", "microbatch", "accepted", "reason")
    SESSION_FIELD_NUMBER: _ClassVar[int]
    INSTANCE_FIELD_NUMBER: _ClassVar[int]
    STEP_FIELD_NUMBER: _ClassVar[int]
    MICROBATCH_FIELD_NUMBER: _ClassVar[int]
    ACCEPTED_FIELD_NUMBER: _ClassVar[int]
    REASON_FIELD_NUMBER: _ClassVar[int]
    session: str
    instance: int
    step: int
    microbatch: int
    accepted: bool
    reason: str
    def __init__(self, session: _Optional[str] = ..., instance: _Optional[int] = ..., step: _Optional[int] = ..., microbatch: _Optional[int] = ..., accepted: bool = ..., reason: _Optional[str] = ...) -> None: ...

class StaleEpoch(_message.Message):
    __slots__ = ("session", "current", "owner")
    SESSION_FIELD_NUMBER: _ClassVar[int]
    CURRENT_FIELD_NUMBER: _ClassVar[int]
    OWNER_FIELD_NUMBER: _ClassVar[int]
    session: str
    current: int
    owner: str
    def __init__(self, session: _Optional[str] = ..., current: _Optional[int] = ..., owner: _Optional[str] = ...) -> None: ...

class MetricValue(_message.Message):
    __slots__ = ("name", "value")
    NAME_FIELD_NUMBER: _ClassVar[int]
    VALUE_FIELD_NUMBER: _ClassVar[int]
    name: str
    value: float
    def __init__(self, name: _Optional[str] = ..., value: _Optional[float] = ...) -> None: ...

class Done(_message.Message):
    __slots__ = ("session", "instance", "segment", "step", "microbatch", "forward_s", "backward_s", "squares")
    SESSION_FIELD_NUMBER: _ClassVar[int]
    INSTANCE_FIELD_NUMBER: _ClassVar[int]
    SEGMENT_FIELD_NUMBER: _ClassVar[int]
    STEP_FIELD_NUMBER: _ClassVar[int]
    MICROBATCH_FIELD_NUMBER: _ClassVar[int]
    FORWARD_S_FIELD_NUMBER: _ClassVar[int]
    BACKWARD_S_FIELD_NUMBER: _ClassVar[int]
    SQUARES_FIELD_NUMBER: _ClassVar[int]
    session: str
    instance: int
    segment: int
    step: int
    microbatch: int
    forward_s: float
    backward_s: float
    squares: _containers.RepeatedCompositeFieldContainer[MetricValue]
    def __init__(self, session: _Optional[str] = ..., instance: _Optional[int] = ..., segment: _Optional[int] = ..., step: _Optional[int] = ..., microbatch: _Optional[int] = ..., forward_s: _Optional[float] = ..., backward_s: _Optional[float] = ..., squares: _Optional[_Iterable[_Union[MetricValue, _Mapping]]] = ...) -> None: ...

class Loss(_message.Message):
    __slots__ = ("session", "instance", "vnode", "step", "microbatch", "loss")
    SESSION_FIELD_NUMBER: _ClassVar[int]
    INSTANCE_FIELD_NUMBER: _ClassVar[int]
    VNODE_FIELD_NUMBER: _ClassVar[int]
    STEP_FIELD_NUMBER: _ClassVar[int]
    MICROBATCH_FIELD_NUMBER: _ClassVar[int]
    LOSS_FIELD_NUMBER: _ClassVar[int]
    session: str
    instance: int
    vnode: str
    step: int
    microbatch: int
    loss: float
    def __init__(self, session: _Optional[str] = ..., instance: _Optional[int] = ..., vnode: _Optional[str] = ..., step: _Optional[int] = ..., microbatch: _Optional[int] = ..., loss: _Optional[float] = ...) -> None: ...

class StepSummary(_message.Message):
    __slots__ = ("vnode", "grad_sq", "finite")
    VNODE_FIELD_NUMBER: _ClassVar[int]
    GRAD_SQ_FIELD_NUMBER: _ClassVar[int]
    FINITE_FIELD_NUMBER: _ClassVar[int]
    vnode: str
    grad_sq: float
    finite: bool
    def __init__(self, vnode: _Optional[str] = ..., grad_sq: _Optional[float] = ..., finite: bool = ...) -> None: ...

class StepSummaries(_message.Message):
    __slots__ = ("session", "instance", "step", "summaries")
    SESSION_FIELD_NUMBER: _ClassVar[int]
    INSTANCE_FIELD_NUMBER: _ClassVar[int]
    STEP_FIELD_NUMBER: _ClassVar[int]
    SUMMARIES_FIELD_NUMBER: _ClassVar[int]
    session: str
    instance: int
    step: int
    summaries: _containers.RepeatedCompositeFieldContainer[StepSummary]
    def __init__(self, session: _Optional[str] = ..., instance: _Optional[int] = ..., step: _Optional[int] = ..., summaries: _Optional[_Iterable[_Union[StepSummary, _Mapping]]] = ...) -> None: ...

class Updated(_message.Message):
    __slots__ = ("session", "instance", "step", "vnodes", "not_finite", "update_s", "metrics")
    SESSION_FIELD_NUMBER: _ClassVar[int]
    INSTANCE_FIELD_NUMBER: _ClassVar[int]
    STEP_FIELD_NUMBER: _ClassVar[int]
    VNODES_FIELD_NUMBER: _ClassVar[int]
    NOT_FINITE_FIELD_NUMBER: _ClassVar[int]
    UPDATE_S_FIELD_NUMBER: _ClassVar[int]
    METRICS_FIELD_NUMBER: _ClassVar[int]
    session: str
    instance: int
    step: int
    vnodes: _containers.RepeatedScalarFieldContainer[str]
    not_finite: _containers.RepeatedScalarFieldContainer[str]
    update_s: float
    metrics: _containers.RepeatedCompositeFieldContainer[MetricValue]
    def __init__(self, session: _Optional[str] = ..., instance: _Optional[int] = ..., step: _Optional[int] = ..., vnodes: _Optional[_Iterable[str]] = ..., not_finite: _Optional[_Iterable[str]] = ..., update_s: _Optional[float] = ..., metrics: _Optional[_Iterable[_Union[MetricValue, _Mapping]]] = ...) -> None: ...

class SnapshotAnswer(_message.Message):
    __slots__ = ("session", "epoch", "step", "accepted", "reason")
    SESSION_FIELD_NUMBER: _ClassVar[int]
    EPOCH_FIELD_NUMBER: _ClassVar[int]
    STEP_FIELD_NUMBER: _ClassVar[int]
    ACCEPTED_FIELD_NUMBER: _ClassVar[int]
    REASON_FIELD_NUMBER: _ClassVar[int]
    session: str
    epoch: int
    step: int
    accepted: bool
    reason: str
    def __init__(self, session: _Optional[str] = ..., epoch: _Optional[int] = ..., step: _Optional[int] = ..., accepted: bool = ..., reason: _Optional[str] = ...) -> None: ...

class Stored(_message.Message):
    __slots__ = ("session", "instance", "step", "vnode", "sha256", "size_bytes")
    SESSION_FIELD_NUMBER: _ClassVar[int]
    INSTANCE_FIELD_NUMBER: _ClassVar[int]
    STEP_FIELD_NUMBER: _ClassVar[int]
    VNODE_FIELD_NUMBER: _ClassVar[int]
    SHA256_FIELD_NUMBER: _ClassVar[int]
    SIZE_BYTES_FIELD_NUMBER: _ClassVar[int]
    session: str
    instance: int
    step: int
    vnode: str
    sha256: str
    size_bytes: int
    def __init__(self, session: _Optional[str] = ..., instance: _Optional[int] = ..., step: _Optional[int] = ..., vnode: _Optional[str] = ..., sha256: _Optional[str] = ..., size_bytes: _Optional[int] = ...) -> None: ...

class SnapshotFailed(_message.Message):
    __slots__ = ("session", "instance", "step", "reason")
    SESSION_FIELD_NUMBER: _ClassVar[int]
    INSTANCE_FIELD_NUMBER: _ClassVar[int]
    STEP_FIELD_NUMBER: _ClassVar[int]
    REASON_FIELD_NUMBER: _ClassVar[int]
    session: str
    instance: int
    step: int
    reason: str
    def __init__(self, session: _Optional[str] = ..., instance: _Optional[int] = ..., step: _Optional[int] = ..., reason: _Optional[str] = ...) -> None: ...

class TaskFailed(_message.Message):
    __slots__ = ("session", "instance", "vnode", "step", "microbatch", "cause", "reason")
    SESSION_FIELD_NUMBER: _ClassVar[int]
    INSTANCE_FIELD_NUMBER: _ClassVar[int]
    VNODE_FIELD_NUMBER: _ClassVar[int]
    STEP_FIELD_NUMBER: _ClassVar[int]
    MICROBATCH_FIELD_NUMBER: _ClassVar[int]
    CAUSE_FIELD_NUMBER: _ClassVar[int]
    REASON_FIELD_NUMBER: _ClassVar[int]
    session: str
    instance: int
    vnode: str
    step: int
    microbatch: int
    cause: str
    reason: str
    def __init__(self, session: _Optional[str] = ..., instance: _Optional[int] = ..., vnode: _Optional[str] = ..., step: _Optional[int] = ..., microbatch: _Optional[int] = ..., cause: _Optional[str] = ..., reason: _Optional[str] = ...) -> None: ...

class Loaded(_message.Message):
    __slots__ = ("session", "instance", "vnodes", "local")
    SESSION_FIELD_NUMBER: _ClassVar[int]
    INSTANCE_FIELD_NUMBER: _ClassVar[int]
    VNODES_FIELD_NUMBER: _ClassVar[int]
    LOCAL_FIELD_NUMBER: _ClassVar[int]
    session: str
    instance: int
    vnodes: _containers.RepeatedScalarFieldContainer[str]
    local: int
    def __init__(self, session: _Optional[str] = ..., instance: _Optional[int] = ..., vnodes: _Optional[_Iterable[str]] = ..., local: _Optional[int] = ...) -> None: ...

class HeldSnapshot(_message.Message):
    __slots__ = ("step", "vnode", "sha256")
    STEP_FIELD_NUMBER: _ClassVar[int]
    VNODE_FIELD_NUMBER: _ClassVar[int]
    SHA256_FIELD_NUMBER: _ClassVar[int]
    step: int
    vnode: str
    sha256: str
    def __init__(self, step: _Optional[int] = ..., vnode: _Optional[str] = ..., sha256: _Optional[str] = ...) -> None: ...

class SegmentPosition(_message.Message):
    __slots__ = ("segment", "step", "microbatch")
    SEGMENT_FIELD_NUMBER: _ClassVar[int]
    STEP_FIELD_NUMBER: _ClassVar[int]
    MICROBATCH_FIELD_NUMBER: _ClassVar[int]
    segment: int
    step: int
    microbatch: int
    def __init__(self, segment: _Optional[int] = ..., step: _Optional[int] = ..., microbatch: _Optional[int] = ...) -> None: ...

class Adopted(_message.Message):
    __slots__ = ("session", "epoch", "instance", "versions", "positions", "open_microbatches", "snapshots", "snapshot_at", "losses", "summaries", "step_close", "step_close_scale", "kept_from", "scales")
    SESSION_FIELD_NUMBER: _ClassVar[int]
    EPOCH_FIELD_NUMBER: _ClassVar[int]
    INSTANCE_FIELD_NUMBER: _ClassVar[int]
    VERSIONS_FIELD_NUMBER: _ClassVar[int]
    POSITIONS_FIELD_NUMBER: _ClassVar[int]
    OPEN_MICROBATCHES_FIELD_NUMBER: _ClassVar[int]
    SNAPSHOTS_FIELD_NUMBER: _ClassVar[int]
    SNAPSHOT_AT_FIELD_NUMBER: _ClassVar[int]
    LOSSES_FIELD_NUMBER: _ClassVar[int]
    SUMMARIES_FIELD_NUMBER: _ClassVar[int]
    STEP_CLOSE_FIELD_NUMBER: _ClassVar[int]
    STEP_CLOSE_SCALE_FIELD_NUMBER: _ClassVar[int]
    KEPT_FROM_FIELD_NUMBER: _ClassVar[int]
    SCALES_FIELD_NUMBER: _ClassVar[int]
    session: str
    epoch: int
    instance: int
    versions: _containers.RepeatedCompositeFieldContainer[VNodeVersion]
    positions: _containers.RepeatedCompositeFieldContainer[SegmentPosition]
    open_microbatches: _containers.RepeatedCompositeFieldContainer[StepMicrobatch]
    snapshots: _containers.RepeatedCompositeFieldContainer[HeldSnapshot]
    snapshot_at: int
    losses: _containers.RepeatedCompositeFieldContainer[Loss]
    summaries: _containers.RepeatedCompositeFieldContainer[StepSummaries]
    step_close: int
    step_close_scale: float
    kept_from: int
    scales: _containers.RepeatedCompositeFieldContainer[StepScale]
    def __init__(self, session: _Optional[str] = ..., epoch: _Optional[int] = ..., instance: _Optional[int] = ..., versions: _Optional[_Iterable[_Union[VNodeVersion, _Mapping]]] = ..., positions: _Optional[_Iterable[_Union[SegmentPosition, _Mapping]]] = ..., open_microbatches: _Optional[_Iterable[_Union[StepMicrobatch, _Mapping]]] = ..., snapshots: _Optional[_Iterable[_Union[HeldSnapshot, _Mapping]]] = ..., snapshot_at: _Optional[int] = ..., losses: _Optional[_Iterable[_Union[Loss, _Mapping]]] = ..., summaries: _Optional[_Iterable[_Union[StepSummaries, _Mapping]]] = ..., step_close: _Optional[int] = ..., step_close_scale: _Optional[float] = ..., kept_from: _Optional[int] = ..., scales: _Optional[_Iterable[_Union[StepScale, _Mapping]]] = ...) -> None: ...

class TensorFrame(_message.Message):
    __slots__ = ("session", "edge", "direction", "step", "microbatch", "source_instance", "target_instance", "target_incarnation", "tensor")
    SESSION_FIELD_NUMBER: _ClassVar[int]
    EDGE_FIELD_NUMBER: _ClassVar[int]
    DIRECTION_FIELD_NUMBER: _ClassVar[int]
    STEP_FIELD_NUMBER: _ClassVar[int]
    MICROBATCH_FIELD_NUMBER: _ClassVar[int]
    SOURCE_INSTANCE_FIELD_NUMBER: _ClassVar[int]
    TARGET_INSTANCE_FIELD_NUMBER: _ClassVar[int]
    TARGET_INCARNATION_FIELD_NUMBER: _ClassVar[int]
    TENSOR_FIELD_NUMBER: _ClassVar[int]
    session: str
    edge: int
    direction: Direction
    step: int
    microbatch: int
    source_instance: int
    target_instance: int
    target_incarnation: Incarnation
    tensor: Tensor
    def __init__(self, session: _Optional[str] = ..., edge: _Optional[int] = ..., direction: _Optional[_Union[Direction, str]] = ..., step: _Optional[int] = ..., microbatch: _Optional[int] = ..., source_instance: _Optional[int] = ..., target_instance: _Optional[int] = ..., target_incarnation: _Optional[_Union[Incarnation, _Mapping]] = ..., tensor: _Optional[_Union[Tensor, _Mapping]] = ...) -> None: ...

class FrameAck(_message.Message):
    __slots__ = ("session", "edge", "direction", "step", "microbatch", "source_instance", "target_instance", "status", "reason")
    SESSION_FIELD_NUMBER: _ClassVar[int]
    EDGE_FIELD_NUMBER: _ClassVar[int]
    DIRECTION_FIELD_NUMBER: _ClassVar[int]
    STEP_FIELD_NUMBER: _ClassVar[int]
    MICROBATCH_FIELD_NUMBER: _ClassVar[int]
    SOURCE_INSTANCE_FIELD_NUMBER: _ClassVar[int]
    TARGET_INSTANCE_FIELD_NUMBER: _ClassVar[int]
    STATUS_FIELD_NUMBER: _ClassVar[int]
    REASON_FIELD_NUMBER: _ClassVar[int]
    session: str
    edge: int
    direction: Direction
    step: int
    microbatch: int
    source_instance: int
    target_instance: int
    status: FrameStatus
    reason: str
    def __init__(self, session: _Optional[str] = ..., edge: _Optional[int] = ..., direction: _Optional[_Union[Direction, str]] = ..., step: _Optional[int] = ..., microbatch: _Optional[int] = ..., source_instance: _Optional[int] = ..., target_instance: _Optional[int] = ..., status: _Optional[_Union[FrameStatus, str]] = ..., reason: _Optional[str] = ...) -> None: ...

class Refusal(_message.Message):
    __slots__ = ("kind", "reason")
    KIND_FIELD_NUMBER: _ClassVar[int]
    REASON_FIELD_NUMBER: _ClassVar[int]
    kind: str
    reason: str
    def __init__(self, kind: _Optional[str] = ..., reason: _Optional[str] = ...) -> None: ...

class CreateNetwork(_message.Message):
    __slots__ = ("definition",)
    DEFINITION_FIELD_NUMBER: _ClassVar[int]
    definition: bytes
    def __init__(self, definition: _Optional[bytes] = ...) -> None: ...

class NetworkCreated(_message.Message):
    __slots__ = ("network",)
    NETWORK_FIELD_NUMBER: _ClassVar[int]
    network: str
    def __init__(self, network: _Optional[str] = ...) -> None: ...

class ListNetworks(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class NetworkInfo(_message.Message):
    __slots__ = ("network", "name", "parameters", "vnodes")
    NETWORK_FIELD_NUMBER: _ClassVar[int]
    NAME_FIELD_NUMBER: _ClassVar[int]
    PARAMETERS_FIELD_NUMBER: _ClassVar[int]
    VNODES_FIELD_NUMBER: _ClassVar[int]
    network: str
    name: str
    parameters: int
    vnodes: int
    def __init__(self, network: _Optional[str] = ..., name: _Optional[str] = ..., parameters: _Optional[int] = ..., vnodes: _Optional[int] = ...) -> None: ...

class NetworkList(_message.Message):
    __slots__ = ("networks",)
    NETWORKS_FIELD_NUMBER: _ClassVar[int]
    networks: _containers.RepeatedCompositeFieldContainer[NetworkInfo]
    def __init__(self, networks: _Optional[_Iterable[_Union[NetworkInfo, _Mapping]]] = ...) -> None: ...

class GetNetwork(_message.Message):
    __slots__ = ("network",)
    NETWORK_FIELD_NUMBER: _ClassVar[int]
    network: str
    def __init__(self, network: _Optional[str] = ...) -> None: ...

class NetworkDefinition(_message.Message):
    __slots__ = ("network", "definition")
    NETWORK_FIELD_NUMBER: _ClassVar[int]
    DEFINITION_FIELD_NUMBER: _ClassVar[int]
    network: str
    definition: bytes
    def __init__(self, network: _Optional[str] = ..., definition: _Optional[bytes] = ...) -> None: ...

class CreateSession(_message.Message):
    __slots__ = ("network", "dataset", "recipe", "nonce", "init_from")
    NETWORK_FIELD_NUMBER: _ClassVar[int]
    DATASET_FIELD_NUMBER: _ClassVar[int]
    RECIPE_FIELD_NUMBER: _ClassVar[int]
    NONCE_FIELD_NUMBER: _ClassVar[int]
    INIT_FROM_FIELD_NUMBER: _ClassVar[int]
    network: str
    dataset: str
    recipe: bytes
    nonce: str
    init_from: str
    def __init__(self, network: _Optional[str] = ..., dataset: _Optional[str] = ..., recipe: _Optional[bytes] = ..., nonce: _Optional[str] = ..., init_from: _Optional[str] = ...) -> None: ...

class SessionCreated(_message.Message):
    __slots__ = ("session",)
    SESSION_FIELD_NUMBER: _ClassVar[int]
    session: str
    def __init__(self, session: _Optional[str] = ...) -> None: ...

class SessionQuery(_message.Message):
    __slots__ = ("session",)
    SESSION_FIELD_NUMBER: _ClassVar[int]
    session: str
    def __init__(self, session: _Optional[str] = ...) -> None: ...

class SegmentTime(_message.Message):
    __slots__ = ("segment", "peer", "forward_s", "backward_s", "microbatches")
    SEGMENT_FIELD_NUMBER: _ClassVar[int]
    PEER_FIELD_NUMBER: _ClassVar[int]
    FORWARD_S_FIELD_NUMBER: _ClassVar[int]
    BACKWARD_S_FIELD_NUMBER: _ClassVar[int]
    MICROBATCHES_FIELD_NUMBER: _ClassVar[int]
    segment: int
    peer: str
    forward_s: float
    backward_s: float
    microbatches: int
    def __init__(self, segment: _Optional[int] = ..., peer: _Optional[str] = ..., forward_s: _Optional[float] = ..., backward_s: _Optional[float] = ..., microbatches: _Optional[int] = ...) -> None: ...

class SessionInfo(_message.Message):
    __slots__ = ("session", "network", "network_name", "dataset", "state", "reason", "step", "steps", "loss", "committed_step", "epoch", "created_unix_s", "placement", "record", "measured", "owner", "owner_addresses")
    SESSION_FIELD_NUMBER: _ClassVar[int]
    NETWORK_FIELD_NUMBER: _ClassVar[int]
    NETWORK_NAME_FIELD_NUMBER: _ClassVar[int]
    DATASET_FIELD_NUMBER: _ClassVar[int]
    STATE_FIELD_NUMBER: _ClassVar[int]
    REASON_FIELD_NUMBER: _ClassVar[int]
    STEP_FIELD_NUMBER: _ClassVar[int]
    STEPS_FIELD_NUMBER: _ClassVar[int]
    LOSS_FIELD_NUMBER: _ClassVar[int]
    COMMITTED_STEP_FIELD_NUMBER: _ClassVar[int]
    EPOCH_FIELD_NUMBER: _ClassVar[int]
    CREATED_UNIX_S_FIELD_NUMBER: _ClassVar[int]
    PLACEMENT_FIELD_NUMBER: _ClassVar[int]
    RECORD_FIELD_NUMBER: _ClassVar[int]
    MEASURED_FIELD_NUMBER: _ClassVar[int]
    OWNER_FIELD_NUMBER: _ClassVar[int]
    OWNER_ADDRESSES_FIELD_NUMBER: _ClassVar[int]
    session: str
    network: str
    network_name: str
    dataset: str
    state: str
    reason: str
    step: int
    steps: int
    loss: float
    committed_step: int
    epoch: int
    created_unix_s: float
    placement: _containers.RepeatedCompositeFieldContainer[Location]
    record: bytes
    measured: _containers.RepeatedCompositeFieldContainer[SegmentTime]
    owner: str
    owner_addresses: _containers.RepeatedScalarFieldContainer[str]
    def __init__(self, session: _Optional[str] = ..., network: _Optional[str] = ..., network_name: _Optional[str] = ..., dataset: _Optional[str] = ..., state: _Optional[str] = ..., reason: _Optional[str] = ..., step: _Optional[int] = ..., steps: _Optional[int] = ..., loss: _Optional[float] = ..., committed_step: _Optional[int] = ..., epoch: _Optional[int] = ..., created_unix_s: _Optional[float] = ..., placement: _Optional[_Iterable[_Union[Location, _Mapping]]] = ..., record: _Optional[bytes] = ..., measured: _Optional[_Iterable[_Union[SegmentTime, _Mapping]]] = ..., owner: _Optional[str] = ..., owner_addresses: _Optional[_Iterable[str]] = ...) -> None: ...

class SessionList(_message.Message):
    __slots__ = ("sessions",)
    SESSIONS_FIELD_NUMBER: _ClassVar[int]
    sessions: _containers.RepeatedCompositeFieldContainer[SessionInfo]
    def __init__(self, sessions: _Optional[_Iterable[_Union[SessionInfo, _Mapping]]] = ...) -> None: ...

class ControlSession(_message.Message):
    __slots__ = ("session", "action")
    SESSION_FIELD_NUMBER: _ClassVar[int]
    ACTION_FIELD_NUMBER: _ClassVar[int]
    session: str
    action: str
    def __init__(self, session: _Optional[str] = ..., action: _Optional[str] = ...) -> None: ...

class Controlled(_message.Message):
    __slots__ = ("session", "state")
    SESSION_FIELD_NUMBER: _ClassVar[int]
    STATE_FIELD_NUMBER: _ClassVar[int]
    session: str
    state: str
    def __init__(self, session: _Optional[str] = ..., state: _Optional[str] = ...) -> None: ...

class FollowSession(_message.Message):
    __slots__ = ("session", "after_step")
    SESSION_FIELD_NUMBER: _ClassVar[int]
    AFTER_STEP_FIELD_NUMBER: _ClassVar[int]
    session: str
    after_step: int
    def __init__(self, session: _Optional[str] = ..., after_step: _Optional[int] = ...) -> None: ...

class FollowEvents(_message.Message):
    __slots__ = ("after", "follow")
    AFTER_FIELD_NUMBER: _ClassVar[int]
    FOLLOW_FIELD_NUMBER: _ClassVar[int]
    after: int
    follow: bool
    def __init__(self, after: _Optional[int] = ..., follow: bool = ...) -> None: ...

class EventRecord(_message.Message):
    __slots__ = ("sequence", "unix_s", "kind", "session", "data")
    SEQUENCE_FIELD_NUMBER: _ClassVar[int]
    UNIX_S_FIELD_NUMBER: _ClassVar[int]
    KIND_FIELD_NUMBER: _ClassVar[int]
    SESSION_FIELD_NUMBER: _ClassVar[int]
    DATA_FIELD_NUMBER: _ClassVar[int]
    sequence: int
    unix_s: float
    kind: str
    session: str
    data: str
    def __init__(self, sequence: _Optional[int] = ..., unix_s: _Optional[float] = ..., kind: _Optional[str] = ..., session: _Optional[str] = ..., data: _Optional[str] = ...) -> None: ...

class ListNodes(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class NodeInfo(_message.Message):
    __slots__ = ("descriptor", "capabilities", "colour", "silent_s", "memory_free_bytes", "vnodes", "tasks_done", "leaving")
    DESCRIPTOR_FIELD_NUMBER: _ClassVar[int]
    CAPABILITIES_FIELD_NUMBER: _ClassVar[int]
    COLOUR_FIELD_NUMBER: _ClassVar[int]
    SILENT_S_FIELD_NUMBER: _ClassVar[int]
    MEMORY_FREE_BYTES_FIELD_NUMBER: _ClassVar[int]
    VNODES_FIELD_NUMBER: _ClassVar[int]
    TASKS_DONE_FIELD_NUMBER: _ClassVar[int]
    LEAVING_FIELD_NUMBER: _ClassVar[int]
    descriptor: Descriptor
    capabilities: Capabilities
    colour: str
    silent_s: float
    memory_free_bytes: int
    vnodes: _containers.RepeatedScalarFieldContainer[str]
    tasks_done: int
    leaving: bool
    def __init__(self, descriptor: _Optional[_Union[Descriptor, _Mapping]] = ..., capabilities: _Optional[_Union[Capabilities, _Mapping]] = ..., colour: _Optional[str] = ..., silent_s: _Optional[float] = ..., memory_free_bytes: _Optional[int] = ..., vnodes: _Optional[_Iterable[str]] = ..., tasks_done: _Optional[int] = ..., leaving: bool = ...) -> None: ...

class CollectGarbage(_message.Message):
    __slots__ = ("session", "delete")
    SESSION_FIELD_NUMBER: _ClassVar[int]
    DELETE_FIELD_NUMBER: _ClassVar[int]
    session: str
    delete: bool
    def __init__(self, session: _Optional[str] = ..., delete: bool = ...) -> None: ...

class Garbage(_message.Message):
    __slots__ = ("session", "keys")
    SESSION_FIELD_NUMBER: _ClassVar[int]
    KEYS_FIELD_NUMBER: _ClassVar[int]
    session: str
    keys: _containers.RepeatedScalarFieldContainer[str]
    def __init__(self, session: _Optional[str] = ..., keys: _Optional[_Iterable[str]] = ...) -> None: ...

class DrainNode(_message.Message):
    __slots__ = ("peer", "on")
    PEER_FIELD_NUMBER: _ClassVar[int]
    ON_FIELD_NUMBER: _ClassVar[int]
    peer: str
    on: bool
    def __init__(self, peer: _Optional[str] = ..., on: bool = ...) -> None: ...

class Draining(_message.Message):
    __slots__ = ("peer", "on")
    PEER_FIELD_NUMBER: _ClassVar[int]
    ON_FIELD_NUMBER: _ClassVar[int]
    peer: str
    on: bool
    def __init__(self, peer: _Optional[str] = ..., on: bool = ...) -> None: ...

class NodeList(_message.Message):
    __slots__ = ("nodes",)
    NODES_FIELD_NUMBER: _ClassVar[int]
    nodes: _containers.RepeatedCompositeFieldContainer[NodeInfo]
    def __init__(self, nodes: _Optional[_Iterable[_Union[NodeInfo, _Mapping]]] = ...) -> None: ...

class GetStatus(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class Status(_message.Message):
    __slots__ = ("descriptor", "uptime_s", "nodes", "sessions_running", "sessions", "store", "resident_bytes", "unix_s", "others")
    DESCRIPTOR_FIELD_NUMBER: _ClassVar[int]
    UPTIME_S_FIELD_NUMBER: _ClassVar[int]
    NODES_FIELD_NUMBER: _ClassVar[int]
    SESSIONS_RUNNING_FIELD_NUMBER: _ClassVar[int]
    SESSIONS_FIELD_NUMBER: _ClassVar[int]
    STORE_FIELD_NUMBER: _ClassVar[int]
    RESIDENT_BYTES_FIELD_NUMBER: _ClassVar[int]
    UNIX_S_FIELD_NUMBER: _ClassVar[int]
    OTHERS_FIELD_NUMBER: _ClassVar[int]
    descriptor: Descriptor
    uptime_s: float
    nodes: int
    sessions_running: int
    sessions: int
    store: str
    resident_bytes: int
    unix_s: float
    others: _containers.RepeatedScalarFieldContainer[str]
    def __init__(self, descriptor: _Optional[_Union[Descriptor, _Mapping]] = ..., uptime_s: _Optional[float] = ..., nodes: _Optional[int] = ..., sessions_running: _Optional[int] = ..., sessions: _Optional[int] = ..., store: _Optional[str] = ..., resident_bytes: _Optional[int] = ..., unix_s: _Optional[float] = ..., others: _Optional[_Iterable[str]] = ...) -> None: ...

class Locate(_message.Message):
    __slots__ = ("session", "vnode")
    SESSION_FIELD_NUMBER: _ClassVar[int]
    VNODE_FIELD_NUMBER: _ClassVar[int]
    session: str
    vnode: str
    def __init__(self, session: _Optional[str] = ..., vnode: _Optional[str] = ...) -> None: ...

class Located(_message.Message):
    __slots__ = ("peer", "addresses", "instance", "log_index")
    PEER_FIELD_NUMBER: _ClassVar[int]
    ADDRESSES_FIELD_NUMBER: _ClassVar[int]
    INSTANCE_FIELD_NUMBER: _ClassVar[int]
    LOG_INDEX_FIELD_NUMBER: _ClassVar[int]
    peer: str
    addresses: _containers.RepeatedScalarFieldContainer[str]
    instance: int
    log_index: int
    def __init__(self, peer: _Optional[str] = ..., addresses: _Optional[_Iterable[str]] = ..., instance: _Optional[int] = ..., log_index: _Optional[int] = ...) -> None: ...

class ReadSession(_message.Message):
    __slots__ = ("session",)
    SESSION_FIELD_NUMBER: _ClassVar[int]
    session: str
    def __init__(self, session: _Optional[str] = ...) -> None: ...

class CommitInfo(_message.Message):
    __slots__ = ("step", "manifest")
    STEP_FIELD_NUMBER: _ClassVar[int]
    MANIFEST_FIELD_NUMBER: _ClassVar[int]
    step: int
    manifest: str
    def __init__(self, step: _Optional[int] = ..., manifest: _Optional[str] = ...) -> None: ...

class SessionFiles(_message.Message):
    __slots__ = ("session", "record", "definition", "entries", "commits", "token", "rows_token")
    SESSION_FIELD_NUMBER: _ClassVar[int]
    RECORD_FIELD_NUMBER: _ClassVar[int]
    DEFINITION_FIELD_NUMBER: _ClassVar[int]
    ENTRIES_FIELD_NUMBER: _ClassVar[int]
    COMMITS_FIELD_NUMBER: _ClassVar[int]
    TOKEN_FIELD_NUMBER: _ClassVar[int]
    ROWS_TOKEN_FIELD_NUMBER: _ClassVar[int]
    session: str
    record: bytes
    definition: bytes
    entries: _containers.RepeatedScalarFieldContainer[bytes]
    commits: _containers.RepeatedCompositeFieldContainer[CommitInfo]
    token: str
    rows_token: str
    def __init__(self, session: _Optional[str] = ..., record: _Optional[bytes] = ..., definition: _Optional[bytes] = ..., entries: _Optional[_Iterable[bytes]] = ..., commits: _Optional[_Iterable[_Union[CommitInfo, _Mapping]]] = ..., token: _Optional[str] = ..., rows_token: _Optional[str] = ...) -> None: ...

class Generate(_message.Message):
    __slots__ = ("target", "prompt", "max_tokens", "temperature", "top_p", "seed")
    TARGET_FIELD_NUMBER: _ClassVar[int]
    PROMPT_FIELD_NUMBER: _ClassVar[int]
    MAX_TOKENS_FIELD_NUMBER: _ClassVar[int]
    TEMPERATURE_FIELD_NUMBER: _ClassVar[int]
    TOP_P_FIELD_NUMBER: _ClassVar[int]
    SEED_FIELD_NUMBER: _ClassVar[int]
    target: str
    prompt: _containers.RepeatedScalarFieldContainer[int]
    max_tokens: int
    temperature: float
    top_p: float
    seed: int
    def __init__(self, target: _Optional[str] = ..., prompt: _Optional[_Iterable[int]] = ..., max_tokens: _Optional[int] = ..., temperature: _Optional[float] = ..., top_p: _Optional[float] = ..., seed: _Optional[int] = ...) -> None: ...

class Forward(_message.Message):
    __slots__ = ("target", "inputs", "rows", "step", "last")
    TARGET_FIELD_NUMBER: _ClassVar[int]
    INPUTS_FIELD_NUMBER: _ClassVar[int]
    ROWS_FIELD_NUMBER: _ClassVar[int]
    STEP_FIELD_NUMBER: _ClassVar[int]
    LAST_FIELD_NUMBER: _ClassVar[int]
    target: str
    inputs: _containers.RepeatedCompositeFieldContainer[InlineTensor]
    rows: int
    step: int
    last: bool
    def __init__(self, target: _Optional[str] = ..., inputs: _Optional[_Iterable[_Union[InlineTensor, _Mapping]]] = ..., rows: _Optional[int] = ..., step: _Optional[int] = ..., last: bool = ...) -> None: ...

class Forwarded(_message.Message):
    __slots__ = ("session", "step", "output", "shape", "dtype", "data")
    SESSION_FIELD_NUMBER: _ClassVar[int]
    STEP_FIELD_NUMBER: _ClassVar[int]
    OUTPUT_FIELD_NUMBER: _ClassVar[int]
    SHAPE_FIELD_NUMBER: _ClassVar[int]
    DTYPE_FIELD_NUMBER: _ClassVar[int]
    DATA_FIELD_NUMBER: _ClassVar[int]
    session: str
    step: int
    output: str
    shape: _containers.RepeatedScalarFieldContainer[int]
    dtype: str
    data: bytes
    def __init__(self, session: _Optional[str] = ..., step: _Optional[int] = ..., output: _Optional[str] = ..., shape: _Optional[_Iterable[int]] = ..., dtype: _Optional[str] = ..., data: _Optional[bytes] = ...) -> None: ...

class Generated(_message.Message):
    __slots__ = ("token", "session", "step", "dataset")
    TOKEN_FIELD_NUMBER: _ClassVar[int]
    SESSION_FIELD_NUMBER: _ClassVar[int]
    STEP_FIELD_NUMBER: _ClassVar[int]
    DATASET_FIELD_NUMBER: _ClassVar[int]
    token: int
    session: str
    step: int
    dataset: str
    def __init__(self, token: _Optional[int] = ..., session: _Optional[str] = ..., step: _Optional[int] = ..., dataset: _Optional[str] = ...) -> None: ...

class ValidateSession(_message.Message):
    __slots__ = ("session",)
    SESSION_FIELD_NUMBER: _ClassVar[int]
    session: str
    def __init__(self, session: _Optional[str] = ...) -> None: ...

class Validated(_message.Message):
    __slots__ = ("session", "step", "loss", "rows")
    SESSION_FIELD_NUMBER: _ClassVar[int]
    STEP_FIELD_NUMBER: _ClassVar[int]
    LOSS_FIELD_NUMBER: _ClassVar[int]
    ROWS_FIELD_NUMBER: _ClassVar[int]
    session: str
    step: int
    loss: float
    rows: int
    def __init__(self, session: _Optional[str] = ..., step: _Optional[int] = ..., loss: _Optional[float] = ..., rows: _Optional[int] = ...) -> None: ...
