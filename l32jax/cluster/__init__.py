"""The processes of a run: how they find each other, and who they are. Imports no JAX by itself."""

from l32jax.cluster.launchers import Cluster, find
from l32jax.cluster.membership import hosts, join
from l32jax.cluster.roll_call import PeerMissing

__all__ = ["Cluster", "PeerMissing", "find", "hosts", "join"]
