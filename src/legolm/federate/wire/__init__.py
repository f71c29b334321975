"""What travels: messages, the codec of factors, the broadcast."""

from legolm.federate.wire.codec import encoded_bytes

__all__ = ["encoded_bytes"]
