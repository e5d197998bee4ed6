from dcnr.adapters.grpc.generated import messages_pb2 as _messages_pb2
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class Frame(_message.Message):
    __slots__ = ("hello", "bye", "chunk", "leave", "heartbeat", "tickets", "withdraw", "open_microbatch", "step_close", "snapshot_at", "committed", "abandoned", "adopt", "orchestrators", "guard", "marked", "drain", "move_refused", "home_copied", "ticket_answer", "withdrawn", "task_answer", "stale_epoch", "done", "loss", "step_summaries", "updated", "snapshot_answer", "stored", "snapshot_failed", "task_failed", "loaded", "adopted", "frame_ack")
    HELLO_FIELD_NUMBER: _ClassVar[int]
    BYE_FIELD_NUMBER: _ClassVar[int]
    CHUNK_FIELD_NUMBER: _ClassVar[int]
    LEAVE_FIELD_NUMBER: _ClassVar[int]
    HEARTBEAT_FIELD_NUMBER: _ClassVar[int]
    TICKETS_FIELD_NUMBER: _ClassVar[int]
    WITHDRAW_FIELD_NUMBER: _ClassVar[int]
    OPEN_MICROBATCH_FIELD_NUMBER: _ClassVar[int]
    STEP_CLOSE_FIELD_NUMBER: _ClassVar[int]
    SNAPSHOT_AT_FIELD_NUMBER: _ClassVar[int]
    COMMITTED_FIELD_NUMBER: _ClassVar[int]
    ABANDONED_FIELD_NUMBER: _ClassVar[int]
    ADOPT_FIELD_NUMBER: _ClassVar[int]
    ORCHESTRATORS_FIELD_NUMBER: _ClassVar[int]
    GUARD_FIELD_NUMBER: _ClassVar[int]
    MARKED_FIELD_NUMBER: _ClassVar[int]
    DRAIN_FIELD_NUMBER: _ClassVar[int]
    MOVE_REFUSED_FIELD_NUMBER: _ClassVar[int]
    HOME_COPIED_FIELD_NUMBER: _ClassVar[int]
    TICKET_ANSWER_FIELD_NUMBER: _ClassVar[int]
    WITHDRAWN_FIELD_NUMBER: _ClassVar[int]
    TASK_ANSWER_FIELD_NUMBER: _ClassVar[int]
    STALE_EPOCH_FIELD_NUMBER: _ClassVar[int]
    DONE_FIELD_NUMBER: _ClassVar[int]
    LOSS_FIELD_NUMBER: _ClassVar[int]
    STEP_SUMMARIES_FIELD_NUMBER: _ClassVar[int]
    UPDATED_FIELD_NUMBER: _ClassVar[int]
    SNAPSHOT_ANSWER_FIELD_NUMBER: _ClassVar[int]
    STORED_FIELD_NUMBER: _ClassVar[int]
    SNAPSHOT_FAILED_FIELD_NUMBER: _ClassVar[int]
    TASK_FAILED_FIELD_NUMBER: _ClassVar[int]
    LOADED_FIELD_NUMBER: _ClassVar[int]
    ADOPTED_FIELD_NUMBER: _ClassVar[int]
    FRAME_ACK_FIELD_NUMBER: _ClassVar[int]
    hello: Hello
    bye: Bye
    chunk: Chunk
    leave: _messages_pb2.Leave
    heartbeat: _messages_pb2.Heartbeat
    tickets: _messages_pb2.Tickets
    withdraw: _messages_pb2.Withdraw
    open_microbatch: _messages_pb2.OpenMicrobatch
    step_close: _messages_pb2.StepClose
    snapshot_at: _messages_pb2.SnapshotAt
    committed: _messages_pb2.Committed
    abandoned: _messages_pb2.Abandoned
    adopt: _messages_pb2.Adopt
    orchestrators: _messages_pb2.Orchestrators
    guard: _messages_pb2.Guard
    marked: _messages_pb2.Marked
    drain: _messages_pb2.Drain
    move_refused: _messages_pb2.MoveRefused
    home_copied: _messages_pb2.HomeCopied
    ticket_answer: _messages_pb2.TicketAnswer
    withdrawn: _messages_pb2.Withdrawn
    task_answer: _messages_pb2.TaskAnswer
    stale_epoch: _messages_pb2.StaleEpoch
    done: _messages_pb2.Done
    loss: _messages_pb2.Loss
    step_summaries: _messages_pb2.StepSummaries
    updated: _messages_pb2.Updated
    snapshot_answer: _messages_pb2.SnapshotAnswer
    stored: _messages_pb2.Stored
    snapshot_failed: _messages_pb2.SnapshotFailed
    task_failed: _messages_pb2.TaskFailed
    loaded: _messages_pb2.Loaded
    adopted: _messages_pb2.Adopted
    frame_ack: _messages_pb2.FrameAck
    def __init__(self, hello: _Optional[_Union[Hello, _Mapping]] = ..., bye: _Optional[_Union[Bye, _Mapping]] = ..., chunk: _Optional[_Union[Chunk, _Mapping]] = ..., leave: _Optional[_Union[_messages_pb2.Leave, _Mapping]] = ..., heartbeat: _Optional[_Union[_messages_pb2.Heartbeat, _Mapping]] = ..., tickets: _Optional[_Union[_messages_pb2.Tickets, _Mapping]] = ..., withdraw: _Optional[_Union[_messages_pb2.Withdraw, _Mapping]] = ..., open_microbatch: _Optional[_Union[_messages_pb2.OpenMicrobatch, _Mapping]] = ..., step_close: _Optional[_Union[_messages_pb2.StepClose, _Mapping]] = ..., snapshot_at: _Optional[_Union[_messages_pb2.SnapshotAt, _Mapping]] = ..., committed: _Optional[_Union[_messages_pb2.Committed, _Mapping]] = ..., abandoned: _Optional[_Union[_messages_pb2.Abandoned, _Mapping]] = ..., adopt: _Optional[_Union[_messages_pb2.Adopt, _Mapping]] = ..., orchestrators: _Optional[_Union[_messages_pb2.Orchestrators, _Mapping]] = ..., guard: _Optional[_Union[_messages_pb2.Guard, _Mapping]] = ..., marked: _Optional[_Union[_messages_pb2.Marked, _Mapping]] = ..., drain: _Optional[_Union[_messages_pb2.Drain, _Mapping]] = ..., move_refused: _Optional[_Union[_messages_pb2.MoveRefused, _Mapping]] = ..., home_copied: _Optional[_Union[_messages_pb2.HomeCopied, _Mapping]] = ..., ticket_answer: _Optional[_Union[_messages_pb2.TicketAnswer, _Mapping]] = ..., withdrawn: _Optional[_Union[_messages_pb2.Withdrawn, _Mapping]] = ..., task_answer: _Optional[_Union[_messages_pb2.TaskAnswer, _Mapping]] = ..., stale_epoch: _Optional[_Union[_messages_pb2.StaleEpoch, _Mapping]] = ..., done: _Optional[_Union[_messages_pb2.Done, _Mapping]] = ..., loss: _Optional[_Union[_messages_pb2.Loss, _Mapping]] = ..., step_summaries: _Optional[_Union[_messages_pb2.StepSummaries, _Mapping]] = ..., updated: _Optional[_Union[_messages_pb2.Updated, _Mapping]] = ..., snapshot_answer: _Optional[_Union[_messages_pb2.SnapshotAnswer, _Mapping]] = ..., stored: _Optional[_Union[_messages_pb2.Stored, _Mapping]] = ..., snapshot_failed: _Optional[_Union[_messages_pb2.SnapshotFailed, _Mapping]] = ..., task_failed: _Optional[_Union[_messages_pb2.TaskFailed, _Mapping]] = ..., loaded: _Optional[_Union[_messages_pb2.Loaded, _Mapping]] = ..., adopted: _Optional[_Union[_messages_pb2.Adopted, _Mapping]] = ..., frame_ack: _Optional[_Union[_messages_pb2.FrameAck, _Mapping]] = ...) -> None: ...

