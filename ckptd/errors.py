"""Every error that ckptd raises, drawn once.

    CkptdError
     |- UserError            1x   the caller's to mend
     |   |- BadArgument      10   an option, a setting or an argument is wrong
     |   |- Unstorable       11   state that cannot be stored without pickle, or whose layout is not known
     |   |- StateMismatch    12   missing, unexpected or differently shaped keys at a restore
     |   |- NotRestored      13   snapshots exist and nobody asked to start from scratch
     |   `- NotFound         14   no such job, step or checkpoint
     |- BadBytes             2x   bytes that are not what they claim to be
     |   |- BadImage         20
     |   |- BadManifest      21   manifest or index
     |   |- NewerFormat      22   written by a newer ckptd
     |   |- ChecksumMismatch 23
     |   |- NotTiled         24   boxes overlap or leave a hole
     |   |- BadForeign       25   a checkpoint of another system: malformed, hostile, or holding what is not read
     |   `- Divergent        26   replicas of one box hold different bytes
     |- Lost                 3x   somebody did not answer
     |   |- DaemonUnreachable 30
     |   |- RanksMissing     31   ranks of the job did not come to a meeting in time
     |   `- PeerFailed       32   another daemon or rank answered with an error
     |- NoRoom               4x
     |   |- MemoryRefused    40
     |   `- StoreFailed      41   the durable tier refused a read or a write
     `- Bug                  70   an invariant of ours is broken

Whose fault it is splits first. Each leaf has an exit code for the command line and, where one is known, a `remedy`: one sentence
that tells the operator what to do next.
"""

from __future__ import annotations

__all__ = [
    "BadArgument",
    "BadBytes",
    "BadForeign",
    "BadImage",
    "BadManifest",
    "Bug",
    "ChecksumMismatch",
    "CkptdError",
    "DaemonUnreachable",
    "Divergent",
    "Lost",
    "MemoryRefused",
    "NewerFormat",
    "NoRoom",
    "NotFound",
    "NotRestored",
    "NotTiled",
    "PeerFailed",
    "RanksMissing",
    "StateMismatch",
    "StoreFailed",
    "Unstorable",
    "UserError",
]


class CkptdError(Exception):
    """Root of the tree. `exit_code` is the command line's exit status for it."""

    exit_code = 1

    def __init__(self, message: str, *, remedy: str = "") -> None:
        super().__init__(message)
        self.message = message
        self.remedy = remedy

    def __str__(self) -> str:
        return f"{self.message}\n  remedy: {self.remedy}" if self.remedy else self.message


class UserError(CkptdError):
    """The caller can mend it."""


class BadArgument(UserError):
    """An option, a setting or an argument is wrong."""

    exit_code = 10


class Unstorable(UserError):
    """State that cannot be stored without pickle, or whose layout is not known; the message starts with its path."""

    exit_code = 11


class StateMismatch(UserError):
    """A restore met missing, unexpected or differently shaped keys; the message names them."""

    exit_code = 12


class NotRestored(UserError):
    """Snapshots of this job exist, and the loop neither restored them nor asked for a fresh start."""

    exit_code = 13


class NotFound(UserError):
    """No such job, step or checkpoint."""

    exit_code = 14


class BadBytes(CkptdError):
    """Bytes are not what they claim to be. Nothing was touched."""

    exit_code = 2


class BadImage(BadBytes):
    """An image is not a valid safetensors file of ours."""

    exit_code = 20


class BadManifest(BadBytes):
    """A manifest or an index is malformed or lies."""

    exit_code = 21


class NewerFormat(BadBytes):
    """The bytes were written by a newer ckptd than this one."""

    exit_code = 22


class ChecksumMismatch(BadBytes):
    """A block's bytes do not hash to its recorded checksum."""

    exit_code = 23


class NotTiled(BadBytes):
    """The boxes of a tensor overlap, leave a hole, or lie outside its shape."""

    exit_code = 24


class BadForeign(BadBytes):
    """A checkpoint of another system is malformed, hostile, or holds what is not read; the message names file and place."""

    exit_code = 25


class Divergent(BadBytes):
    """Copies of the same part of a tensor, which must be equal, are not."""

    exit_code = 26


class Lost(CkptdError):
    """Somebody did not answer."""

    exit_code = 3


class DaemonUnreachable(Lost):
    """The node's daemon did not answer within the deadline."""

    exit_code = 30


class RanksMissing(Lost):
    """Ranks of the job did not come to a meeting in time; the message names them."""

    exit_code = 31


class PeerFailed(Lost):
    """Another daemon or rank answered with an error, or stopped in mid-sentence."""

    exit_code = 32


class NoRoom(CkptdError):
    """Memory or storage ran out, or would."""

    exit_code = 4


class MemoryRefused(NoRoom):
    """Admission control: the snapshots would not fit into this node's memory."""

    exit_code = 40


class StoreFailed(NoRoom):
    """The durable tier refused a read or a write."""

    exit_code = 41


class Bug(CkptdError):
    """An invariant of ours is broken. Please report it."""

    exit_code = 70
