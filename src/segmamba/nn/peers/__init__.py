"""Networks of other papers, to compare with: by name, through the same pipeline."""

from segmamba.nn.peers.catalogue import (
    PEERS,
    build_peer,
    check_peer_config,
    peer_config,
)
from segmamba.nn.peers.network import PeerNetwork

__all__ = ["PEERS", "PeerNetwork", "build_peer", "check_peer_config", "peer_config"]
