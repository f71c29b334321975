"""A device's way to its server: who it is there, and its blocks' files. What is wrong is one plain sentence."""

from __future__ import annotations

import base64
import json
import re
import ssl
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from types import TracebackType
from typing import Any

import httpx
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat, load_ssh_private_key

from legolm.errors import LegolmError, brief
from legolm.federate.client.fetch import UnreachableError

TIMEOUT_S = 30.0


class Door:
    """The guard of the SuperLink at `server` (host:port), whose certificate is of `ca`; `key` is this device's.

    Raises `LegolmError` for what is no CA or key.
    """

    def __init__(self, server: str, ca: Path, key: Path) -> None:
        self._server = server
        if not (found := re.fullmatch(r"[^/?#@\s]+:([0-9]{1,5})", server)) or not 0 < int(found[1]) < 1 << 16:
            raise LegolmError(
                f"--server {server!r}: write it as HOST:PORT with a port of 1 to 65535, for instance "
                "fl.example.org:8000"
            )
        try:
            context = ssl.create_default_context(cafile=str(ca))
        except (OSError, ssl.SSLError) as error:
            raise LegolmError(f"{ca}: is no CA's certificate ({brief(error)}); get ca.pem from the server") from None
        try:
            own = load_ssh_private_key(key.read_bytes(), None)
        except (OSError, ValueError) as error:
            raise LegolmError(f"{key}: is no private key ({brief(error)}); make one: legolm certs client") from None
        if not isinstance(own, ec.EllipticCurvePrivateKey):
            raise LegolmError(f"{key}: is no key on a NIST curve; make one: legolm certs client")
        self._key = own
        self._http = httpx.Client(base_url=f"https://{server}", verify=context, timeout=TIMEOUT_S, trust_env=False)

    def hello(self, anew: bool = False) -> dict[str, Any]:
        """Who this device is to the server, and for how long it heard nothing of its node.

        `anew`: its node is gone, and another one comes. Empty for a SuperLink without legolm's guard. Raises
        `UnreachableError` where nobody answers or a clock is wrong, `LegolmError` where the device is kept out or the
        other is no server.
        """
        found = self._get("hello", anew=1) if anew else self._get("hello")
        if found.status_code == httpx.codes.NOT_FOUND:
            return {}
        said = self._said(found)
        theirs, ours = said.get("versions", {}), {name: version(name) for name in ("legolm", "flwr")}
        for name, own in ours.items():
            if theirs.get(name) != own:
                raise LegolmError(
                    f"{self._server}: has {name} {theirs.get(name)}, and this device {own}; install the server's: "
                    f"pip install {name}=={theirs.get(name)}"
                )
        return said

    def piece(self, path: str, at: int) -> bytes:
        """Bytes of a block's file from `at` on. Raises as `hello`."""
        found = self._get(f"blocks/{path}", at=at)
        if found.status_code == httpx.codes.NOT_FOUND:
            raise LegolmError(f"{self._server}: does not give {path}; copy the block here, and give it as --block")
        if found.status_code != httpx.codes.OK:
            self._said(found)
        return found.content

    def close(self) -> None:
        """The connection."""
        self._http.close()

    def __enter__(self) -> Door:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()

    def _get(self, path: str, **query: int) -> httpx.Response:
        stamp = datetime.now(UTC).isoformat()
        public = self._key.public_key().public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo)
        signature = self._key.sign(stamp.encode(), ec.ECDSA(hashes.SHA256()))
        headers = {
            "flwr-public-key": base64.b64encode(public).decode(),
            "flwr-timestamp": stamp,
            "flwr-signature": base64.b64encode(signature).decode(),
        }
        try:
            return self._http.get(f"/legolm/{path}", params=query, headers=headers)
        except httpx.HTTPError as error:
            raise self._why(error) from None

    def _why(self, error: httpx.HTTPError) -> LegolmError:
        said = str(error)
        if "Hostname mismatch" in said or "IP address mismatch" in said:
            return LegolmError(
                f"{self._server}: its certificate is for another host; on the server: legolm certs server --host"
            )
        if "CERTIFICATE_VERIFY_FAILED" in said:
            reason = said.partition("verify failed: ")[2].partition(" (_ssl")[0] or said
            if "not yet valid" in reason or "expired" in reason:
                return UnreachableError(f"{self._server}: its {brief(reason)}; look at this machine's clock")
            return LegolmError(
                f"{self._server}: its certificate is not of this device's CA ({brief(reason)}); get ca.pem of this "
                "server's federation"
            )
        if "WRONG_VERSION_NUMBER" in said or "RECORD_LAYER_FAILURE" in said or "HTTP_REQUEST" in said:
            return LegolmError(f"{self._server}: speaks no TLS, and nothing is sent in the open; give a legolm server")
        return UnreachableError(f"{self._server}: does not answer ({brief(error)})")

    def _said(self, found: httpx.Response) -> dict[str, Any]:
        try:
            said = json.loads(found.content)
        except ValueError:
            said = None
        if found.status_code >= httpx.codes.INTERNAL_SERVER_ERROR:
            raise UnreachableError(f"{self._server}: does not answer now (HTTP {found.status_code})")
        if not isinstance(said, dict):
            raise LegolmError(f"{self._server}: is no legolm server (HTTP {found.status_code}); look at --server")
        if found.status_code != httpx.codes.OK:
            # A clock may come right, of this machine or of the server's: the device need not end for it.
            kind = UnreachableError if said.get("again") is True else LegolmError
            raise kind(f"{self._server}: keeps this device out: {brief(str(said.get('error', said)))}")
        return said
