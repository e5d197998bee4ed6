"""Every limit of the program, each with its reason. Nothing here can reach a bit of a weight."""

from __future__ import annotations

from dataclasses import dataclass

PROTOCOL_VERSION_MIN = 1
PROTOCOL_VERSION_MAX = 1


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """Intervals in seconds, sizes in bytes. One instance is handed to every machine and adapter."""

    heartbeat_interval_s: float = 0.5
    """Two a second: cheap (a frame of 100 bytes), and three may be lost before anybody turns yellow."""
    yellow_after_s: float = 1.75
    """Three missed heartbeats and a little: worth showing, not worth acting on."""
    red_after_s: float = 5.0
    """A busy laptop may pause for seconds; a false alarm costs a rollback, never a bit."""
    link_grace_s: float = 1.0
    """A closed link that is not dialled again for this long means a dead process: a kill closes sockets
    at once, so this, not ``red_after_s``, decides how fast a kill is noticed."""
    pair_patience_s: float = 5.0
    """Two hosts that cannot reach each other for this long, while both reach the orchestrator, are parted: a link that
    breaks is dialled again many times within it."""
    pair_memory_s: float = 300.0
    """They are not placed next to each other again for this long."""
    probation_first_s: float = 60.0
    """A PNode that was lost twice gets VNodes only where there is no other place, for this long; after each further loss
    for twice as long."""
    probation_most_s: float = 3600.0
    """Longest such time; a PNode that was not lost for so long begins anew."""
    node_forgotten_s: float = 3600.0
    """A PNode that is gone for this long and hosts nothing is listed no more: most come back within minutes, or never."""
    task_age_factor: float = 10.0
    """A task ten times older than its usual time hangs."""
    task_age_floor_s: float = 10.0
    """No task shorter than this is called hanging, however fast the others are."""
    task_hopeless_factor: float = 6.0
    """A task whose session has been withdrawn and which has run this many times longer than one that hangs never returns
    (a minute at least: until then a slow machine may still finish): its PNode ends itself."""
    redial_first_s: float = 0.1
    """First pause before a link is dialled again."""
    redial_most_s: float = 0.6
    """Longest such pause. With the handshake after it, it is below ``link_grace_s``: an orchestrator that goes on after a
    pause finds its links closed, and whoever dials again at the next try must not count as dead by then. The pauses
    before it, 0.1, 0.2 and 0.4, lie within the grace too. Two dials a second at one who is away cost next to nothing."""
    resend_after_s: float = 2.0
    """An unanswered command is sent again: links lose suffixes only when they break, so this is rare."""
    dial_timeout_s: float = 2.0
    """A link whose handshake takes longer is dialled at the next address: a round trip and a name lookup fit many times."""
    link_flush_s: float = 1.0
    """How long a closing link goes on sending the control frames that are queued: a peer that reads takes milliseconds."""
    link_queue: int = 20_000
    """Frames waiting on one link. More are waiting only where the peer does not read, and that link is closed."""
    keepalive_interval_s: float = 4.0
    """Transport pings: they keep a NAT's entry alive. Death is noticed by heartbeats, so that a paused peer is not cut off early."""
    keepalive_timeout_s: float = 4.0
    """An unanswered transport ping ends the connection after this."""
    reply_bytes: int = 64 << 20
    """Largest reply to a client: a session's whole log, entry by entry."""
    transfer_timeout_s: float = 300.0
    """An object or rows that are not there by then count as unreadable, retries included."""
    channel_idle_s: float = 60.0
    """A connection to a data service that nobody has used for this long is closed with the next use of another: the PNode
    at its other end may be gone. One that is needed again is made in milliseconds."""
    stored_repeat_s: float = 2.0
    """``Stored`` is repeated until it is answered, for the owner may have changed."""
    store_retry_s: float = 0.5
    """Pause before a store call of unknown outcome is tried again with the same bytes."""
    create_patience_s: float = 15.0
    """A client whose network or session the store does not take is told why after this long: before its call ends, at
    ``request_timeout_s``, without a reason."""
    store_request_timeout_s: float = 20.0
    """One request to an S3 store, its bytes included: a part of 5 MB on a line of 2 Mbit/s."""
    store_give_up_s: float = 60.0
    """A call to an S3 store is not repeated after this long: by then the machine decides what to do instead."""
    store_open_s: float = 5.0
    """The same two while a store is opened: whoever starts a program wants to hear soon what is wrong."""
    lease_s: float = 3.0
    """An owner that has not renewed its hint in the store for this long, as another orchestrator counts, is taken over
    from. It renews three times within it. A takeover too early costs nothing but a word: nothing rolls back."""
    addresses_most: int = 8
    """Addresses of one PNode: log entries repeat them for every state that it keeps."""
    address_characters: int = 300
    """Longest of these: a host name has 253 at most."""
    orchestrators_known: int = 8
    """Orchestrators that a PNode keeps links to at most: whoever answers first may name many."""
    leave_patience_s: float = 20.0
    """A PNode that is told to end waits this long for its VNodes to move elsewhere: many steps and transfers fit."""
    rebalance_every_s: float = 10.0
    """How often a running session looks whether another placement would be better: PNodes come by the minute."""
    rebalance_steps: int = 5
    """Steps that tell the pace of a placement before it is compared."""
    rebalance_share: float = 0.8
    """A placement whose slowest stage is not predicted to be this much faster is not worth a move: predictions err."""
    rebalance_factor: float = 3.0
    """Over the rest of the run a move must gain this many times what it costs."""
    move_cost_s: float = 3.0
    """What a move costs: the pipeline runs empty, states are kept, sent and loaded (measured 1 to 2 s on one machine)."""
    recover_wait_s: float = 30.0
    """A restarted orchestrator waits this long for the hosts of its sessions to come back before it
    places their VNodes elsewhere. PNodes dial again within ``redial_most_s``."""
    client_patience_s: float = 60.0
    """A client that follows a session looks for a network that went away for this long: twice the time in
    which a restarted orchestrator has its hosts back."""
    serving_ttl_s: float = 120.0
    """Serving instances that nobody uses for this long are released."""
    token_ttl_s: float = 600.0
    """Validity of a data token: long enough for a slow transfer, short enough to be worthless when leaked."""
    signed_ttl_s: float = 60.0
    """Validity of a signed address of an object: it is used at once, and a transfer that has begun goes on."""
    chunk_bytes: int = 1 << 20
    """Payload of one chunk of a tensor; 64 KiB to 1 MiB are equally fast (measured)."""
    object_chunk_bytes: int = 256 << 10
    """Payload of one chunk of an object: an orchestrator of 150 MB holds several for every transfer under way (of eight
    at a time each takes 4 MB, with chunks of 1 MiB 8 MB; measured)."""
    upload_window_bytes: int = 1 << 20
    """What an upload may be ahead of the orchestrator that writes it: gRPC's own estimate grows to many MB for each."""
    control_bytes: int = 4 << 20
    """Largest control frame: a ticket with the definition of a 10,000-node network fits."""
    object_bytes: int = 8 << 30
    """Largest state object or shard."""
    shard_bytes: int = 16 << 20
    """Largest shard of a dataset: it is read whole once, to check its sha256, by an orchestrator of 150 MB."""
    shard_cache_bytes: int = 32 << 20
    """Pieces of shards that a data service keeps in memory."""
    text_bytes: int = 1 << 30
    """Most source text of one dataset: the client tokenizes it in memory."""
    definition_bytes: int = 4 << 20
    """Largest network file."""
    network_depth: int = 32
    """Deepest nesting of a network file."""
    network_values: int = 500_000
    """Most values of a network file: 10,000 nodes of eight keys each and 20,000 edges. Each costs the reader
    microseconds and 200 bytes."""
    network_text: int = 1000
    """Longest single text of a network file, ids included: messages repeat them."""
    network_nodes: int = 10_000
    """Most nodes of a network."""
    network_slots: int = 1 << 17
    """Most output slots of all nodes together: few ``broadcast`` nodes with many outputs must not fill the memory."""
    network_problems: int = 1000
    """Problems after which a file is read no further: a hostile one could have millions, and nobody mends that many."""
    forward_input_bytes: int = 2 << 20
    """Inputs of one batch of a forward pass: they travel in one control frame."""
    forward_output_bytes: int = 16 << 20
    """Outputs of one batch: an orchestrator of 150 MB holds them, and once more while they are sent on."""
    forward_row_bytes: int = 256 << 20
    """Largest outputs of a single row, which cannot be cut."""
    client_queue: int = 100_000
    """Messages that a streaming client may be behind: a whole session's past fits; a slower client is dropped."""
    event_log_entries: int = 10_000
    """Events kept in memory for ``dcnr events``."""
    answer_within_s: float = 3.0
    """A list is answered from what is known where the store does not answer by then."""
    request_timeout_s: float = 30.0
    """A unary call that is not answered by then is an error."""
    pnode_overhead_bytes: int = 300 << 20
    """What a PNode needs besides VNodes: interpreter, torch, buffers (measured about 250 MB)."""
    compute_queue: int = 2
    """Tasks handed to a worker at once: one runs, one waits, so that the worker never idles for a loop turn."""
    acquire_every: int = 1000
    """At the first placement after this many entries the owner renews ``Acquire``: an epoch's number stays recent.
    Reading a log stays short by the state that every ``Acquire`` and placement carries."""
    mark_least_s: float = 1.0
    """Between two marks at least: replaying a second of steps costs less than noticing a loss."""
    mark_cost_s: float = 0.02
    """A mark is never counted as cheaper than this: its copies and writes take time that nobody measures."""
    mark_cost_factor: float = 20.0
    """Between two marks at most this many times what one took: links and disks are busy with them for a twentieth of
    the time, more only where PNodes are lost every few minutes."""
    shelf_uploads: int = 2
    """States of other PNodes that are taken in at a time: each is in memory while it comes."""
    mark_patience_s: float = 300.0
    """A mark that is not whole by then is given up: as long as one transfer may take."""
    move_patience_s: float = 15.0
    """A session stands still for a move this long at most."""
    guard_distrust_s: float = 300.0
    """A PNode that did not keep what it should have (a full disk, no way to it) is not asked again for so long."""
    checkpoint_retry_most_s: float = 60.0
    """The last state of a session is stored as often as it takes, after pauses that double up to this long: somebody
    must clear a disk first, and then wants to see the session end within a minute."""
    mark_retry_s: float = 10.0
    """After a mark that failed (a full disk, a PNode that went) the next one is tried, or ``mark_cost_factor`` times as
    long after as it took to fail, if that is longer."""
    loss_prior_s: float = 600.0
    """Before a loss is seen, one is expected in this time: volunteers' machines come and go."""
    commit_least_s: float = 30.0
    """Between two commits at least, if the recipe does not ask for them: marks make most losses cheap already."""
    fallback_prior_s: float = 3600.0
    """Before a loss that goes back to a commit is seen, one is expected in this time: several PNodes at once, or no mark."""
    commits_kept: int = 2
    """Verified commits that deletion always leaves."""
    window_extra: int = 1
    """Open microbatches beyond one per segment: 3 for two stages (measured 4 % over 2)."""


LIMITS = Limits()