class Hello(_message.Message):
    __slots__ = ("descriptor", "nonce", "expected", "previous")
    DESCRIPTOR_FIELD_NUMBER: _ClassVar[int]
    NONCE_FIELD_NUMBER: _ClassVar[int]
    EXPECTED_FIELD_NUMBER: _ClassVar[int]
    PREVIOUS_FIELD_NUMBER: _ClassVar[int]
    descriptor: _messages_pb2.Descriptor
    nonce: str
    expected: str
    previous: str
    def __init__(self, descriptor: _Optional[_Union[_messages_pb2.Descriptor, _Mapping]] = ..., nonce: _Optional[str] = ..., expected: _Optional[str] = ..., previous: _Optional[str] = ...) -> None: ...

class Bye(_message.Message):
    __slots__ = ("reason",)
    REASON_FIELD_NUMBER: _ClassVar[int]
    reason: str
    def __init__(self, reason: _Optional[str] = ...) -> None: ...

class Chunk(_message.Message):
    __slots__ = ("frame", "header", "size", "offset", "last", "data")
    FRAME_FIELD_NUMBER: _ClassVar[int]
    HEADER_FIELD_NUMBER: _ClassVar[int]
    SIZE_FIELD_NUMBER: _ClassVar[int]
    OFFSET_FIELD_NUMBER: _ClassVar[int]
    LAST_FIELD_NUMBER: _ClassVar[int]
    DATA_FIELD_NUMBER: _ClassVar[int]
    frame: int
    header: _messages_pb2.TensorFrame
    size: int
    offset: int
    last: bool
    data: bytes
    def __init__(self, frame: _Optional[int] = ..., header: _Optional[_Union[_messages_pb2.TensorFrame, _Mapping]] = ..., size: _Optional[int] = ..., offset: _Optional[int] = ..., last: bool = ..., data: _Optional[bytes] = ...) -> None: ...
