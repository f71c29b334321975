"""What travels: messages, the codec of factors, the broadcast."""

from legolm.federate.wire.broadcast import Broadcast, Opened, Update, accept, answer, arrived, open_, write
from legolm.federate.wire.codec import decode, encode, encoded_bytes
from legolm.federate.wire.messages import (
    EvaluateRequest,
    ScoreReply,
    TrainRequest,
    TrainSettings,
    UpdateReply,
    kind_of,
    pack,
    plain,
    unpack,
)
from legolm.federate.wire.welcome import BlockFile, OwnData, Welcome, block_files, own_data, read_welcome

__all__ = [
    "BlockFile",
    "Broadcast",
    "EvaluateRequest",
    "Opened",
    "OwnData",
    "ScoreReply",
    "TrainRequest",
    "TrainSettings",
    "Update",
    "UpdateReply",
    "Welcome",
    "accept",
    "answer",
    "arrived",
    "block_files",
    "decode",
    "encode",
    "encoded_bytes",
    "kind_of",
    "open_",
    "own_data",
    "pack",
    "plain",
    "read_welcome",
    "unpack",
    "write",
]
