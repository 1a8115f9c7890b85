"""Who is a peer: daemons of a job prove to each other that they know its secret, and seal every message with it.

The secret is new in every attempt: rank 0 makes it, the job's own store takes it to all ranks, each gives it to its daemon through the Unix socket. So
nobody outside the job can ask, tell or pretend, and neither can a daemon that missed the last attempt. It is never sent between daemons:

    who dials -> Knock(job, attempt, nonce c)
    who listens -> Prove(nonce s, HMAC(secret, "listens" | job | attempt | c | s))      or hangs up, if it does not know such a job
    who dials -> Prove("", HMAC(secret, "dials" | job | attempt | c | s))

Then every message is followed by a tag: BLAKE2b, keyed by HMAC(secret, direction | c | s), of its number and its body; so none can be changed, left out,
repeated or turned around. Bytes of images are not sealed: their checksums came in sealed messages, and what parity gives is proven by those too.

Not secrecy: what is sent can be read on the wire. Off loopback that needs the operator's word (`--insecure-peers`).

Sources: RFC 2104 (HMAC), RFC 7693 (BLAKE2); the shape of the exchange is that of ISO/IEC 9798-4's three-pass mutual authentication.
"""

from __future__ import annotations

import hashlib
import hmac

SECRET_BYTES = 32
NONCE_BYTES = 32
TAG_BYTES = 16
DIALS, LISTENS = "dials", "listens"


def proof(secret: bytes, role: str, job: str, attempt: int, dialled: bytes, listened: bytes) -> bytes:
    """What the end with this role says to prove that it knows the secret."""
    return _mac(secret, f"ckptd peer {role}", job.encode(), attempt.to_bytes(8, "little"), dialled, listened)


def matches(one: bytes, other: bytes) -> bool:
    """Whether two proofs or tags are equal, in constant time."""
    return hmac.compare_digest(one, other)


class Tagger:
    """The tags of one direction of a connection, in order."""

    def __init__(self, secret: bytes, role: str, dialled: bytes, listened: bytes) -> None:
        """`role`: of the end that sends."""
        self._key = _mac(secret, f"ckptd messages of who {role}", dialled, listened)
        self._number = 0

    def tag(self, body: bytes) -> bytes:
        """The tag of the next message."""
        number, self._number = self._number, self._number + 1
        return hashlib.blake2b(number.to_bytes(8, "little") + body, digest_size=TAG_BYTES, key=self._key).digest()


def _mac(secret: bytes, what: str, *parts: bytes) -> bytes:
    text = b"".join(len(p).to_bytes(8, "little") + p for p in (what.encode(), *parts))
    return hmac.digest(secret, text, "sha256")
