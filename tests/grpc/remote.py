"""A peer in a process of its own: echoes heartbeats and tensors. Prints its address; ends with its standard input."""

from __future__ import annotations

import asyncio
import sys

from dcnr.ids import Incarnation, PeerId
from dcnr.protocol.messages import Message, TensorFrame
from tests.grpc.peers import Peer, Recorder


class Echo(Recorder):
    """Sends back what it receives, and gives its own count back."""

    peer: Peer

    def received(self, peer: PeerId, incarnation: Incarnation, message: Message) -> None:
        self.peer.hub.send(peer, message)
        if isinstance(message, TensorFrame):
            self.peer.table.release(message.tensor.handle)


async def main() -> None:
    """Serve until standard input ends."""
    events = Echo()
    async with Peer("b", events=events) as peer:
        events.peer = peer
        sys.stdout.write(f"{peer.address}\n")
        sys.stdout.flush()
        await asyncio.to_thread(sys.stdin.read)


if __name__ == "__main__":
    asyncio.run(main())
