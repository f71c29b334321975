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

__all__ = [
    "Broadcast",
    "EvaluateRequest",
    "Opened",
    "ScoreReply",
    "TrainRequest",
    "TrainSettings",
    "Update",
    "UpdateReply",
    "accept",
    "answer",
    "arrived",
    "decode",
    "encode",
    "encoded_bytes",
    "kind_of",
    "open_",
    "pack",
    "plain",
    "unpack",
    "write",
]
