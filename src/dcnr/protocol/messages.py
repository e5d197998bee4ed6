"""What peers say to each other, as plain dataclasses; ``proto/dcnr/v1`` is the same in protobuf.

The wire adapter maps each class to the proto message of the same name, field by field. Rules: fields are
only ever added; sequences are tuples; bytes that grow with a network (definitions, records) are JSON.

Fences. A *command* of an orchestrator carries ``(session, epoch)``; a host refuses an epoch lower than the
highest it has accepted. A *frame* between VNodes carries the instances of both ends. A serving session
(``serve-<nonce>``) is in no log: its epoch and instances are 0 and its nonce, being the name, is the fence.
"""

from __future__ import annotations

from dataclasses import dataclass

from dcnr.ids import (
    DatasetId,
    Epoch,
    Incarnation,
    Instance,
    LogIndex,
    NetworkId,
    PeerId,
    SessionId,
    Sha256,
    VNodeId,
)
from dcnr.machine import TensorRef
from dcnr.protocol.frames import Direction as Direction
from dcnr.protocol.frames import FrameStatus as FrameStatus


class Message:
    """Base of everything that crosses a process border."""

    __slots__ = ()


# --- who is there ------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class Capabilities(Message):
    """What a PNode offers, within the limits that its owner set. Measured once at its start."""

    cores: int
    memory_bytes: int
    """For VNodes: what the owner allows, less the program's own needs."""
    architecture: str
    numeric_class: str
    class_facts: tuple[str, ...]
    """What the class was hashed from, readable: ``torch=2.13.0+cpu`` ..."""
    gflops: float
    threads: int
    workers: int = 1
    accelerator: str = ""
    catalogue: str = ""
    """Digest of the operator catalogue."""
    hostname: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Descriptor(Message):
    """How to reach a peer."""

    peer: PeerId
    incarnation: Incarnation
    role: str
    addresses: tuple[str, ...]
    version_min: int
    version_max: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Register(Message):
    """Unary call of a PNode to an orchestrator, repeated after every new start of either."""

    descriptor: Descriptor
    capabilities: Capabilities


