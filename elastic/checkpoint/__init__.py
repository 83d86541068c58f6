"""Checkpoints: whole or absent. Part files first, the manifest last; every byte is hashed, nothing is ever executed."""

from elastic.checkpoint.hashing import hashes, parameters_sha256, state_sha256
from elastic.checkpoint.manager import clean, commit, load, newest_good, prune, read_init, split, verify, write_part
from elastic.checkpoint.manifest import FileEntry, Manifest, parse
from elastic.checkpoint.store import Store

__all__ = ["FileEntry", "Manifest", "Store", "clean", "commit", "hashes", "load", "newest_good", "parameters_sha256", "parse", "prune",
           "read_init", "split", "state_sha256", "verify", "write_part"]
