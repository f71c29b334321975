"""Cryptography, all from the library `cryptography`: signatures, key agreement, sealed messages, a stream of masks."""

from __future__ import annotations

import numpy as np
from cryptography.exceptions import InvalidSignature, InvalidTag
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey, X25519PublicKey
from cryptography.hazmat.primitives.ciphers import Cipher
from cryptography.hazmat.primitives.ciphers.aead import ChaCha20Poly1305
from cryptography.hazmat.primitives.ciphers.algorithms import ChaCha20
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.kdf.hkdf import HKDF

from legolm.errors import PublicError

KEY_BYTES = 32
NONCE = bytes(12)
"""Of sealed messages: each key seals one."""
Words = np.ndarray
"""Entries modulo 2^16 or 2^32: a vector of uint16 or uint32."""


def public_of(secret: bytes) -> bytes:
    """The X25519 public key (RFC 7748) of a secret one; 32 bytes each."""
    return X25519PrivateKey.from_private_bytes(secret).public_key().public_bytes_raw()


class Agreeing:
    """A secret X25519 key, 32 bytes."""

    def __init__(self, secret: bytes) -> None:
        self._key = X25519PrivateKey.from_private_bytes(secret)

    def with_(self, public: bytes) -> bytes:
        """What both ends of a pair have in common. Raises `LegolmError` for a key that agrees with everybody."""
        try:
            return self._key.exchange(X25519PublicKey.from_public_bytes(public))
        except ValueError:
            raise PublicError("a public key is none") from None


def derive(secret: bytes, *about: bytes) -> bytes:
    """A key of 32 bytes for one purpose: HKDF-SHA256 (RFC 5869); each part of `about` counts as a whole."""
    return HKDF(algorithm=SHA256(), length=KEY_BYTES, salt=None, info=joined(*about)).derive(secret)


def joined(*parts: bytes) -> bytes:
    """Parts, each with its length, so that no two lists are one text."""
    return b"".join(len(part).to_bytes(4, "big") + part for part in parts)


def identity_of(secret: bytes) -> bytes:
    """The Ed25519 public key (RFC 8032) of a secret one; 32 bytes each."""
    return Ed25519PrivateKey.from_private_bytes(secret).public_key().public_bytes_raw()


def sign(secret: bytes, content: bytes) -> bytes:
    """An Ed25519 signature, 64 bytes."""
    return Ed25519PrivateKey.from_private_bytes(secret).sign(content)


def is_signed(identity: bytes, signature: bytes, content: bytes) -> bool:
    """Whether the signature is this identity's of this content."""
    try:
        Ed25519PublicKey.from_public_bytes(identity).verify(signature, content)
    except (InvalidSignature, ValueError):
        return False
    return True


def seal(key: bytes, content: bytes, about: bytes) -> bytes:
    """ChaCha20-Poly1305 (RFC 8439) under a key that seals nothing else."""
    return ChaCha20Poly1305(key).encrypt(NONCE, content, about)


def unseal(key: bytes, sealed: bytes, about: bytes) -> bytes:
    """What was sealed. Raises `LegolmError` when it is not."""
    try:
        return ChaCha20Poly1305(key).decrypt(NONCE, sealed, about)
    except (InvalidTag, ValueError):
        raise PublicError("a sealed share is not what its sender sealed") from None


def stream(key: bytes, count: int, bits: int) -> Words:
    """`count` words of ChaCha20's stream of this key, from its beginning."""
    content = Cipher(ChaCha20(key, bytes(16)), mode=None).encryptor().update(bytes(count * bits // 8))
    return np.frombuffer(content, dtype=f"<u{bits // 8}")