@dataclass(frozen=True, slots=True, kw_only=True)
class Registered(Message):
    descriptor: Descriptor
    """The orchestrator's own."""
    heartbeat_interval_s: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Orchestrators(Message):
    """To every linked PNode, now and when it changes: where the other living orchestrators of the same store are."""

    addresses: tuple[str, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Leave(Message):
    """A PNode says goodbye: what it still hosts is an announced loss. Sent on the link."""

    reason: str


# --- heartbeats --------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class Progress(Message):
    """How a session's tasks stand on one PNode."""

    session: SessionId
    epoch: Epoch
    tasks_done: int
    """Compute tasks finished since the ticket: what must grow while anything is open."""
    task_age_s: float
    """Age of the running task, 0 when idle."""
    task_usual_s: float
    """Slowest finished task of that kind; 0 = none yet."""
    owner: PeerId = PeerId("")
    """The orchestrator whose command it hosts the session on."""
    reserved_bytes: int = 0
    """What the session holds here: other orchestrators cannot know it otherwise."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Heartbeat(Message):
    sequence: int
    memory_free_bytes: int
    progress: tuple[Progress, ...]
    leaving: bool = False
    """It is to give up what it hosts, and takes nothing new."""
    unreachable: tuple[PeerId, ...] = ()
    """PNodes that frames wait for and that have not been linked for ``link_grace_s``."""


# --- references --------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class RowsRef(Message):
    """Rows of a dataset, by reference. Columns come back as tensors of shape [rows, ...] in the order named.

    A text dataset gives ``tokens`` and ``targets``, int64 [rows, context], ``targets[i] = tokens[i+1]``.
    """

    dataset: DatasetId
    split: str
    """``train`` or ``validation``."""
    context: int
    """0 for column datasets."""
    rows: tuple[int, ...]
    columns: tuple[str, ...]
    token: str


@dataclass(frozen=True, slots=True, kw_only=True)
class StateRef(Message):
    """Where a VNode's state comes from: an object of the session's store, or (empty ``sha256``) init(seed)."""

    vnode: VNodeId
    sha256: Sha256
    size_bytes: int
    token: str
    holder: tuple[Neighbour, ...] = ()
    """A PNode that keeps it, or none: then the store has it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Location(Message):
    """A VNode's place. ``address`` are its PNode's."""

    vnode: VNodeId
    peer: PeerId
    worker: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Neighbour(Message):
    """A PNode of the placement, and which start of it is meant."""

    peer: PeerId
    incarnation: Incarnation
    addresses: tuple[str, ...]


# --- commands: orchestrator to PNode -----------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class Tickets(Message):
    """The right, and the duty, to host VNodes: one message per host and placement.

    The host drops every older instance of the session, persists its fence, reserves memory for the
    VNodes placed on it, and answers :class:`TicketAnswer`. State is loaded at the first frame.
    """

    session: SessionId
    epoch: Epoch
    owner: PeerId
    instance: Instance
    """Index of the ``Place`` or ``Rollback`` entry; 0 for serving."""
    network: NetworkId
    definition: bytes
    """Canonical JSON of the network."""
    record: bytes
    """Canonical JSON of the session's record (for serving: of the session that was trained)."""
    placement: tuple[Location, ...]
    """Every VNode that takes part, in the file's order; not only this host's."""
    neighbours: tuple[Neighbour, ...]
    window: int
    base_step: int
    """Version of the states in ``states``; 0 = init."""
    states: tuple[StateRef, ...]
    """Of this host's VNodes with parameters."""
    serving: bool = False
    trained: SessionId = SessionId("")
    """Serving: the session whose checkpoint this is."""
    results: tuple[OutputRef, ...] = ()
    """Serving: outputs that are sent to the owner as :class:`TensorFrame` with ``edge = -1 - position``."""
    rows: int = 1
    """Rows of a microbatch."""
    time_to_live_s: float = 0.0
    retry: int = 0
    """Counts repetitions of the same ticket; answered again, acted on once."""


@dataclass(frozen=True, slots=True, kw_only=True)
class OutputRef(Message):
    vnode: VNodeId
    slot: int
    last_position: bool = False
    """Only the last position of axis 1 is wanted (generation)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Withdraw(Message):
    """Release every instance of the session that is older than ``before``; the host keeps its fence."""

    session: SessionId
    epoch: Epoch
    before: Instance
    forget_snapshots: bool = False
    """The session has ended: local snapshots are of no more use."""


@dataclass(frozen=True, slots=True, kw_only=True)
class OpenMicrobatch(Message):
    """Start (step, microbatch) at a segment that has inputs or targets by reference."""

    session: SessionId
    epoch: Epoch
    instance: Instance
    step: int
    microbatch: int
    rows: tuple[RowsRef, ...]
    """One reference, or none where ``inline`` is given."""
    valid_targets: tuple[CostTargets, ...]
    inline: tuple[InlineTensor, ...] = ()
    done_step: int = 0
    """Every step up to this is done everywhere: reports about them need no repetition."""


@dataclass(frozen=True, slots=True, kw_only=True)
class CostTargets(Message):
    """Valid targets of the whole step at one cost VNode: the divisor of its mean."""

    vnode: VNodeId
    count: int


@dataclass(frozen=True, slots=True, kw_only=True)
class InlineTensor(Message):
    """A small input tensor by value (generation's prefix, explicit tensors). ``data`` is little endian, row-major."""

    column: str
    """The name of the network's input: no dataset, hence no column, is behind it."""
    shape: tuple[int, ...]
    dtype: str
    data: bytes


@dataclass(frozen=True, slots=True, kw_only=True)
class StepClose(Message):
    """The one clipping factor of a step. Deterministic, so a successor sends the same."""

    session: SessionId
    epoch: Epoch
    instance: Instance
    step: int
    grad_scale: float


@dataclass(frozen=True, slots=True, kw_only=True)
class SnapshotAt(Message):
    """Keep the state after ``step`` and store it. ``step`` is not yet opened."""

    session: SessionId
    epoch: Epoch
    step: int
    token: str
    guard: tuple[Neighbour, ...] = ()
    """A PNode that keeps it beside this one, or none: then it goes to the store."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Committed(Message):
    """The log names the manifest of ``step``: older snapshots may go."""

    session: SessionId
    epoch: Epoch
    step: int
    manifest: Sha256


@dataclass(frozen=True, slots=True, kw_only=True)
class Guard(Message):
    """Keep states of this session for other PNodes, and give them back, to whoever brings ``token``."""

    session: SessionId
    epoch: Epoch
    token: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Drain(Message):
    """Give up what is hosted and take nothing new (``on``), or be of use again."""

    on: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class MoveRefused(Message):
    """To a PNode that leaves: there is no other place for the session's VNodes, so it need not wait for one."""

    session: SessionId
    reason: str


@dataclass(frozen=True, slots=True, kw_only=True)
class HomeCopied(Message):
    """To a PNode: another process came with its identity, so with a copy of its home, and was refused. ``hostname`` and
    ``addresses`` are that process's."""

    hostname: str
    addresses: tuple[str, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Marked(Message):
    """The state after ``step`` is whole on PNodes: older ones that are in no commit may go."""

    session: SessionId
    epoch: Epoch
    step: int
    keep: tuple[Sha256, ...] = ()
    """What this PNode keeps of it for others."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Abandoned(Message):
    session: SessionId
    epoch: Epoch
    step: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Adopt(Message):
    """A new owner takes over a session that goes on: the epoch changes, no instance does. ``acquire`` is its log entry;
    ``token`` reads the session's objects. Said again on every new link until :class:`Adopted` comes."""

    session: SessionId
    epoch: Epoch
    owner: PeerId
    acquire: bytes
    token: str = ""


# --- answers and reports: PNode to orchestrator ------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class TicketAnswer(Message):
    session: SessionId
    epoch: Epoch
    instance: Instance
    accepted: bool
    reason: str = ""
    missing_bytes: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Withdrawn(Message):
    session: SessionId
    epoch: Epoch
    before: Instance


@dataclass(frozen=True, slots=True, kw_only=True)
class TaskAnswer(Message):
    """Every task is acknowledged: accepted, or refused with the reason."""

    session: SessionId
    instance: Instance
    step: int
    microbatch: int
    accepted: bool
    reason: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class StaleEpoch(Message):
    session: SessionId
    current: Epoch
    owner: PeerId


@dataclass(frozen=True, slots=True, kw_only=True)
class MetricValue(Message):
    """A number that belongs to a metric of the network, by the metric's name."""

    name: str
    value: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Done(Message):
    """A segment has finished its last task for a microbatch and freed its tensors.

    ``squares``: sums of squares of the activations that an ``activation_rms`` of the network names.
    """

    session: SessionId
    instance: Instance
    segment: int
    step: int
    microbatch: int
    forward_s: float = 0.0
    """Measured compute seconds; feeds placement and ``explain``, never a bit."""
    backward_s: float = 0.0
    squares: tuple[MetricValue, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Loss(Message):
    """The loss of one microbatch at one cost VNode: sum over its valid targets / valid targets of the step, times nothing else."""

    session: SessionId
    instance: Instance
    vnode: VNodeId
    step: int
    microbatch: int
    loss: float


@dataclass(frozen=True, slots=True, kw_only=True)
class StepSummary(Message):
    """A VNode's folded gradient of one step: sum of squares in float64, and whether it is finite."""

    vnode: VNodeId
    grad_sq: float
    finite: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class StepSummaries(Message):
    session: SessionId
    instance: Instance
    step: int
    summaries: tuple[StepSummary, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Updated(Message):
    """VNodes have applied step ``step``. A VNode in ``not_finite`` has non-finite weights: never stored.

    ``metrics``: those of gradients and weights that the network names at these VNodes.
    """

    session: SessionId
    instance: Instance
    step: int
    vnodes: tuple[VNodeId, ...]
    not_finite: tuple[VNodeId, ...] = ()
    update_s: float = 0.0
    metrics: tuple[MetricValue, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class SnapshotAnswer(Message):
    session: SessionId
    epoch: Epoch
    step: int
    accepted: bool
    reason: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Stored(Message):
    """The state of a VNode after ``step`` is in the store. Repeated until Committed or Abandoned."""

    session: SessionId
    instance: Instance
    step: int
    vnode: VNodeId
    sha256: Sha256
    size_bytes: int


@dataclass(frozen=True, slots=True, kw_only=True)
class SnapshotFailed(Message):
    session: SessionId
    instance: Instance
    step: int
    reason: str


@dataclass(frozen=True, slots=True, kw_only=True)
class TaskFailed(Message):
    """A VNode could not compute (where it is not known which, ``vnode`` names the segment's first) or its inputs could not be had.

    ``cause`` is ``compute``, ``data`` (rows could not be read), ``state`` (a state object could not be read or
    is damaged), ``ticket`` (of a serving set: a receiver has dropped its ticket) or ``divergence`` (same key, other
    digest; ``reason`` names both senders).
    """

    session: SessionId
    instance: Instance
    vnode: VNodeId
    step: int
    microbatch: int
    cause: str
    reason: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Loaded(Message):
    """The states of a host are in memory: a phase of recovery worth timing."""

    session: SessionId
    instance: Instance
    vnodes: tuple[VNodeId, ...]
    local: int
    """How many came from the home's snapshots."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Adopted(Message):
    """A host's answer to :class:`Adopt`. Before it, on the same link, it says again every report that the owner may need:
    losses since the newest commit, and everything of steps from ``kept_from`` on. ``instance`` 0 = it hosts nothing."""

    session: SessionId
    epoch: Epoch
    instance: Instance
    versions: tuple[tuple[VNodeId, int], ...] = ()
    """Of its VNodes that are updated."""
    open_microbatches: tuple[tuple[int, int], ...] = ()
    """The newest (step, microbatch) that was opened here, if any: those before it were opened too."""
    snapshot_at: int = 0
    """Step of the snapshot that is planned or stored and not answered; 0 = none."""
    kept_from: int = 0
    scales: tuple[tuple[int, float], ...] = ()
    """(step, clipping factor) since the newest commit."""


# --- between PNodes ----------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class TensorFrame(Message):
    """A tensor on an edge: activations down it, gradients up it.

    The key (session, source instance, target instance, edge, direction, step, microbatch) is delivered at least
    once and consumed once. The same key with another digest is a divergence.
    """

    session: SessionId
    edge: int
    """Index in the network's edges; negative: a serving result (see ``Tickets.results``)."""
    direction: Direction
    step: int
    microbatch: int
    source_instance: Instance
    target_instance: Instance
    target_incarnation: Incarnation
    tensor: TensorRef


@dataclass(frozen=True, slots=True, kw_only=True)
class FrameAck(Message):
    session: SessionId
    edge: int
    direction: Direction
    step: int
    microbatch: int
    source_instance: Instance
    target_instance: Instance
    status: FrameStatus
    reason: str = ""


# --- clients -----------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class Refusal(Message):
    """No, and why. ``kind`` names the class of the error tree that the client raises."""

    kind: str
    reason: str


@dataclass(frozen=True, slots=True, kw_only=True)
class CreateNetwork(Message):
    definition: bytes
    """Canonical JSON (``dcnr.network.graph.canonical_json``)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class NetworkCreated(Message):
    network: NetworkId


@dataclass(frozen=True, slots=True, kw_only=True)
class ListNetworks(Message):
    pass


@dataclass(frozen=True, slots=True, kw_only=True)
class NetworkInfo(Message):
    network: NetworkId
    name: str
    parameters: int
    vnodes: int


@dataclass(frozen=True, slots=True, kw_only=True)
class NetworkList(Message):
    networks: tuple[NetworkInfo, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class GetNetwork(Message):
    network: str
    """Id, unique prefix of it, or name."""


@dataclass(frozen=True, slots=True, kw_only=True)
class NetworkDefinition(Message):
    network: NetworkId
    definition: bytes


@dataclass(frozen=True, slots=True, kw_only=True)
class CreateSession(Message):
    network: NetworkId
    dataset: DatasetId
    recipe: bytes
    """Canonical JSON of a :class:`~dcnr.session.recipe.Recipe`."""
    nonce: str
    """Drawn by the client: the same request sent twice makes one session."""
    init_from: str = ""
    """``SESSION[@STEP]``: the commit, of another session, whose weights this one begins with; empty = init(seed)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SessionCreated(Message):
    session: SessionId


@dataclass(frozen=True, slots=True, kw_only=True)
class SessionQuery(Message):
    """``session`` is an id, a unique prefix of one, or empty for all (newest last)."""

    session: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class SegmentTime(Message):
    """What a segment's host has measured under the newest placement: means over ``microbatches``, computing alone."""

    segment: int
    peer: PeerId
    forward_s: float
    backward_s: float
    microbatches: int


@dataclass(frozen=True, slots=True, kw_only=True)
class SessionInfo(Message):
    session: SessionId
    network: NetworkId
    network_name: str
    dataset: DatasetId
    state: str
    """starting, waiting, running, recovering, suspended, stopped, finished, failed."""
    reason: str
    step: int
    steps: int
    loss: float
    committed_step: int
    epoch: Epoch
    created_unix_s: float
    placement: tuple[Location, ...]
    record: bytes
    measured: tuple[SegmentTime, ...] = ()
    """Segments that have finished no microbatch are left out."""
    owner: PeerId = PeerId("")
    """The orchestrator that owns it: only that one controls it and tells its events."""
    owner_addresses: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class SessionList(Message):
    sessions: tuple[SessionInfo, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class ControlSession(Message):
    session: str
    action: str
    """``stop``, ``suspend`` or ``resume``."""


@dataclass(frozen=True, slots=True, kw_only=True)
class CollectGarbage(Message):
    """Which objects of a session does nothing name any more? ``delete``: and delete them."""

    session: str
    delete: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class Garbage(Message):
    session: SessionId
    keys: tuple[str, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class DrainNode(Message):
    """A PNode is to give up what it hosts and take nothing new (``on``), or to be of use again."""

    peer: str
    """Or a unique prefix of four characters at least."""
    on: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class Draining(Message):
    peer: PeerId
    on: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class ValidateSession(Message):
    """Streaming call, for it may take long: the loss of the newest commit over all rows that are held out."""

    session: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Validated(Message):
    """``rows``: whole microbatches of the held-out rows; ``loss`` is the mean over their valid targets."""

    session: SessionId
    step: int
    loss: float
    rows: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Controlled(Message):
    session: SessionId
    state: str


@dataclass(frozen=True, slots=True, kw_only=True)
class FollowSession(Message):
    """Stream of :class:`EventRecord`: StepDone from ``after_step`` + 1 on, and every other event from now on.

    ``step_done`` events are told once each and in order, across rollbacks; the client drops what it has seen.
    """

    session: str
    after_step: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class FollowEvents(Message):
    """Stream of :class:`EventRecord`: what the event log still holds from ``after`` on; then live if ``follow``."""

    after: int = 0
    follow: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class EventRecord(Message):
    sequence: int
    unix_s: float
    kind: str
    session: str
    data: str
    """JSON object."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ListNodes(Message):
    pass


@dataclass(frozen=True, slots=True, kw_only=True)
class NodeInfo(Message):
    descriptor: Descriptor
    capabilities: Capabilities
    colour: str
    """green, yellow, red or gone."""
    silent_s: float
    memory_free_bytes: int
    vnodes: tuple[str, ...]
    """``session/vnode`` of what it hosts."""
    tasks_done: int = 0
    leaving: bool = False
    """It is giving up what it hosts, and nothing new is placed there."""


@dataclass(frozen=True, slots=True, kw_only=True)
class NodeList(Message):
    nodes: tuple[NodeInfo, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class GetStatus(Message):
    pass


@dataclass(frozen=True, slots=True, kw_only=True)
class Status(Message):
    descriptor: Descriptor
    uptime_s: float
    nodes: int
    sessions_running: int
    sessions: int
    store: str
    resident_bytes: int
    unix_s: float = 0.0
    """The orchestrator's wall clock as it answers. Nothing decides by it: it shows whoever asks how far two clocks are
    apart. 0 = an older orchestrator, which does not say."""
    others: tuple[str, ...] = ()
    """Addresses of the other orchestrators of its store that are alive."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Locate(Message):
    session: str
    vnode: VNodeId


@dataclass(frozen=True, slots=True, kw_only=True)
class Located(Message):
    peer: PeerId
    addresses: tuple[str, ...]
    instance: Instance
    log_index: LogIndex


@dataclass(frozen=True, slots=True, kw_only=True)
class ReadSession(Message):
    """What a client needs to check or load a session: its record, log, manifests, and a token for its objects."""

    session: str


@dataclass(frozen=True, slots=True, kw_only=True)
class CommitInfo(Message):
    step: int
    manifest: Sha256


@dataclass(frozen=True, slots=True, kw_only=True)
class SessionFiles(Message):
    session: SessionId
    record: bytes
    definition: bytes
    entries: tuple[bytes, ...]
    commits: tuple[CommitInfo, ...]
    """Undropped, ascending."""
    token: str
    """Reads the session's objects."""
    rows_token: str
    """Reads rows of its dataset."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Generate(Message):
    """Stream of :class:`Generated`. ``target`` is a session, or a network (then its newest session with a commit)."""

    target: str
    prompt: tuple[int, ...]
    max_tokens: int
    temperature: float
    top_p: float
    seed: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Generated(Message):
    """One token; the first record has ``token = -1`` and names the session, step and dataset (for its tokenizer)."""

    token: int
    session: SessionId
    step: int
    dataset: DatasetId


@dataclass(frozen=True, slots=True, kw_only=True)
class Forward(Message):
    """One batch of explicit tensors through a network: stream of :class:`Forwarded`.

    ``target`` is a session, or a network: then its newest session with a commit, else its newest session, else none
    (initial weights of seed 0). Further batches of a request name what the first was answered from.
    """

    target: str
    inputs: tuple[InlineTensor, ...]
    """``column`` is the input's name. Shapes begin with the rows."""
    rows: int
    """Most rows of any batch of the same request."""
    step: int = -1
    """The checkpoint that an earlier batch was answered from, 0 = initial weights; -1 = the newest."""
    last: bool = True
    """No further batch follows: what was reserved for them is given back."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Forwarded(Message):
    """A piece of an output; pieces of one output follow each other, and so do outputs. The first record has an empty
    ``output`` and names session and step alone."""

    session: SessionId
    step: int
    output: str = ""
    shape: tuple[int, ...] = ()
    """Of the whole output, rows first."""
    dtype: str = ""
    data: bytes = b""
    """Little endian, row-major."""
