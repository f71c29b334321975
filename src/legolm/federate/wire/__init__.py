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
from legolm.federate.wire.offer import DeviceReply, Offer, OfferRequest, largest
from legolm.federate.wire.welcome import BlockFile, OwnData, Welcome, block_files, block_id, own_data, read_welcome

__all__ = [
    "BlockFile",
    "Broadcast",
    "DeviceReply",
    "EvaluateRequest",
    "Offer",
    "OfferRequest",
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
    "block_id",
    "decode",
    "encode",
    "encoded_bytes",
    "kind_of",
    "largest",
    "open_",
    "own_data",
    "pack",
    "plain",
    "read_welcome",
    "unpack",
    "write",
]
