"""Shamir's sharing and the primitives against published numbers."""

from __future__ import annotations

from itertools import combinations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from legolm.errors import LegolmError
from legolm.privacy import primitives, shamir


def test_the_published_example() -> None:
    """Wikipedia, Shamir's secret sharing: 1234 with 166 x + 94 x², modulo 1613."""
    shares = shamir.evaluate([1234, 166, 94], range(1, 7), 1613)
    assert shares == {1: 1494, 2: 329, 3: 965, 4: 176, 5: 1188, 6: 775}
    for points in combinations(shares, 3):
        assert shamir.reconstruct({point: shares[point] for point in points}, 1613) == 1234


def test_the_field_is_prime() -> None:
    assert all(pow(base, shamir.PRIME - 1, shamir.PRIME) == 1 for base in (2, 3, 5, 7, 11))
    assert shamir.to_bytes(shamir.PRIME - 1)[0] == 1
    with pytest.raises(LegolmError, match="none of the field's numbers"):
        shamir.from_bytes(shamir.PRIME.to_bytes(33, "big"))


@given(st.integers(0, 2**256 - 1), st.integers(1, 9), st.data())
def test_a_threshold_of_shares_opens_and_fewer_do_not(secret: int, holders: int, data: st.DataObject) -> None:
    threshold = data.draw(st.integers(1, holders))
    shares = shamir.share(secret, range(1, holders + 1), threshold)
    chosen = data.draw(st.permutations(sorted(shares)))
    assert shamir.reconstruct({point: shares[point] for point in chosen[:threshold]}) == secret
    assert shamir.reconstruct(shares) == secret
    if threshold > 1:  # by chance once in 2^256
        assert shamir.reconstruct({point: shares[point] for point in chosen[: threshold - 1]}) != secret


def test_the_primitives_give_the_published_numbers() -> None:
    """ChaCha20 (RFC 8439, A.1), X25519 (RFC 7748, 6.1), Ed25519 (RFC 8032, 7.1), HKDF-SHA256 (RFC 5869, A.3)."""
    assert primitives.stream(bytes(32), 8, 16).tobytes().hex() == "76b8e0ada0f13d90405d6ae55386bd28"
    bob = bytes.fromhex("5dab087e624a8a4b79e17f8b83800ee66f3bb1292618b6fd1c2f8b27ff88e0eb")
    alice = bytes.fromhex("8520f0098930a754748b7ddcb43ef75a0dbf3a0d26381af4eba4a98eaa9b4e6a")
    assert primitives.public_of(bob).hex() == "de9edb7d7b7dc1b4d35b61c2ece435373f8343c85b78674dadfc7e146f882b4f"
    assert (
        primitives.Agreeing(bob).with_(alice).hex()
        == "4a5d9d5ba4ce2de1728e3bf480350f25e07e21c947d19e3376f09b3c1e161742"
    )
    signer = bytes.fromhex("9d61b19deffd5a60ba844af492ec2cc44449c5697b326919703bac031cae7f60")
    assert primitives.identity_of(signer).hex() == "d75a980182b10ab7d54bfed3c964073a0ee172f3daa62325af021a68f707511a"
    assert primitives.derive(b"\x0b" * 22).hex() == "8da4e775a563c18f715f802a063c5a31b8a11f5c5ee1879ec3454e5f3c738d2d"
    with pytest.raises(LegolmError, match="a public key is none"):
        primitives.Agreeing(bob).with_(bytes(32))
